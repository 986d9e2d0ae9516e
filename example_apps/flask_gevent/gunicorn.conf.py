"""gunicorn's settings. The patch is here too: with ``preload_app`` the master imports the application, and gunicorn itself
patches only later, in the workers.
"""

from gevent import monkey

monkey.patch_all()

worker_class = "gevent"
workers = 2
worker_connections = 500  # greenlets a worker; the pool of 10 connections a worker is what the database sees
preload_app = True
graceful_timeout = 10
