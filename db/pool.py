"""Connections: a psycopg pool a process, opened on first use, never shared across a fork."""
import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import psycopg
from flask import g, has_request_context
from psycopg.abc import Buffer, Params
from psycopg.adapt import Loader
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolClosed

CHECKOUT_SECONDS = 2.0  # how long a request waits for a connection before it is answered 503
CONNECT_SECONDS = 2
# Prepared statements are planned once. By default PostgreSQL would replan each sale, since an array
# of one product is shorter than its estimate; planning took longer than the sale.
BEGIN = "BEGIN; SET LOCAL plan_cache_mode = force_generic_plan"
GRACE_SECONDS = 1.0  # what a statement may take beyond its time-out before its socket is cut
Callback = Callable[[bool], None]  # called after a block, with whether its outcome is known


class Connection(psycopg.Connection):
    """psycopg's Connection, with the functions to call after its ``with`` block."""

    on_complete: list[Callback]


class Database:
    """A pool of connections to one database.

    ``url`` is a libpq URL or a function that returns one. Every connection uses UTC. Statements
    time out after ``statement_timeout_ms`` (0: never), idle transactions after a minute. With
    ``sessionless`` no connection relies on session state: for a pooler in transaction mode.
    """

    def __init__(self, url: str | Callable[[], str], size: int, statement_timeout_ms: int,
                 sessionless: bool = False) -> None:
        self._url, self._size, self._timeout_ms = url, size, statement_timeout_ms
        self._sessionless = sessionless
        self._pool: ConnectionPool[Connection] | None = None
        self._pid: int | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._deadlines: dict[Connection, float] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection in autocommit mode, with no BEGIN: for a single statement."""
        pool = self._open()
        conn = pool.getconn(timeout=CHECKOUT_SECONDS)
        if self._timeout_ms:
            self._deadlines[conn] = time.monotonic() + self._timeout_ms / 1000 + GRACE_SECONDS
        try:
            yield conn
        finally:
            self._deadlines.pop(conn, None)
            pool.putconn(conn)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Connection]:
        """A connection whose ``with`` block is a transaction: committed at its end or rolled back.

        Functions that the block appends to ``conn.on_complete`` are called after it with True, or
        with False if the outcome is unknown, because the connection was lost during COMMIT.
        """
        with completion_callbacks() as callbacks, self.reading() as conn:
            conn.on_complete = callbacks
            if isinstance(conn, Sessionless):
                conn.begin()
            else:
                conn.execute(BEGIN, prepare=False)
            try:
                yield conn
                if has_request_context():
                    g.may_have_written = True  # from here on the request can't be run again
            except BaseException:
                with contextlib.suppress(psycopg.Error):
                    conn.rollback()
                raise
            conn.commit()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection whose ``with`` block reads one state of the database, by COPY as well."""
        with self.reading() as conn:
            begin = conn.begin if isinstance(conn, Sessionless) else conn.execute
            begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                yield conn
            finally:
                if conn.pgconn.transaction_status == TransactionStatus.INTRANS:
                    conn.rollback()
                else:
                    conn.close()  # which ends a COPY that nobody reads to its end

    def without_timeout(self) -> "Database":
        """A second, single-connection pool to the same database, for slow work."""
        return Database(self._url, 1, 0, self._sessionless)

    def drain(self) -> None:
        """Replace every idle connection: the server they lead to is gone."""
        if self._pool is not None:
            self._pool.drain()

    def close(self) -> None:
        """Close every connection, for good: asking for one raises PoolClosed from then on."""
        with self._lock:
            self._closed = True
            if self._pool is not None and self._pid == os.getpid():
                self._pool.close()
            self._pool = None

    def stats(self) -> dict[str, int]:
        """psycopg_pool's own counters, empty before the first use."""
        return self._pool.get_stats() if self._pool is not None else {}

    def _open(self) -> ConnectionPool[Connection]:
        if self._pool is not None and self._pid == os.getpid():
            return self._pool
        with self._lock:
            if self._closed:
                raise PoolClosed("the database is closed")
            if self._pool is None or self._pid != os.getpid():
                kind = Sessionless if self._sessionless else Connection
                self._pool = ConnectionPool(
                    self._url() if callable(self._url) else self._url, connection_class=kind,
                    min_size=0, max_size=self._size, max_idle=120, max_lifetime=3600,
                    # A failed attempt is given up soon and repeated by the next request: the pool's
                    # own back-off would go on sleeping after the server is back.
                    reconnect_timeout=0.5, timeout=CHECKOUT_SECONDS,
                    kwargs=connect_options(self._timeout_ms, self._sessionless)
                    | {"autocommit": True}, open=True,
                )
                self._pid = os.getpid()
                self._deadlines = {}
                if self._timeout_ms:
                    threading.Thread(target=self._cut_overdue, daemon=True).start()
        return self._pool

    def _cut_overdue(self):
        """Cut the socket of a statement that the server should have ended by itself.

        PostgreSQL's statement_timeout works only while PostgreSQL does. When it is frozen or cut
        off, this is what gives the waiting thread back.
        """
        while True:
            time.sleep(0.25)
            now = time.monotonic()
            for conn, deadline in list(self._deadlines.items()):
                if now > deadline and self._deadlines.pop(conn, 0):
                    with contextlib.suppress(OSError, psycopg.Error):
                        handle = socket.socket(fileno=os.dup(conn.fileno()))
                        with handle:
                            handle.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def completion_callbacks() -> Iterator[list[Callback]]:
    """A list of functions that are called after the block, with whether its outcome is known.

    It isn't when the connection is lost during COMMIT.
    """
    callbacks: list[Callback] = []
    known = True
    try:
        yield callbacks
    except psycopg.Error as error:
        known = not lost(error)
        raise
    finally:
        for callback in callbacks:
            callback(known)


class Sessionless(Connection):
    """A connection that relies on no session state, since a pooler may switch sessions.

    Its settings are sent with each transaction, and with each autocommit statement, in the same
    round trip. Nothing is prepared. Statements that can't run inside a transaction, such as
    VACUUM, use a plain ``psycopg.Cursor``, with the server's own settings.
    """

    settings: str

    @classmethod
    def connect(  # type: ignore[override] # it sets some arguments itself
        cls, conninfo: str = "", *, settings: dict, **kwargs: Any
    ) -> "Sessionless":
        """Connect; ``settings`` are ``{name: value}`` of PostgreSQL's own."""
        conn = super().connect(conninfo, options="", prepare_threshold=None,
                               cursor_factory=SettingsCursor, **kwargs)
        conn.settings = json.dumps(settings)
        # psycopg reads times by the session's zone and date style, which another may have set.
        conn.adapters.register_loader("timestamptz", UtcLoader)
        return conn

    def apply_settings(self) -> None:
        """Set them until the transaction ends."""
        psycopg.Cursor(self).execute(
            "SELECT set_config(key, value, true) FROM json_each_text(%s::json)", [self.settings]
        )

    def begin(self, statement: str = "BEGIN") -> None:
        with self.pipeline():
            psycopg.Cursor(self).execute(statement)
            self.apply_settings()

    @contextlib.contextmanager
    def transaction(self, savepoint_name: str | None = None,
                    force_rollback: bool = False) -> Iterator[Any]:
        if self.pgconn.transaction_status != TransactionStatus.IDLE:
            with super().transaction(savepoint_name, force_rollback) as savepoint:
                yield savepoint
            return
        self.begin()
        try:
            yield
        except BaseException:
            with contextlib.suppress(psycopg.Error):
                self.rollback()
            raise
        if force_rollback:
            self.rollback()
        else:
            self.commit()


class SettingsCursor(psycopg.Cursor):
    """The cursor of a Sessionless connection."""

    def execute(self, query: Any, params: Params | None = None, **kwargs: Any) -> "SettingsCursor":
        conn: Any = self.connection  # a Sessionless
        if conn.pgconn.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, params, **kwargs)
        # Up to the pipeline's end, all that is sent is one transaction.
        with conn.pipeline():
            conn.apply_settings()
            return super().execute(query, params, **kwargs)


class UtcLoader(Loader):
    """Loads timestamptz from text in ISO style and UTC."""

    def load(self, data: Buffer) -> datetime:
        return datetime.fromisoformat(bytes(data).decode())


def connect_options(statement_timeout_ms: int = 0, sessionless: bool = False) -> dict[str, Any]:
    """Keyword arguments for connecting that every connection of the shop wants."""
    settings = {
        "timezone": "UTC", "datestyle": "ISO", "jit": "off", "lock_timeout": "5s",
        "idle_in_transaction_session_timeout": "60s", "statement_timeout": statement_timeout_ms,
    }
    if statement_timeout_ms:
        # Requests share the cores: parallel workers for one take from the others.
        settings["max_parallel_workers_per_gather"] = 0
    given = {"settings": settings} if sessionless else {
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items())}
    return given | {"connect_timeout": CONNECT_SECONDS, "application_name": "shopfront"}


class PoolerError(Exception):
    """A pooler stands between us and PostgreSQL, and DATABASE_POOLER doesn't say so."""


def refuse_pooler(name: str, url: str) -> None:
    """Raise PoolerError unless a connection to ``url``, the setting ``name``, keeps its session.

    Two sessions are marked when they are opened: a pooler drops the marks or mixes them up.
    An unreachable server is not reported here.
    """
    marks = [secrets.token_hex(8), secrets.token_hex(8)]
    asked = [*marks, marks[0]]
    try:
        with contextlib.ExitStack() as stack:
            sessions = {mark: stack.enter_context(_marked_session(url, mark)) for mark in marks}
            kept = [sessions[mark].execute("SELECT current_setting('shopfront.session', true)")
                    .fetchone()[0] for mark in asked] == asked
    except psycopg.OperationalError as error:
        kept = "startup parameter" not in str(error)  # where a pooler refuses `options`
    if not kept:
        raise PoolerError(f"{name} leads to a connection pooler that does not keep a session for "
                          "each client: set DATABASE_POOLER=transaction.")


def _marked_session(url, mark):
    kwargs = connect_options()
    kwargs["options"] += f" -c shopfront.session={mark}"
    return psycopg.connect(url, autocommit=True, **kwargs)


def lost(error: BaseException) -> bool:
    """Whether an error means that the connection is gone, not that the statement was wrong."""
    if not isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return False
    # 57P01..03: the server is shutting down or starting. 08…: a pooler says that it lost its own
    # connection. No SQLSTATE: nobody answered at all.
    return error.sqlstate is None or error.sqlstate.startswith(("08", "57P01", "57P02", "57P03"))
