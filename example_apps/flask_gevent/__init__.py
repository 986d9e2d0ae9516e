"""Votes in Flask under gevent: `wsgi.py` patches first, `gunicorn.conf.py` runs it, `app.py` is an ordinary application."""
