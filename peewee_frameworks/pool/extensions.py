"""Pooled forms of the databases that live in Peewee's extensions; imported on demand, for they import drivers."""

from __future__ import annotations

from playhouse.cockroachdb import CockroachDatabase
from playhouse.mysql_ext import MariaDBConnectorDatabase, MySQLConnectorDatabase
from playhouse.postgres_ext import PostgresqlExtDatabase, Psycopg3Database

from .database import _PooledMySQLDatabase, _PooledPostgresqlDatabase

__all__ = [
    "PooledCockroachDatabase",
    "PooledMariaDBConnectorDatabase",
    "PooledMySQLConnectorDatabase",
    "PooledPostgresqlExtDatabase",
    "PooledPsycopg3Database",
]


class PooledPsycopg3Database(_PooledPostgresqlDatabase, Psycopg3Database):
    """PostgreSQL with Peewee's extensions, through psycopg 3, pooled."""


class PooledPostgresqlExtDatabase(_PooledPostgresqlDatabase, PostgresqlExtDatabase):
    """PostgreSQL with Peewee's extensions, pooled."""


class PooledCockroachDatabase(_PooledPostgresqlDatabase, CockroachDatabase):
    """CockroachDB, pooled."""


class PooledMariaDBConnectorDatabase(_PooledMySQLDatabase, MariaDBConnectorDatabase):
    """MariaDB through its own connector, pooled."""


class PooledMySQLConnectorDatabase(_PooledMySQLDatabase, MySQLConnectorDatabase):
    """MySQL through mysql-connector-python, pooled."""
