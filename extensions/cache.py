"""The response cache: flask-caching over a backend that keeps bytes, by generation.

An entry belongs to one or more groups (``products``, ``product:7``). Each group has a generation, a
random word; an entry carries the words that were read *before* its query ran. A write marks its
groups before it is stored and gives them new words afterwards, at the same cost for one entry as
for a million: while a mark stands nothing is served or kept, and every older entry is a miss from
then on. A mark whose writer died runs out by itself, when its COMMIT can't happen any more.

The door (front/door.py) counts a request and looks its answer up with one call to Redis, where it
knows by the URL which entry that is.
"""
import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from flask import Flask, Response, current_app, request
from flask_caching import Cache
from flask_caching.backends.base import BaseCache

from db import Connection
from extensions.http import compression
from extensions.http.answers import PUBLIC, etag_of, without_flask
from extensions.http.visit import Answer, Visit, visit
from extensions.limits import COUNT, Limit
from extensions.redis_client import RedisClient

BUSY_SECONDS = 3.0  # how long others wait for the process that computes
POLL_SECONDS = 0.005
GROUP_SECONDS = 86400
# PostgreSQL ends a transaction that has been idle for a minute; a COMMIT that it got is over soon.
MARK_SECONDS = 75
# Every entry is in this group, whose word dies unless a heartbeat or a request renews it. So what
# Redis holds is stale once nobody has reached it for that long.
EVERYTHING = "everything"
LEASE_SECONDS = 1.0
RECENT = 4096  # answers that were asked for once, kept by a process, each of at most
RECENT_SIZE = 4096  # bytes; a larger one is kept for all at once

# Counts a visit, and looks up what it asks for.
# KEYS: the count; then, where an entry is asked for: lock, compressed form, entry, groups...
# ARGV: window in ms (0: not counted), limit, a new word, its life in s, the lock's life in ms (0:
# no lock), the lease in ms
# Returns count, time left; then generation ('' while a group is marked), what was found (1 or 2,
# 0: compute it, -1: somebody does), the entry
ENTER = "local count, left, at = 0, 0, 1\nif ARGV[1] ~= '0' then" + COUNT.replace(
    "local count", "count").replace("local left", "left").replace("\n", "\n    ") + """
    if count > tonumber(ARGV[2]) then return {count, left} end
    at = 2
end
if not KEYS[at] then return {count, left} end
local words = redis.call('MGET', unpack(KEYS, at + 3))
for i, word in ipairs(words) do
    local group = KEYS[at + 2 + i]
    if not word then
        word = ARGV[3]
        redis.call('SET', group, word, 'EX', ARGV[4])
        words[i] = word
    elseif string.byte(word) == 33 then
        return {count, left, '', 0}
    end
end
redis.call('PEXPIRE', KEYS[#KEYS], ARGV[6])
local generation = table.concat(words, ',')
for i, entry in ipairs(redis.call('MGET', KEYS[at + 1], KEYS[at + 2])) do
    if entry and string.sub(entry, 1, #generation + 1) == generation .. '|' then
        return {count, left, generation, i, string.sub(entry, #generation + 2)}
    end
end
if ARGV[5] == '0' or redis.call('SET', KEYS[at], '1', 'NX', 'PX', ARGV[5]) then
    return {count, left, generation, 0}
end
return {count, left, generation, -1}
"""

# KEYS: lock or an entry, entries... ARGV: their life in seconds, whether the first is a lock,
# their contents...
STORE = """
local at = 1
if ARGV[2] == '1' then redis.call('DEL', KEYS[1]) at = 2 end
for i = at, #KEYS do redis.call('SET', KEYS[i], ARGV[i - at + 3], 'EX', ARGV[1]) end
"""

# A marked group is '!' and its writers, each with the time in ms at which its mark runs out.
MARKS = """
local time = redis.call('TIME')
local now, writer, life = time[1] * 1000 + math.floor(time[2] / 1000), ARGV[1], tonumber(ARGV[2])
for i, word in ipairs(redis.call('MGET', unpack(KEYS))) do
    local marks, last = '', 0
    if word and string.byte(word) == 33 then
        for other, ends in string.gmatch(word, '(%w+)=(%d+);') do
            ends = tonumber(ends)
            if ends > now and other ~= writer then
                marks, last = marks .. string.format('%s=%.0f;', other, ends), math.max(last, ends)
            end
        end
    end
"""
# KEYS: groups... ARGV: the writer, the mark's life in ms
MARK = MARKS + """
    marks = marks .. string.format('%s=%.0f;', writer, now + life)
    redis.call('SET', KEYS[i], '!' .. marks, 'PX', math.max(life, last - now))
end
"""
# KEYS: groups... ARGV: the writer, 0, a new word, its life in seconds
RENEW = MARKS + """
    if marks == '' then
        redis.call('SET', KEYS[i], ARGV[3], 'EX', ARGV[4])
    else
        redis.call('SET', KEYS[i], '!' .. marks, 'PX', last - now)
    end
end
"""
KEEP = "redis.call('PEXPIRE', KEYS[1], ARGV[1])"


class Known(NamedTuple):
    """Where an answer is kept and how it is made: its key, its groups, ``find``, its route.

    ``find() -> (text, headers)`` takes nothing from the request. A dear answer is made by one
    process of all, and kept after the first request; a cheap one only when it is asked for again.
    """

    key: str
    groups: tuple
    find: object
    route: str | None = None
    dear: bool = True


class Found(NamedTuple):
    """The result of a look-up. ``generation`` is None while a write is under way."""

    generation: bytes | None
    entry: bytes | None = None
    encoded: bool = False
    busy: bool = False  # another process computes it

    @property
    def settled(self) -> bool:
        """Whether it holds for every visit: the entry is there, or a write is under way."""
        return self.entry is not None or self.generation is None


class RedisBackend(BaseCache):
    """Entries in Redis. Raises RedisClient.Away while there is none."""

    def __init__(self, redis_client: RedisClient, ttl: int) -> None:
        super().__init__(default_timeout=ttl)
        self.redis, self._ttl = redis_client, ttl
        self._forsaken: deque[tuple[bytes, Iterable[str]]] = deque()
        redis_client.on_beat = self._keep_lease
        redis_client.on_return = self._begin_anew

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
                self.forsake(mark, groups)
            raise
        return mark

    def forsake(self, mark: bytes, groups: Iterable[str]) -> None:
        """Have a mark that may stand in a Redis out of reach removed once that is back."""
        self._forsaken.append((mark, groups))

    def renew(self, mark: bytes | None, groups: Iterable[str]) -> None:
        self.redis.script(RENEW, self._groups(groups), _renewal(mark or ""))

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
                int(BUSY_SECONDS * 1000) if known and known.dear else 0, int(LEASE_SECONDS * 1000)]

    def _begin_anew(self):
        """Redis is back: its entries may be stale, and its locks belong to nobody."""
        while self._forsaken:
            one = self._forsaken.popleft()
            try:
                self.renew(*one)
            except RedisClient.Away:
                self._forsaken.appendleft(one)
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


class MemoryBackend(BaseCache):
    """Entries in this process: correct only where there is no other."""

    LARGEST = 2000

    def __init__(self, ttl: int = 300) -> None:
        super().__init__(default_timeout=ttl)
        self._ttl, self._lock = ttl, threading.Lock()
        self._words: dict[str, bytes] = {}
        self._entries: dict[tuple, tuple] = {}  # (key, encoding): (generation, its end, entry)
        self._busy: dict[str, float] = {}
        self._marks: Counter[str] = Counter()

    @classmethod
    def factory(cls, app: Flask, config: dict, args: list, kwargs: dict) -> "MemoryBackend":
        return cls(config["CACHE_DEFAULT_TIMEOUT"])

    def enter(self, limit: Limit, visits: list[Visit]) -> list[tuple[Sequence, Found | None]]:
        return [
            (count, self.lookup(one.known, compression.choose(one.accepts)) if one.known else None)
            for one, count in zip(visits, limit.count_all(visits), strict=True)
        ]

    def lookup(self, known: Known, encoding: str | None) -> Found:
        now, key = time.monotonic(), known.key
        with self._lock:
            if any(self._marks[group] for group in known.groups):
                return Found(None)
            generation = b",".join(
                self._words.setdefault(group, _new_generation()) for group in known.groups)
            for name in ((key, encoding), (key, None)):
                stored, ends, entry = self._entries.get(name, (None, 0, None))
                if stored == generation and now < ends:
                    return Found(generation, entry, name[1] is not None)
            busy = known.dear and self._busy.get(key, 0) > now
            if known.dear and not busy:
                self._busy[key] = now + BUSY_SECONDS
            return Found(generation, busy=busy)

    def store(self, known: Known, generation: bytes, entries: dict, unlock: bool = True) -> None:
        ends = time.monotonic() + self._ttl
        with self._lock:
            for variant, entry in entries.items():
                self._entries.pop((known.key, variant), None)
                self._entries[known.key, variant] = (generation, ends, entry)
            while len(self._entries) > self.LARGEST:
                del self._entries[next(iter(self._entries))]
            if unlock:
                self._busy.pop(known.key, None)

    def mark(self, groups: Iterable[str]) -> bool:
        with self._lock:
            self._marks.update(groups)
        return True

    def renew(self, mark: bool | None, groups: Iterable[str]) -> None:
        with self._lock:
            for group in groups:
                self._words[group] = _new_generation()
                if mark and self._marks[group] > 1:
                    self._marks[group] -= 1
                elif mark:
                    del self._marks[group]


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


BACKENDS = {"RedisCache": RedisBackend, "SimpleCache": MemoryBackend, "NullCache": NoBackend}
cache: Any = Cache()  # whose ``cache`` is one of the backends


class Recent:
    """What this process has computed of late, and what it is computing now.

    An answer that is asked for once stays here; one that is asked for again goes to Redis. Its
    generation tells whether one is still true.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Slot] = OrderedDict()
        self._lock = threading.Lock()

    def claim(self, key: str, generation: bytes) -> tuple["Slot", bool]:
        """(slot, whether it is the caller's to fill) of a key and generation."""
        with self._lock:
            slot = self._kept.get(key)
            if slot is not None and slot.generation == generation and not slot.failed:
                self._kept.move_to_end(key)
                return slot, False
            slot = self._kept[key] = Slot(generation)
            if len(self._kept) > RECENT:
                self._kept.popitem(last=False)
            return slot, True


class Slot:
    """An answer that one thread fills and others wait for."""

    __slots__ = ("done", "entry", "failed", "generation", "stored")
    entry: bytes | None
    done: threading.Event | None

    def __init__(self, generation: bytes) -> None:
        self.generation, self.entry, self.done = generation, None, threading.Event()
        self.failed = self.stored = False

    def fill(self, compute: Callable[[], bytes]) -> bytes:
        try:
            self.entry = compute()
            return self.entry
        finally:
            self.failed = self.entry is None
            self.done.set()  # type: ignore[union-attr] # it is filled once
            self.done = None

    def wait(self) -> bytes | None:
        """The answer, or None if it doesn't come."""
        if done := self.done:
            done.wait(BUSY_SECONDS)
        return self.entry


class Learned:
    """Which answers the URLs that were valid before ask for: the last two thousand."""

    LARGEST = 2048

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Known] = {}
        self.singles: dict[str, Callable] = {}  # by the beginning of a path, its resources by id

    def of(self, visit: Visit) -> Known | None:
        if visit.method not in ("GET", "HEAD"):
            return None
        path, query = visit.url
        if not query:
            start, _, number = path.rpartition("/")
            single = self.singles.get(start)
            if single and number.isdecimal() and number.isascii() and number[0] != "0" \
                    and len(number) < 19:
                return single(number)
        return self._known.get(visit.url)

    def learn(self, visit: Visit, known: Known, route: str) -> None:
        if len(self._known) >= self.LARGEST:
            self._known.clear()
        self._known[visit.url] = known._replace(route=route)


class Single:
    """Public resources at ``<path>/<id>``: each in a cache group of its own, and in ``others``.

    ``find(id)`` is a resource's JSON, or raises a Problem. Such an answer needs nothing else,
    so the door gives it without Flask.
    """

    def __init__(self, name: str, path: str, find: Callable[[int | str], str],
                 *others: str) -> None:
        self.name, self.path, self.find, self.others = name, path, find, others

    def known(self, number: int | str, route: str | None = None) -> Known:
        key = f"{self.name}:{number}"
        return Known(key, (key, *self.others), lambda: (self.find(number), ()), route, dear=False)

    def mount(self, app: Flask, prefix: str) -> None:
        """Have the door know the resources below a prefix."""
        start, routes = f"{prefix}{self.path}", app.url_map.iter_rules()
        route = next(rule.rule for rule in routes if rule.rule.startswith(f"{start}/<id:"))
        learned(app).singles[start] = lambda number: self.known(number, route)


def init_app(app: Flask) -> None:
    backend = BACKENDS[app.config["CACHE_TYPE"]]
    cache.init_app(app, config={
        "CACHE_TYPE": f"{backend.__module__}.{backend.__name__}",
        "CACHE_DEFAULT_TIMEOUT": app.config["CACHE_TTL"],
        "CACHE_NO_NULL_WARNING": True,
    })
    app.extensions["cache_learned"] = Learned()
    app.extensions["cache_recent"] = Recent()


def learned(app: Flask) -> Learned:
    return app.extensions["cache_learned"]


def key_of(resource: str, query: dict) -> str:
    """A key for a validated query: equal for equal queries, however they were written."""
    canonical = json.dumps(query, sort_keys=True, default=str)
    return f"{resource}:{hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()}"


def fetch(known: Known, encoding: str | None = None,
          found: Found | None = None) -> tuple[bytes, bool, bool]:
    """(entry, whether it was found, whether it is compressed with ``encoding``).

    An entry is bytes: a line about the answer, then its body. Of several that miss at once one
    makes it: one of this process, and for a dear answer one of all. An error is not kept.
    ``found`` is what the door has looked up already.
    """
    started = time.perf_counter()
    found = found or look_again(known, encoding, started)
    while found.busy:
        time.sleep(POLL_SECONDS)
        found = look_again(known, encoding, started)
    if found.generation is None:
        return _made(known), False, False
    if known.dear or found.entry is not None:
        return _fetch_dear(known, found, encoding)
    return _fetch_cheap(known, found, encoding)


def look_again(known: Known, encoding: str | None, started: float) -> Found:
    """Look an answer up, now. ``busy`` for BUSY_SECONDS from ``started`` on at most, on
    time.perf_counter's clock: by then the process that computes it must have died."""
    try:
        found = cache.cache.lookup(known, encoding)
    except RedisClient.Away:
        return Found(None)
    if found.busy and time.perf_counter() - started > BUSY_SECONDS:
        return found._replace(busy=False)
    return found


def _fetch_dear(known, found, encoding):
    hit, entry, encoded = found.entry is not None, found.entry, found.encoded
    new: dict[str | None, bytes] = {}
    try:
        if not hit:
            entry = new[None] = _made(known)
        if encoding and not encoded and len(entry) >= compression.MIN_SIZE:
            entry = new[encoding] = _compressed(entry, encoding)
            encoded = True
    finally:
        if new or not hit:
            with contextlib.suppress(RedisClient.Away):
                cache.cache.store(known, found.generation, new, unlock=known.dear and not hit)
    return entry, hit, encoded


def _fetch_cheap(known, found, encoding):
    slot, mine = current_app.extensions["cache_recent"].claim(known.key, found.generation)
    entry = slot.fill(lambda: _made(known)) if mine else slot.wait()
    hit = not mine and entry is not None
    new = {None: entry if entry is not None else _made(known)}
    encoded = encoding is not None and len(new[None]) >= compression.MIN_SIZE
    if encoded:
        new[encoding] = _compressed(new[None], encoding)
    if (hit or len(new[None]) > RECENT_SIZE) and not slot.stored:
        slot.stored, slot.entry = True, slot.entry if hit else None
        with contextlib.suppress(RedisClient.Away):
            cache.cache.store(known, found.generation, new, unlock=False)
    return new[encoding if encoded else None], hit, encoded


def cached(known: Known) -> Response:
    """The response of a Known, which the door knows by its URL from then on."""
    here = visit()
    status, headers, body = answer(here, known)
    if here.known is None and known.dear:
        learned(current_app).learn(here, known, str(request.url_rule))
    return Response(body, status, headers=headers)


def answer(visit: Visit, known: Known) -> Answer:
    """The answer of a Known, for a visit: from the cache, or made."""
    encoding = compression.choose(visit.accepts)
    found = visit.found if visit.known and visit.known.key == known.key else None
    entry, hit, encoded = fetch(known, encoding, found)
    return render(visit, entry, encoding if encoded else None, hit)


def render(visit: Visit, entry: bytes, encoding: str | None, hit: bool) -> Answer:
    """The answer of an entry for a visit: 304 where it has the tag (RFC 9110, 13)."""
    head, _, body = entry.partition(b"\n")
    tag, *more = head.decode().split("\t")
    headers = [("Cache-Control", PUBLIC), ("Vary", "Accept-Encoding"),
               ("X-Cache", "hit" if hit else "miss")]
    for header in more:
        name, _, value = header.partition(":")
        headers.append((name, value))
    return without_flask(visit, body, headers, tag, encoding)


def change(conn: Connection, *groups: str) -> None:
    """Make stale what a write changes: the last step of its transaction.

    The groups are marked now, and renewed once the transaction is stored or undone. While Redis is
    away the writer's answer waits until no entry of its can be served any more: for at most
    LEASE_SECONDS from the moment at which it went away.
    """
    backend, mark = cache.cache, None
    with contextlib.suppress(RedisClient.Away):
        mark = backend.mark(groups)

    def renew(known_outcome):
        if not known_outcome and mark:
            return  # the COMMIT may still happen: the mark has to outlive it
        _renew(backend, mark, groups)
    conn.after.append(renew)


def invalidate(*groups: str) -> None:
    """Make every entry of these groups stale, everywhere, before this returns."""
    _renew(cache.cache, None, groups)


def _renew(backend, mark, groups):
    """Renew groups, or wait until nobody can be served from a Redis that is away.

    Marked groups, too: a Redis that was restarted has lost the mark.
    """
    try:
        backend.renew(mark, groups)
    except RedisClient.Away:
        if mark:
            backend.forsake(mark, groups)
        _outwait(backend, mark, groups)


def _outwait(backend, mark, groups):
    """Wait until the lease has run out, or Redis is back and its entries were made stale since.

    A return that was already under way may have done that before the write was stored. And another
    process may be back sooner, and keep what it read before: so this one tries as well.
    """
    here = backend.redis
    begun = here.returns_begun
    end = (here.away_since or time.monotonic()) + LEASE_SECONDS + 0.2
    if here.answers():
        end = max(end, time.monotonic() + LEASE_SECONDS)
    while here.wait(end - time.monotonic()):
        if here.returned > begun:
            return
        with contextlib.suppress(RedisClient.Away):
            backend.renew(mark, groups)
            return


def _compressed(entry, encoding):
    head, _, body = entry.partition(b"\n")
    return head + b"\n" + compression.COMPRESS[encoding](body)


def _made(known):
    """Make the entry of a Known: a line of tag and headers, then the body."""
    text, headers = known.find()
    body = text.encode()
    line = "\t".join([etag_of(body), *(f"{name}:{value}" for name, value in headers)])
    return line.encode() + b"\n" + body


def _renewal(mark=""):
    return [mark, 0, _new_generation(), GROUP_SECONDS]


def _new_generation():
    return os.urandom(8).hex().encode()
