"""What the server loads: ``gunicorn -c example_apps/flask_gevent/gunicorn.conf.py example_apps.flask_gevent.wsgi:app``.

The two lines come before every other import, so that Peewee, the drivers and the database are made in the patched world.
"""

from gevent import monkey

monkey.patch_all()

from example_apps.flask_gevent.app import create_app  # noqa: E402 - the patch comes first

app = create_app()
