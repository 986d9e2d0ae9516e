"""Serve tests.gevent.served with gevent's own server: ``python -m tests.gevent.serve_pywsgi PORT``."""

from gevent import monkey

monkey.patch_all()

import signal
import sys

import gevent
from gevent.pywsgi import WSGIServer

from tests.gevent.served import app

server = WSGIServer(("127.0.0.1", int(sys.argv[1])), app, log=None)
gevent.signal_handler(signal.SIGTERM, server.stop)
server.serve_forever()
