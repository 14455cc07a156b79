"""Where cached answers are kept: in Redis, or nowhere.

flask-caching chooses the backend, and our code uses it: ``enter`` counts visits and looks up their
answers, ``lookup`` looks up one, ``store`` stores one, ``mark`` and ``renew`` invalidate groups.
"""
import os
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flask import Flask
from flask_caching.backends.base import BaseCache

from extensions.http import compression
from extensions.http.visit import Visit
from extensions.limits import Limit
from extensions.redis_client import RedisClient, lua

BUSY_SECONDS = 3.0  # how long others wait for the process that computes
GROUP_SECONDS = 86400
# A mark outlives its transaction: PostgreSQL ends one that is idle for a minute, and a COMMIT that
# it has received finishes soon.
MARK_SECONDS = 75
# Every entry is in this group. Its word expires unless a heartbeat or a request extends the lease:
# once no process has reached Redis for LEASE_SECONDS, every entry is stale.
EVERYTHING = "everything"
LEASE_SECONDS = 1.0

ENTER = lua("count", "enter")
STORE = lua("store")
MARK, RENEW = lua("marks", "mark"), lua("marks", "renew")
KEEP = "redis.call('PEXPIRE', KEYS[1], ARGV[1])"


class Known(NamedTuple):
    """Where an answer is kept and how it is made: its key, its groups, ``find``, its route.

    ``find() -> (text, headers)`` uses nothing from the request. An ``expensive`` answer is computed
    by one process for all, and stored after the first request; a cheap one only when it is
    requested again.
    """

    key: str
    groups: tuple
    find: object
    route: str | None = None
    expensive: bool = True


class Found(NamedTuple):
    """The result of a look-up. ``generation`` is None while a write is under way."""

    generation: bytes | None
    entry: bytes | None = None
    encoded: bool = False
    busy: bool = False  # another process computes it

    @property
    def settled(self) -> bool:
        """Whether every visit can share this: the entry is there, or a write is under way."""
        return self.entry is not None or self.generation is None


class RedisBackend(BaseCache):
    """Entries in Redis. Raises RedisClient.Away while there is none."""

    def __init__(self, redis_client: RedisClient, ttl: int) -> None:
        super().__init__(default_timeout=ttl)
        self.redis, self._ttl = redis_client, ttl
        self._to_unmark: deque[tuple[bytes, Iterable[str]]] = deque()
        redis_client.on_beat = self._keep_lease
        redis_client.on_return = self._on_return

    @classmethod
    def factory(cls, app: Flask, config: dict, args: list, kwargs: dict) -> "RedisBackend":
        return cls(app.extensions["redis_client"], config["CACHE_DEFAULT_TIMEOUT"])

    def enter(self, limit: Limit, visits: list[Visit]) -> list[tuple[Sequence, Found | None]]:
        """[((count, ms left), Found or None)] of visits: counted and looked up by one call."""
        calls = []
        for one in visits:
            keys = [limit.key(one)]
            if one.known:
                keys += self._keys(one.known, compression.choose(one.accepts))
            calls.append((keys, self._arguments(one.known, limit)))
        return [(reply[:2], self._found(reply) if len(reply) > 2 else None)
                for reply in self.redis.scripts(ENTER, calls)]

    def lookup(self, known: Known, encoding: str | None) -> Found:
        keys, arguments = self._keys(known, encoding), self._arguments(known)
        return self._found(self.redis.script(ENTER, keys, arguments))

    def store(self, known: Known, generation: bytes, entries: dict, unlock: bool = True) -> None:
        """Store ``{variant or None: bytes}`` under their generation, and release the lock."""
        key = self.redis.key
        keys = [key("lock", known.key)] if unlock else []
        arguments = [self._ttl, int(unlock)]
        for variant, entry in entries.items():
            keys.append(key("entry", known.key, *([variant] if variant else [])))
            arguments.append(generation + b"|" + entry)
        self.redis.script(STORE, keys, arguments)

    def mark(self, groups: Iterable[str]) -> bytes:
        """Serve and store nothing of these groups until ``renew(mark, groups)``."""
        mark = _new_generation()
        try:
            self.redis.script(MARK, self._groups(groups), [mark, MARK_SECONDS * 1000])
        except RedisClient.Away as away:
            if away.asked:
                self.unmark_later(mark, groups)
            raise
        return mark

    def unmark_later(self, mark: bytes, groups: Iterable[str]) -> None:
        """Remember a mark that an unreachable Redis may hold, to remove it once Redis is back."""
        self._to_unmark.append((mark, groups))

    def renew(self, mark: bytes | None, groups: Iterable[str]) -> None:
        self.redis.script(RENEW, self._groups(groups),
                          [mark or "", _new_generation(), GROUP_SECONDS])

    def _groups(self, groups):
        key = self.redis.key
        return [key("group", group) for group in groups]

    def _keys(self, known, encoding):
        key = self.redis.key
        entry = key("entry", known.key)
        return [key("lock", known.key), f"{entry}:{encoding}" if encoding else entry, entry,
                *self._groups(known.groups), key("group", EVERYTHING)]

    def _arguments(self, known, limit=None):
        return [limit.seconds * 1000 if limit else 0, limit.amount if limit else 0,
                _new_generation(), GROUP_SECONDS,
                int(BUSY_SECONDS * 1000) if known and known.expensive else 0,
                int(LEASE_SECONDS * 1000)]

    def _on_return(self):
        """Redis is back: remove those marks, and invalidate all entries, which may be stale."""
        while self._to_unmark:
            one = self._to_unmark.popleft()
            try:
                self.renew(*one)
            except RedisClient.Away:
                self._to_unmark.appendleft(one)
                raise
        self.renew(None, [EVERYTHING])

    def _keep_lease(self):
        self.redis.script(KEEP, [self.redis.key("group", EVERYTHING)],
                           [int(LEASE_SECONDS * 1000)])

    def _found(self, reply):
        _, _, generation, state, *entry = reply
        if entry:
            return Found(generation, entry[0], state == 1)
        return Found(generation or None, busy=state < 0)


class NoBackend(BaseCache):
    """The cache turned off."""

    @classmethod
    def factory(cls, app: Flask, config: dict, args: list, kwargs: dict) -> "NoBackend":
        return cls()

    def enter(self, limit: Limit, visits: list[Visit]) -> list[tuple[Sequence, Found | None]]:
        return [(count, None) for count in limit.count_all(visits)]

    def lookup(self, known: Known, encoding: str | None) -> Found:
        raise RedisClient.Away

    def mark(self, groups: Iterable[str]) -> None:
        return None

    def renew(self, mark: None, groups: Iterable[str]) -> None:
        pass


BACKENDS = {"RedisCache": RedisBackend, "NullCache": NoBackend}


def _new_generation():
    return os.urandom(8).hex().encode()
