"""What will go wrong in production, told before it does: the live server and the configuration, read side by side.

Only the command line imports this (``cli.py``, and ``flask peewee doctor``); an application never does. A file per concern:

* ``target.py`` what the user names, ``boot.py`` and ``serving.py`` how it is served, ``probe.py`` what the server says;
* ``pool.py``, ``mysql.py``, ``postgres.py``, ``sqlite.py``, ``frameworks.py``, ``loop.py``, ``gevent.py`` the findings;
* ``report.py`` how they are told, ``examine.py`` all of it for one target;
* ``check.py`` and ``live.py``: the commands ``check`` and ``pool``.
"""
