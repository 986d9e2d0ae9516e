"""Is this process patched for gevent, and was it early enough?

Nothing here imports gevent: without it, every question is answered by one look into ``sys.modules``.

`diagnose` finds what is wrong, `check` acts on it: it mends what can be mended, warns once about what only costs
concurrency, and refuses what would freeze the process. It runs in `init_app` and whenever a database connects for the first
time after something was patched.

Whether something was made before the patch is read from types: gevent replaces the names in the standard library's modules,
not the objects that exist already, and `gevent.monkey.get_original` still gives the native types.
"""

from __future__ import annotations

import functools
import logging
import socket
import sys
import threading
from _queue import SimpleQueue as NativeQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import peewee

from .errors import GeventNotPatched
from .names import display_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from .state import State

__all__ = ["Finding", "check", "diagnose", "repair_psycopg"]

logger = logging.getLogger("peewee_frameworks.gevent")

FIRST_LINES = "from gevent import monkey\nmonkey.patch_all()"
"""What belongs at the top of the first module that is loaded."""

Level = Literal["note", "serial", "unsafe", "deadlock"]


class Finding(NamedTuple):
    """One thing that is wrong with how gevent was set up.

    `code` names it; `text` says what it is, what it does and the remedy. `level` says what it does to this database:
    "note": nothing, because this package makes up for it; "serial": greenlets are served one after the other;
    "unsafe": greenlets share what they must not share; "deadlock": the process can freeze.
    """

    code: str
    level: Level
    text: str


class _Patches:
    """What gevent has patched so far."""

    def __init__(self, monkey: Any) -> None:
        self._monkey = monkey
        self.threads = self._patched("threading")
        self.sockets = self._patched("socket")
        self.select = self._patched("select")

    def _patched(self, module: str) -> bool:
        return self._monkey is not None and bool(self._monkey.is_module_patched(module))

    def native(self, module: str, name: str) -> Any:
        return self._monkey.get_original(module, name)


def unpatched_hub() -> Any:
    """Return gevent's hub if code here runs in it, or must, while `threading` is not patched; else None.

    Sleeping on a lock of `threading` would stop that hub, and a connection made in another thread could belong to that
    thread's hub: whoever waits must use gevent's own locks, and background work must be greenlets.
    """
    hubs = sys.modules.get("gevent._hub_local")
    if hubs is None:
        return None
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        if monkey.is_module_patched("threading"):
            return None
        if monkey.is_module_patched("socket"):  # each socket belongs to the hub of the thread that made it
            return hubs.get_hub()
    hub = hubs.get_hub_if_exists()
    if hub is None:
        return None
    current = sys.modules["greenlet"].getcurrent()
    while current is not None:
        if current is hub:
            return hub
        current = current.parent
    return None


def make_lock() -> Any:
    """Make a lock that the caller can sleep on without stopping a hub."""
    if unpatched_hub() is None:
        return threading.Lock()
    from gevent.thread import LockType  # noqa: PLC0415 - there is a hub, so gevent is imported

    return LockType()


def make_queue() -> Any:
    """Make a ``queue.SimpleQueue`` between the caller and what `start_thread` starts."""
    return _idle_queue_class()() if _starts_greenlets() else NativeQueue()


@functools.cache
def _idle_queue_class() -> Any:
    from gevent import Timeout  # noqa: PLC0415 - as above
    from gevent.queue import Empty, SimpleQueue  # noqa: PLC0415

    queue: Any = SimpleQueue

    class IdleQueue(queue):
        """A queue whose reader does not keep the hub running by its time limit.

        What idles behind a pool is no work: ``gevent.wait()``, ``hub.join()`` and the end of a script need not wait for it.
        """

        def get(self, block: bool = True, timeout: float | None = None) -> Any:
            if not block or timeout is None:
                return super().get(block)
            limit = Timeout(timeout, ref=False)
            limit.start()
            try:
                return super().get()
            except Timeout as struck:
                if struck is not limit:
                    raise
                raise Empty from None
            finally:
                limit.close()

    return IdleQueue


def start_thread(function: Callable[[], object], name: str) -> None:
    """Run a function aside, in a daemon thread or a greenlet, without a switch to another greenlet.

    A patched ``Thread.start`` would be one: it waits until the thread runs, and a greenlet that is killed there leaves its
    caller's work half done.
    """
    if not _starts_greenlets():
        threading.Thread(target=function, name=name, daemon=True).start()
        return
    from gevent import spawn  # noqa: PLC0415 - as above

    spawn(function)


def _starts_greenlets() -> bool:
    """Return whether what runs aside is a greenlet. The patch of `queue` is one of its own and says nothing about it."""
    monkey = sys.modules.get("gevent.monkey")
    return (monkey is not None and bool(monkey.is_module_patched("threading"))) or unpatched_hub() is not None


def diagnose(database: Any = None) -> list[Finding]:
    """Find what is wrong with how gevent was set up, in this process and for one database.

    Args:
        database: a Peewee database or proxy; None: only what concerns the process.

    Returns: the findings, the most basic first; none where gevent is not used.
    """
    if "gevent" not in sys.modules:
        return []
    while isinstance(database, peewee.Proxy):
        database = database.obj
    patches = _Patches(sys.modules.get("gevent.monkey"))
    if not (patches.threads or patches.sockets or patches.select or unpatched_hub() is not None):
        return []  # imported by somebody, and not used here
    findings = _missing_patches(patches, database)
    if patches.threads:
        findings += _late_patch(patches, database)
    if database is not None:
        findings += _driver_findings(patches, database)
    return findings


def check(database: Any, *, strict: bool = False, repair: bool = False) -> list[Finding]:
    """Diagnose, mend what can be mended, warn once about the rest, or refuse.

    Mended are the locks that a stock ``playhouse.pool`` made before the patch, and connections from before the patch: they
    are closed, and opened anew when they are needed.

    Args:
        database: a Peewee database or proxy.
        strict: raise whatever is found, even what is mended.
        repair: also make a psycopg that was imported before the patch wait cooperatively; see `repair_psycopg`.

    Returns: what was found, as it was before the repairs.

    Raises: `GeventNotPatched` where the process could freeze, or share connections; with `strict` for every finding.
    """
    findings = diagnose(database)
    if not findings:
        return findings
    while isinstance(database, peewee.Proxy):
        database = database.obj
    fatal = [finding for finding in findings if strict or finding.level in ("deadlock", "unsafe")]
    if fatal:
        raise _refusal(display_name(database), " ".join(finding.text for finding in fatal))
    codes = {finding.code for finding in findings}
    if "database-before-patch" in codes:
        _renew_locks(database)
    if "connection-before-patch" in codes:
        _close_old_connections(database)
    if repair and "psycopg-before-patch" in codes:
        repair_psycopg()
        findings = [finding for finding in findings if finding.code != "psycopg-before-patch"]
    for finding in findings:
        _warn_once(database, finding)
    return findings


def would_freeze(name: str) -> GeventNotPatched:
    """Make the error for a wait on a stock pool that would stop the hub, with whoever is to give a connection back."""
    return _refusal(
        name, "all connections are in use, and to wait on a lock that is not patched would stop all greenlets."
    )


def _refusal(name: str, text: str) -> GeventNotPatched:
    return GeventNotPatched(
        f"{name}: {text} Put these two lines first, before any other import, in the first module that is loaded (wsgi.py, or "
        f"gunicorn.conf.py with --preload):\n\n{FIRST_LINES}\n"
    )


_warned: set[tuple[str, str]] = set()


def _warn_once(database: Any, finding: Finding) -> None:
    name = display_name(database)
    if (name, finding.code) not in _warned:
        _warned.add((name, finding.code))
        level = logging.INFO if finding.level == "note" else logging.WARNING
        logger.log(
            level, "%s: %s [%s]", name, finding.text, finding.code, extra={"database": name, "code": finding.code}
        )


def watch(state: State) -> None:
    """Check a database when it connects, if anything was patched since it last did. For `guarded.py`, on each connect.

    Raises: what `check` raises.
    """
    world = (threading.Lock, socket.socket, unpatched_hub())
    if world != state.world:
        check(state.database)
        state.world = world


def repair_psycopg() -> None:
    """Make a psycopg 3 that was imported before the patch wait cooperatively: with ``poll``, which gevent has patched.

    psycopg chooses how to wait when it is imported, and ``import peewee`` imports it.
    """
    waiting: Any = sys.modules.get("psycopg.waiting")
    if waiting is not None and hasattr(waiting, "wait_poll"):
        waiting.wait = waiting.wait_poll
        if hasattr(waiting, "_ready_poll"):  # not in each version
            waiting._ready = waiting._ready_poll


# -- findings -----------------------------------------------------------------------------------------------------------


def _missing_patches(patches: _Patches, database: Any) -> list[Finding]:
    if patches.threads:
        if patches.sockets:
            return []
        text = "gevent has patched threading but not socket: each query stops all greenlets. Call monkey.patch_all()."
        return [Finding("sockets-not-patched", "serial", text)]
    # Without patched threads, the locks of a stock pool stop the hub, or do not hold greenlets apart at all.
    yields = database is not None and _yields(patches, database)
    if _is_ours(database):
        level: Level = "note" if yields else "serial"
    else:
        level = "deadlock" if yields else "serial"
    if patches.sockets or patches.select:
        text = (
            "gevent has patched socket or select but not threading (patch_all(thread=False), or single patches): locks "
            "stop all greenlets at once. Call monkey.patch_all() without arguments."
        )
        return [Finding("threads-not-patched", level, text)]
    text = "this runs in a greenlet, but nothing is patched: each query, and each wait, stops all greenlets."
    return [Finding("hub-not-patched", level, text)]


def _late_patch(patches: _Patches, database: Any) -> list[Finding]:
    from .state import State  # noqa: PLC0415 - state.py builds on this module

    findings: list[Finding] = []
    installed = database is None or isinstance(database._state, State)
    if issubclass(peewee._ConnectionLocal, patches.native("_thread", "_local")):
        findings.append(
            Finding(
                "peewee-before-patch",
                "note" if installed else "unsafe",
                "Peewee was imported before gevent's patch: on its own it gives all greenlets of a thread one connection "
                '("Connection already opened").',
            )
        )
    native_lock, native_rlock = patches.native("_thread", "LockType"), patches.native("threading", "_CRLock")
    if isinstance(getattr(database, "_lock", None), native_lock) or isinstance(_pool_lock(database), native_rlock):
        findings.append(
            Finding(
                "database-before-patch",
                "note" if installed and _pool_lock_is_free(database) else "deadlock",
                "the database was created before gevent's patch, so its locks stop all greenlets at once.",
            )
        )
    if patches.sockets and any(_is_old(patches, conn) for conn in _connections(database)):
        findings.append(
            Finding(
                "connection-before-patch",
                "note" if _connections(database, idle=True) else "serial",
                "a connection was opened before gevent's patch: its socket blocks, so each query on it stops all greenlets.",
            )
        )
    return findings


def _driver_findings(patches: _Patches, database: Any) -> list[Finding]:
    driver = driver_of(database)
    if driver == "psycopg" and patches.select and not _psycopg_yields():
        text = (
            "psycopg was imported before gevent's patch (`import peewee` imports it) and waits in C: each query stops all "
            "greenlets. Patch before the import, or call peewee_frameworks.gevent.repair_psycopg() after it."
        )
        return [Finding("psycopg-before-patch", "serial", text)]
    if driver == "psycopg2" and not _psycopg2_yields():
        text = "psycopg2 waits in C: each query stops all greenlets. Call psycogreen.gevent.patch_psycopg(), or use psycopg 3."
        return [Finding("psycopg2-without-psycogreen", "serial", text)]
    if driver in _BLOCKING:
        text = f"{driver} is written in C and blocks: each query stops all greenlets. Use PyMySQL under gevent."
        return [Finding("driver-blocks-hub", "serial", text)]
    return []


# -- drivers ------------------------------------------------------------------------------------------------------------

_BLOCKING = frozenset({"MySQLdb", "mariadb", "mysql.connector"})


def driver_of(database: Any) -> str:
    """Name the module of the driver that a Peewee database uses."""
    if isinstance(database, peewee.PostgresqlDatabase):
        adapter = getattr(database, "_adapter", None)
        return "psycopg" if isinstance(adapter, peewee.Psycopg3Adapter) else "psycopg2"
    if not isinstance(database, peewee.MySQLDatabase):
        return "sqlite3"
    names = {cls.__name__ for cls in type(database).__mro__}
    if "MariaDBConnectorDatabase" in names:
        return "mariadb"
    if "MySQLConnectorDatabase" in names:
        # The C extension is the default where it is installed.
        pure = database.connect_params.get("use_pure") or "_mysql_connector" not in sys.modules
        return "mysql.connector (pure)" if pure else "mysql.connector"
    return str(getattr(getattr(peewee, "mysql", None), "__name__", ""))


def _yields(patches: _Patches, database: Any) -> bool:
    """Return whether other greenlets run while this database's driver waits."""
    driver = driver_of(database)
    if driver == "psycopg":
        return patches.select and _psycopg_yields()
    if driver == "psycopg2":
        return _psycopg2_yields()
    return patches.sockets and driver not in _BLOCKING and driver != "sqlite3"


def _psycopg_yields() -> bool:
    waiting = sys.modules.get("psycopg.waiting")
    return waiting is None or waiting.wait is not getattr(waiting, "wait_c", None)


def _psycopg2_yields() -> bool:
    extensions = sys.modules.get("psycopg2.extensions")
    return extensions is None or extensions.get_wait_callback() is not None


# -- databases ----------------------------------------------------------------------------------------------------------


def _is_ours(database: Any) -> bool:
    return getattr(database, "pool", None) is not None


def _pool_lock(database: Any) -> Any:
    return getattr(database, "_pool_lock", None)  # playhouse.pool's


def _pool_lock_is_free(database: Any) -> bool:
    lock = _pool_lock(database)
    if lock is None:
        return True
    if lock._is_owned() or not lock.acquire(blocking=False):
        return False
    lock.release()
    return True


def _renew_locks(database: Any) -> None:
    """Give a stock pool the locks it would have made after the patch; nobody holds the old ones."""
    if _pool_lock(database) is not None:
        database._pool_lock = threading.RLock()
        database._pool_available = threading.Condition(database._pool_lock)


def _connections(database: Any, *, idle: bool = False) -> list[Any]:
    if database is None:
        return []
    found = [entry[-1] for entry in getattr(database, "_connections", ())]
    if not idle:
        found += [entry.connection for entry in getattr(database, "_in_use", {}).values()]
        found.append(database._state.conn)
    return found


def _is_old(patches: _Patches, conn: Any) -> bool:
    """Return whether a connection of a driver that is written in Python has a native socket."""
    return isinstance(getattr(conn, "_sock", None), patches.native("socket", "socket"))


def _close_old_connections(database: Any) -> None:
    pool = getattr(database, "pool", None)
    if pool is not None:
        pool.invalidate_all("opened before gevent's patch")
    elif hasattr(database, "close_idle"):
        database.close_idle()
