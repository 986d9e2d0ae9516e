"""Peewee's databases on our pool: what ``playhouse.pool`` offers, under the same names and with the same arguments."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import peewee as typed_peewee
import playhouse.pool as playhouse_pool

from peewee_frameworks.aio.sync import AsyncIdiom
from peewee_frameworks.drivers import is_broken_off
from peewee_frameworks.errors import ConfigurationError
from peewee_frameworks.spelling import nearly
from peewee_frameworks.state import State

from .drivers import pymysql_connection_class
from .options import ELSEWHERE, OPTION_NAMES, PoolOptions
from .pool import Pool

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .leaks import Suspect

peewee: Any = typed_peewee  # its stubs do not know what a pool has to override

__all__ = ["PooledDatabase", "PooledMySQLDatabase", "PooledPostgresqlDatabase", "PooledSqliteDatabase"]

# ``connect_timeout`` is a driver's argument too: it goes there, and the pool follows it.
_OWN_OPTIONS = OPTION_NAMES - {"max_connections", "stale_timeout", "timeout", "connect_timeout"}
# Arguments of libpq and of MySQL Connector that are spelled almost like an option of the pool.
_ALIKE = frozenset({"keepalives", "connection_timeout"})
_LIVE = frozenset({"password", "passwd", "user", "host", "port", "dsn", "conninfo"})


class PooledDatabase(AsyncIdiom, playhouse_pool.PooledDatabase):
    """A mixin that gives any Peewee database class our pool; put it before the database class.

    ``class PooledThing(PooledDatabase, ThingDatabase): pass``

    Args:
        database: as for the database class; ``None`` defers to `init`.
        max_connections: most connections open at once; ``None`` or 0: no limit.
        stale_timeout: seconds since connect after which a connection is not used again.
        timeout: seconds that a checkout waits when all are in use; 0: for ever, ``None``: not at all.
        kwargs: further `PoolOptions`, and whatever the database class takes.

    Raises:
        ConfigurationError: options are out of range, or contradict.
    """

    def __init__(
        self,
        database: Any,
        max_connections: Any = 20,
        stale_timeout: Any = None,
        timeout: Any = None,
        **kwargs: Any,
    ) -> None:
        options = {name: kwargs.pop(name) for name in _OWN_OPTIONS & kwargs.keys()}
        options.update(max_connections=max_connections, stale_timeout=stale_timeout, timeout=timeout)
        self._pool_database: Any = None
        self._pool = Pool(
            self._open_connection,
            self._pool_options(PoolOptions(), options),
            prepare=self._prepare_connection,
            on_fork=self._forget_connection,
        )
        self._pool.describe = self._describe_holders
        self._pool.label_of = self._label_of_holder
        # Not playhouse's own __init__: it would make locks now, perhaps before a monkey patch.
        super(playhouse_pool.PooledDatabase, self).__init__(database, **kwargs)

    @property
    def pool(self) -> Pool:
        """The pool: ``acquire``, ``acquire_async``, ``release``, ``stats``, ``suspend``, ``resize`` and so on."""
        return self._pool

    def init(
        self, database: Any, max_connections: Any = None, stale_timeout: Any = None, timeout: Any = None, **kwargs: Any
    ) -> None:
        """Set what was deferred, or change it; connections opened with other settings are not used again."""
        options = {name: kwargs.pop(name) for name in _OWN_OPTIONS & kwargs.keys()}
        given = {"max_connections": max_connections, "stale_timeout": stale_timeout, "timeout": timeout}
        options.update({name: value for name, value in given.items() if value is not None})
        _refuse_typos(kwargs)
        if "connect_timeout" in kwargs:  # the driver's too; the text of an environment variable is not what it takes
            kwargs["connect_timeout"] = _number("connect_timeout", kwargs["connect_timeout"])
            if kwargs["connect_timeout"] is None:
                del kwargs["connect_timeout"]
        super(playhouse_pool.PooledDatabase, self).init(database, **kwargs)
        if any(callable(self.connect_params.get(name)) for name in _LIVE):
            self.connect_params = _LiveParams(self.connect_params)
        if isinstance(seconds := self.connect_params.get("connect_timeout"), int | float) and seconds > 0:
            options["connect_timeout"] = seconds + 0.5  # the driver's own error says more: let it come first
        if self._pool.options.pool_name is None and database and "pool_name" not in options:
            options["pool_name"] = short_name(database)
        self._configure_pool(options)
        was, self._pool_database = self._pool_database, (database, dict(dict.items(self.connect_params)))
        if was is not None and was != self._pool_database:
            self._pool.invalidate_all("init() changed the database")

    def _configure_pool(self, options: Mapping[str, Any]) -> None:
        if options:
            self._pool.configure(self._pool_options(self._pool.options, options))

    @staticmethod
    def _pool_options(base: PoolOptions, changes: Mapping[str, Any]) -> PoolOptions:
        """Apply changes, numbers in strings (a URL, an environment) included."""
        return base.replace(**{name: _number(name, value) for name, value in changes.items()})

    connect_params: Any

    # -- what the pool calls ------------------------------------------------------------------------------------

    def _open_connection(self) -> Any:
        if self.deferred:
            raise peewee.InterfaceError("Error, database must be initialized before opening a connection.")
        return super(playhouse_pool.PooledDatabase, self)._connect()

    def _prepare_connection(self, conn: Any) -> None:
        if self.server_version is None:
            self._set_server_version(conn)
        self._initialize_connection(conn)

    def _forget_connection(self) -> None:
        self._state.reset()

    def _describe_holders(self, conns: list[Any]) -> Mapping[int, Suspect]:
        from peewee_frameworks.holders import describe  # noqa: PLC0415 - nobody needs it before the first leak

        return describe(self._state, conns)

    def _label_of_holder(self, conn: Any) -> str | None:
        from peewee_frameworks.holders import label_of  # noqa: PLC0415 - nobody needs it before the first error

        return label_of(self._state, conn)

    # -- what Peewee calls --------------------------------------------------------------------------------------

    def connect(self, reuse_if_open: bool = False) -> bool:
        """Check a connection out for this thread, greenlet or scope.

        Returns:
            False if one was open already and ``reuse_if_open`` is set.

        Raises:
            peewee.OperationalError: one is open already; or no connection could be had, see `Pool.acquire`.
            peewee.InterfaceError: the database is deferred, call `init` first.
        """
        state = self._state
        if self.deferred:
            raise peewee.InterfaceError("Error, database must be initialized before opening a connection.")
        if not state.closed:
            if reuse_if_open:
                return False
            raise peewee.OperationalError("Connection already opened.")
        try:
            conn = self._connect()
        except Exception:
            state.reset()
            with peewee.__exception_wrapper__:
                raise
        state.set_connection(conn)
        return True

    def _connect(self) -> Any:
        return self._pool.acquire()

    def close(self) -> bool:
        """Check the connection of this thread, greenlet or scope in; say whether there was one.

        Raises:
            peewee.OperationalError: a transaction is open.
            peewee.InterfaceError: the database is deferred.
        """
        state = self._state
        if self.deferred:
            raise peewee.InterfaceError("Error, database must be initialized before opening a connection.")
        if state.closed:
            state.reset()
            return False
        if state.transactions:
            raise peewee.OperationalError("Attempting to close database while transaction is open.")
        try:
            self._close(state.conn)
        finally:
            state.reset()
        return True

    def _close(self, conn: Any, close_conn: bool = False) -> None:
        if close_conn:
            self._pool.discard(conn, "closed by request")
        else:
            self._pool.release(conn)

    def manual_close(self) -> bool | None:
        """Close the connection in use here instead of returning it; ``False`` if there is none.

        Raises:
            peewee.OperationalError: a transaction is open.
        """
        if self.is_closed():
            return False
        self._pool.doom(self._state.conn, "manual_close()")
        self.close()
        return None

    def close_idle(self) -> None:
        """Close the connections that are not in use."""
        self._pool.close_idle()

    def close_stale(self, age: float = 600) -> int:
        """Close connections that were checked out more than ``age`` seconds ago, under their users' hands.

        Returns:
            How many.
        """
        return self._pool.close_held(age, "close_stale()")

    def close_all(self) -> None:
        """Close all connections, those in use by others included. The pool stays open; for the end see `Pool.close`."""
        self.close()
        if isinstance(self._state, State):
            self._state.reap()  # a thread that has ended uses nothing any more
        self._pool.close_idle("close_all()")
        self._pool.close_held()

    def dispose(self) -> None:
        """Forget all connections without closing them."""
        self._state.reset()
        self._pool.forget()

    # -- noticing a lost server ---------------------------------------------------------------------------------

    def _execute_cursor(self, sql: Any, params: Any, **cursor_options: Any) -> Any:
        if self._pool.cut:
            self._refuse_cut()
        try:
            return super()._execute_cursor(sql, params, **cursor_options)
        except BaseException as error:
            self._note_error(error)
            raise

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._note_error(error)
            raise

    def begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin a transaction."""
        with self._noting():
            super().begin(*args, **kwargs)

    def commit(self) -> None:
        """Commit."""
        self._refuse_cut()
        with self._noting():
            super().commit()

    def rollback(self) -> None:
        """Roll back. On a lost connection all is rolled back already, and an error would hide the one that says so."""
        if not is_broken_off(self._state.conn):
            with self._noting():
                super().rollback()

    def _refuse_cut(self) -> None:
        """Refuse to go on with a connection that was taken back and is still open, because its driver must not close it yet."""
        if id(self._state.conn) in self._pool.cut:
            self._explain(None)

    def _note_error(self, error: BaseException) -> None:
        state = self._state
        if state.closed:
            return
        if isinstance(error, Exception):
            self._pool.note_error(state.conn, error)
            self._explain(error)
        else:  # Ctrl-C, a timeout of gevent: the answer may still be under way, and would be the next user's
            self._pool.doom(state.conn, "a statement was interrupted")

    def _explain(self, error: Exception | None) -> None:
        """Raise what the pool has to say about a connection that was closed under its user's hands."""
        explained = self._pool.taken_back(self._state.conn)
        if explained is not None:
            try:
                raise explained from error
            finally:
                del explained  # or it would refer to itself by its traceback, and keep the connection

    # -- what others read from playhouse's pools ----------------------------------------------------------------

    @property
    def _max_connections(self) -> int | None:
        return self._pool.options.max_connections

    @property
    def _stale_timeout(self) -> float | None:
        return self._pool.options.stale_timeout

    @property
    def _wait_timeout(self) -> float | None:
        timeout = self._pool.options.timeout
        return float("inf") if timeout == 0 else timeout

    @property
    def _connections(self) -> list[Any]:
        engine = self._pool.engine
        return [(entry.created, entry.id, entry.conn) for entry in list(engine.idle)]

    @property
    def _in_use(self) -> dict[int, Any]:
        held = self._pool.engine.held.copy()
        return {
            key: playhouse_pool.PoolConnection(entry.created, entry.conn, entry.since) for key, entry in held.items()
        }


class _PooledMySQLDatabase(PooledDatabase):
    def _open_connection(self) -> Any:
        opener: Any = super(playhouse_pool.PooledDatabase, self)._connect
        driver: Any = peewee.mysql
        if (
            not self.deferred
            and opener.__func__ is peewee.MySQLDatabase._connect
            and getattr(driver, "__name__", "") == "pymysql"
        ):
            connection = pymysql_connection_class()
            return connection(database=self.database, autocommit=True, **self.connect_params)
        return super()._open_connection()


class PooledMySQLDatabase(_PooledMySQLDatabase, peewee.MySQLDatabase):
    """MySQL and MariaDB through PyMySQL or mysqlclient, pooled."""


class _PooledPostgresqlDatabase(PooledDatabase):
    def init(self, database: Any, *args: Any, **kwargs: Any) -> None:
        """See `PooledDatabase.init`; libpq is told the pool's default ``connect_timeout``, having none of its own."""
        if "password=" in str(database) and "://" not in str(database):
            raise ConfigurationError(
                "Peewee takes the database for its name, and PostgreSQL would quote it, password included, as one that does "
                "not exist. Use a URL, postgresql://user@host/name, or keywords: PooledPostgresqlDatabase('name', host=…)."
            )
        super().init(database, *args, **kwargs)
        described = f"{database} {self.connect_params.get('dsn', '')} {self.connect_params.get('conninfo', '')}"
        if "connect_timeout" not in described and "connect_timeout" not in self.connect_params:
            self.connect_params["connect_timeout"] = int(self._pool.options.connect_timeout)


class PooledPostgresqlDatabase(_PooledPostgresqlDatabase, peewee.PostgresqlDatabase):
    """PostgreSQL through psycopg or psycopg2, pooled."""


class _PooledSqliteDatabase(PooledDatabase):
    def init(self, database: Any, *args: Any, **kwargs: Any) -> None:
        """See `PooledDatabase.init`; a pooled connection moves between threads, and ``:memory:`` is one that never ages."""
        if kwargs.setdefault("check_same_thread", False):
            raise ConfigurationError(
                "check_same_thread=True binds a connection to one thread, but a pool hands it to others. Remove it."
            )
        limits = {"connect_timeout": kwargs.pop("connect_timeout")} if "connect_timeout" in kwargs else {}
        super().init(database, *args, **kwargs)
        if database is not None and _is_private(str(database)):
            limits.update(max_connections=1, stale_timeout=None, idle_timeout=None)
        self._configure_pool(limits)


class PooledSqliteDatabase(_PooledSqliteDatabase, peewee.SqliteDatabase):
    """SQLite, pooled."""


class _LiveParams(dict[str, Any]):
    """Connect arguments of which some are functions, to be asked again at each connect: rotating credentials."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value() if name in _LIVE and callable(value) else value

    def __iter__(self) -> Iterator[str]:  # makes ``**params`` go through __getitem__
        return iter(list(super().keys()))


def _refuse_typos(arguments: Mapping[str, Any]) -> None:
    """Refuse what is all but the name of an option: the driver would get it, and complain when it first connects."""
    for name in arguments.keys() & ELSEWHERE.keys():
        raise ConfigurationError(f"Unknown option {name}: it is called {ELSEWHERE[name]} here.")
    for name in arguments.keys() - OPTION_NAMES - _ALIKE:
        if meant := nearly(name, OPTION_NAMES):
            raise ConfigurationError(f"Unknown option {name}. Did you mean {meant}?")


def _is_private(database: str) -> bool:
    """Say whether each connection to an SQLite database would have one of its own, which ends with it."""
    if database.startswith("file:"):
        return "cache=shared" not in database and ("mode=memory" in database or database.startswith("file::memory:"))
    return database in ("", ":memory:")


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name in ("pool_name", "on_connect_error", "lifo"):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(f"{name} must be a number, not {value!r}.") from None


def short_name(database: Any) -> str:
    """Name a database, as given to Peewee, without the user, password and options that a connection string may hold."""
    name = str(database)
    if "://" not in name and "=" not in name:
        return name
    return name.partition("?")[0].rpartition("/")[2] if "://" in name else "database"
