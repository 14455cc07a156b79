"""Redis as something that may be away: short time-outs, then a pause before it is asked again."""
import functools
import hashlib
import logging
import threading
import time

import redis
from flask import current_app
from redis.backoff import NoBackoff
from redis.retry import Retry

from db import embedded_urls

log = logging.getLogger("shopfront.redis")

TIMEOUT = 0.1  # seconds that one call may take
PAUSE = 1.0  # seconds in which nobody asks after a call failed


@functools.cache
def _digest(source):
    return hashlib.sha1(source.encode()).hexdigest()


class RedisClient:
    """redis-py behind a circuit breaker.

    ``ask(work)`` returns ``work(client)``, or raises Away at once while Redis is known to be away.
    One thread at a time finds out whether it is back.
    """

    class Away(Exception):
        """Redis does not answer. Do without."""

    def __init__(self, url):
        self._url = url
        self._client = None
        self._local = threading.local()
        self._lock = threading.Lock()
        self._away_until = 0.0

    @property
    def away(self):
        return self._away_until > 0

    def ask(self, work):
        if self._away_until:
            with self._lock:
                if time.monotonic() < self._away_until:
                    raise self.Away
                if self._away_until:  # ours to probe; the others go on waiting meanwhile
                    self._away_until = time.monotonic() + PAUSE
        try:
            result = work(self._client or self._connect())
        except redis.RedisError as error:  # one that refuses (MISCONF, NOREPLICAS) is away, too
            if not self._away_until:
                log.warning("Redis is away: %s: %s", type(error).__name__, error)
            self._away_until = time.monotonic() + PAUSE
            raise self.Away from None
        if self._away_until:
            log.warning("Redis is back")
            self._away_until = 0.0
        return result

    def script(self, source, keys, arguments):
        """Run a Lua script: one round trip. Raises Away."""
        words = ["EVALSHA", _digest(source), len(keys), *keys, *arguments]

        def run(redis_):
            try:
                return self._talk(redis_, words)
            except redis.exceptions.NoScriptError:
                return self._talk(redis_, ["EVAL", source, *words[2:]])
        return self.ask(run)

    def _talk(self, redis_, words):
        # A connection a thread, and none of redis-py's way there and back: half of a call's time.
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = redis_.connection_pool.make_connection()
        try:
            connection.send_command(*words)
            return connection.read_response()
        except redis.ConnectionError:
            # What a restart of the server leaves behind; a new connection knows better.
            connection.disconnect()
            connection.send_command(*words)
            return connection.read_response()

    def _connect(self):
        with self._lock:
            if self._client is None:
                self._client = redis.Redis.from_url(
                    self._url() if callable(self._url) else self._url,
                    socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
                    # A connection that the server closed while idle is replaced without a word.
                    retry=Retry(NoBackoff(), 1, supported_errors=(ConnectionResetError,
                                                                  BrokenPipeError)),
                    health_check_interval=0, max_connections=1000, protocol=2,
                )
        return self._client


def init_app(app):
    app.extensions["redis_client"] = RedisClient(
        app.config["REDIS_URL"] or (lambda: embedded_urls(app)[1])
    )


def client():
    """This process's RedisClient."""
    return current_app.extensions["redis_client"]
