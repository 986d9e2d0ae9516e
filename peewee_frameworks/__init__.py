"""One Peewee connection per web request, given back exactly once."""

__version__ = "0.1.0"
