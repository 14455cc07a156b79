"""Redis as something that may be away: short time-outs, and nobody waits for it twice."""
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import redis
from flask import Flask, current_app
from redis.backoff import NoBackoff
from redis.retry import Retry

from db import embedded_urls

log = logging.getLogger("shopfront.redis")

TIMEOUT = 0.1  # seconds that one call may take
BEAT = 0.25  # seconds between two heartbeats
_HISTORY = re.compile(rb"master_replid:(\w+)")
_ANOTHER = b"another"  # than any server's


def lua(*names: str) -> str:
    """The source of a script: files of ``lua/``, one behind the other."""
    folder = pathlib.Path(__file__).with_name("lua")
    return "".join((folder / f"{name}.lua").read_text() for name in names)


@functools.cache
def _digest(source):
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()  # as EVALSHA has it


class RedisClient:
    """redis-py behind a circuit breaker.

    A failed call opens the breaker: from then on every call raises Away at once. A background
    thread checks four times a second whether Redis is back; then it calls ``on_return`` and closes
    the breaker. While all is well the same thread calls ``on_beat``, which keeps its connection
    open: a Redis that has reached its client limit still serves the clients it has.

    A server whose replication history differs from its predecessor's is trusted only after such a
    return: a replica that took over may have missed some writes.
    """

    class Away(Exception):
        """Redis does not answer. ``asked``: it may have executed the call all the same."""

        def __init__(self, asked: bool = False) -> None:
            super().__init__()
            self.asked = asked

    def __init__(self, url: str | Callable[[], str], prefix: str) -> None:
        self._url = url
        self._tag = f"{{{prefix}}}:"  # one hash slot: a script's keys must share one in a cluster
        self._client: Any = None  # a redis.Redis from the first call on
        self._pid: int | None = None
        self._beater: int | None = None
        self._history: bytes | None = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._here = threading.Event()
        self._here.set()
        self.away_since: float | None = None
        self.calls, self.seconds = 0, 0.0  # round trips, and what they took
        self.returns_begun = self.returned = 0  # returns tried; the last that succeeded
        self.on_beat = self.on_return = lambda: None

    @property
    def away(self) -> bool:
        return self.away_since is not None

    def key(self, *parts: str) -> str:
        """A key of this shop."""
        return self._tag + ":".join(parts)

    def ask(self, work: Callable[[redis.Redis], Any]) -> Any:
        """``work(redis)``. Raises Away."""
        if self._pid != os.getpid():
            self._start()
        if self.away_since is not None and threading.get_ident() != self._beater:
            raise self.Away
        try:
            return work(self._client)
        # A refusal (MISCONF, NOREPLICAS) counts as away, and so does a lack of file descriptors.
        except (redis.RedisError, OSError) as error:
            self._leave(error)
            raise self.Away(asked=True) from None

    def script(self, source: str, keys: list[str], arguments: list) -> Any:
        """Run a Lua script: one round trip. Raises Away."""
        return self.scripts(source, [(keys, arguments)])[0]

    def scripts(self, source: str, calls: list[tuple[list[str], list]]) -> list:
        """Run a Lua script for each ``(keys, arguments)``, all in one round trip. Raises Away."""
        commands = [["EVALSHA", _digest(source), len(keys), *keys, *arguments]
                    for keys, arguments in calls]

        def run(redis_):
            replies = self._talk(redis_, commands)
            if any(isinstance(reply, redis.exceptions.NoScriptError) for reply in replies):
                self._talk(redis_, [["SCRIPT", "LOAD", source]])
                replies = self._talk(redis_, commands)
            for reply in replies:
                if isinstance(reply, redis.RedisError):
                    raise reply
            return replies
        return self.ask(run)

    def close(self) -> None:
        """End the heartbeat, for good."""
        self._closed.set()

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds`` until Redis is back. Returns whether it is."""
        return self._here.wait(max(0, seconds))

    def probe(self) -> bool:
        """Whether Redis accepts a new client and a write, even while the breaker is open."""
        pool = self._client.connection_pool
        stranger = pool.connection_kwargs | {"redis_connect_func": None}
        with contextlib.suppress(redis.RedisError, OSError), contextlib.ExitStack() as stack:
            connection = pool.connection_class(**stranger)
            stack.callback(connection.disconnect)
            connection.send_command("SET", self.key("probe"), 1, "PX", 1000)
            return connection.read_response() is not None
        return False

    def _leave(self, error):
        with self._lock:
            if self.away_since is None:
                self._here.clear()
                self.away_since = time.monotonic()
                log.warning("Redis is away: %s: %s", type(error).__name__, error)

    def _talk(self, redis_, commands):
        # One connection per thread, without redis-py's command layer, which takes half the time.
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = redis_.connection_pool.make_connection()
            connection.history = None
        elif connection.history != self._history:
            connection.disconnect()
        packed, began = connection.pack_commands(commands), time.perf_counter()
        for last in (False, True):
            try:
                connection.send_packed_command(packed)
                replies = [_reply(connection) for _ in commands]
                with self._lock:
                    self.calls, self.seconds = (self.calls + 1,
                                                self.seconds + time.perf_counter() - began)
                return replies
            except redis.RedisError as error:
                connection.disconnect()  # replies that are still to come belong to nobody
                # A restarted server leaves dead connections behind: try a new one.
                if last or not isinstance(error, redis.ConnectionError):
                    raise
        return None

    def _start(self):
        """What each process has of its own: connections, and the thread that beats."""
        with self._lock:
            if self._pid == os.getpid():
                return
            self._client = redis.Redis.from_url(
                self._url() if callable(self._url) else self._url,
                socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
                # A connection that the server closed while idle is replaced silently.
                retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionResetError,
                                                              BrokenPipeError)),
                health_check_interval=0, max_connections=1000, protocol=2,
                redis_connect_func=self._check_history,
            )
            self._local = threading.local()
            threading.Thread(target=self._beat, daemon=True, name="redis-beat").start()
            self._pid = os.getpid()

    def _check_history(self, connection):
        """Check that a new connection's server shares its predecessor's replication history.

        If not, all existing connections are invalid, and the heartbeat accepts the new server.
        """
        connection.on_connect()
        history = _history_of(connection)
        with self._lock:
            if self._history is None or (self.away and threading.get_ident() == self._beater):
                self._history = history
            elif history != self._history:
                self._history = _ANOTHER
                raise redis.ConnectionError("Another server has taken over.")
        connection.history = history

    def _beat(self):
        self._beater = threading.get_ident()
        while not self._closed.wait(BEAT):
            try:
                if self.away_since is None:
                    self.on_beat()
                else:
                    self._return()
            except self.Away:
                pass
            except Exception:
                log.exception("the Redis heartbeat failed")

    def _return(self):
        """Close the breaker if Redis answers, and only after ``on_return`` has been heard."""
        self.returns_begun += 1
        self.script("return 1", [], [])
        self.on_return()
        away = time.monotonic() - self.away_since  # type: ignore[operator] # it was away
        log.warning("Redis is back after %.1f s", away)
        self.returned = self.returns_begun
        self.away_since = None
        self._here.set()


def _history_of(connection):
    """The id that a server shares with replicas that missed nothing; empty if it doesn't tell."""
    connection.send_command("INFO", "replication", check_health=False)
    try:
        found = _HISTORY.search(connection.read_response())
    except redis.ResponseError:
        found = None
    return found[1] if found else b""


def _reply(connection):
    try:
        return connection.read_response(disconnect_on_error=False)
    except redis.ResponseError as refused:
        return refused


def init_app(app: Flask) -> None:
    app.extensions["redis_client"] = RedisClient(
        app.config["REDIS_URL"] or (lambda: embedded_urls(app)[1]), app.config["REDIS_PREFIX"]
    )


def client() -> RedisClient:
    """This process's RedisClient."""
    return current_app.extensions["redis_client"]
