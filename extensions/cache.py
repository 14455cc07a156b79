"""The response cache: flask-caching over a backend that keeps bytes, by generation.

An entry belongs to one or more groups (``products``, ``product:7``). Each group has a generation, a
random word; an entry carries the words that were read *before* its query ran. A write gives its
groups new words, which makes every older entry of theirs a miss, at the same cost for one entry as
for a million, and leaves a slow reader's old answer stillborn.

Finding an entry, its generations and, on a miss, the right to compute it is one call to Redis.
"""
import contextlib
import hashlib
import json
import os
import threading
import time

from flask import current_app
from flask_caching import Cache
from flask_caching.backends.base import BaseCache

from extensions import compression
from extensions.answers import PUBLIC, etag_of, tagged
from extensions.redis_client import RedisClient, client

BUSY_SECONDS = 3.0  # how long the others wait for the one who computes
POLL_SECONDS = 0.005
GROUP_SECONDS = 86400
EVERYTHING = "everything"  # the group of every entry in Redis

# KEYS: entry, its compressed form, lock, groups... ARGV: a new word, the lock's life in ms, the
# word's in seconds
LOOKUP = """
local groups = {}
for i = 4, #KEYS do groups[i - 3] = KEYS[i] end
local words = redis.call('MGET', unpack(groups))
for i, word in ipairs(words) do
    if not word then
        redis.call('SET', groups[i], ARGV[1], 'EX', ARGV[3])
        words[i] = ARGV[1]
    end
end
local generation = table.concat(words, ',')
local found = redis.call('MGET', KEYS[2], KEYS[1])
for i, entry in ipairs(found) do
    if entry and string.sub(entry, 1, #generation + 1) == generation .. '|' then
        return {generation, entry, i}
    end
end
local mine = redis.call('SET', KEYS[3], '1', 'NX', 'PX', ARGV[2])
return {generation, false, mine and 1 or 0}
"""

# KEYS: lock or '', entries... ARGV: their life in seconds, their contents...
STORE = """
for i = 2, #KEYS do redis.call('SET', KEYS[i], ARGV[i], 'EX', ARGV[1]) end
if KEYS[1] ~= '' then redis.call('DEL', KEYS[1]) end
"""

INVALIDATE = """
for _, group in ipairs(KEYS) do redis.call('SET', group, ARGV[1], 'EX', ARGV[2]) end
"""


class RedisBackend(BaseCache):
    """Entries in Redis. Raises RedisClient.Away while there is none."""

    def __init__(self, ttl=300, prefix="cache:"):
        super().__init__(default_timeout=ttl)
        self._ttl, self._prefix = ttl, prefix
        self._missed = self._made_good = None
        self.catching_up = threading.Lock()

    @classmethod
    def factory(cls, app, config, args, kwargs):
        return cls(config["CACHE_DEFAULT_TIMEOUT"])

    def lookup(self, key, variant, groups):
        """(generation, entry or None, whether it's the variant, whether to compute it here)."""
        self.catch_up()
        prefix = self._prefix
        keys = [f"{prefix}entry:{key}", f"{prefix}entry:{key}:{variant}", f"{prefix}lock:{key}",
                *(f"{prefix}group:{group}" for group in (*groups, EVERYTHING))]
        arguments = [_word(), int(BUSY_SECONDS * 1000), GROUP_SECONDS]
        generation, entry, number = self._ask(LOOKUP, keys, arguments)
        if entry:
            return generation, entry[len(generation) + 1:], number == 1, False
        return generation, None, False, number == 1

    def store(self, key, generation, entries, unlock=True):
        """Keep ``{variant or None: bytes}`` under their generation, and let the others go on."""
        keys = [f"{self._prefix}lock:{key}" if unlock else ""]
        arguments = [self._ttl]
        for variant, entry in entries.items():
            keys.append(f"{self._prefix}entry:{key}" + (f":{variant}" if variant else ""))
            arguments.append(generation + b"|" + entry)
        client().script(STORE, keys, arguments)

    def invalidate(self, groups):
        keys = [f"{self._prefix}group:{group}" for group in groups]
        self._ask(INVALIDATE, keys, [_word(), GROUP_SECONDS])

    @property
    def behind(self):
        """Whether Redis was away, and may hold what was changed meanwhile."""
        return self._missed is not self._made_good

    def catch_up(self):
        """After an outage make stale all that was kept before it. Raises Away during it."""
        if self.behind:
            missed = self._missed
            self.invalidate([EVERYTHING])
            self._made_good = missed

    def _ask(self, script, keys, arguments):
        try:
            return client().script(script, keys, arguments)
        except RedisClient.Away:
            self._missed = object()
            raise


class MemoryBackend(BaseCache):
    """Entries in this process: right for one process only."""

    LARGEST = 2000

    def __init__(self, ttl=300):
        super().__init__(default_timeout=ttl)
        self._ttl, self._lock = ttl, threading.Lock()
        self._words, self._entries, self._busy = {}, {}, {}

    @classmethod
    def factory(cls, app, config, args, kwargs):
        return cls(config["CACHE_DEFAULT_TIMEOUT"])

    def lookup(self, key, variant, groups):
        now = time.monotonic()
        with self._lock:
            generation = b",".join(self._words.setdefault(g, _word()) for g in groups)
            for name in ((key, variant), (key, None)):
                stored, ends, entry = self._entries.get(name, (None, 0, None))
                if stored == generation and now < ends:
                    return generation, entry, name[1] is not None, False
            mine = self._busy.get(key, 0) < now
            if mine:
                self._busy[key] = now + BUSY_SECONDS
            return generation, None, False, mine

    def store(self, key, generation, entries, unlock=True):
        ends = time.monotonic() + self._ttl
        with self._lock:
            for variant, entry in entries.items():
                self._entries.pop((key, variant), None)
                self._entries[key, variant] = (generation, ends, entry)
            while len(self._entries) > self.LARGEST:
                del self._entries[next(iter(self._entries))]
            if unlock:
                self._busy.pop(key, None)

    def invalidate(self, groups):
        with self._lock:
            for group in groups:
                self._words[group] = _word()


class NoBackend(BaseCache):
    """The cache turned off."""

    @classmethod
    def factory(cls, app, config, args, kwargs):
        return cls()

    def lookup(self, key, variant, groups):
        raise RedisClient.Away

    def store(self, key, generation, entries, unlock=True):
        pass

    def invalidate(self, groups):
        pass


BACKENDS = {"RedisCache": RedisBackend, "SimpleCache": MemoryBackend, "NullCache": NoBackend}
cache = Cache()


def init_app(app):
    backend = BACKENDS[app.config["CACHE_TYPE"]]
    cache.init_app(app, config={
        "CACHE_TYPE": f"{backend.__module__}.{backend.__name__}",
        "CACHE_DEFAULT_TIMEOUT": app.config["CACHE_TTL"],
        "CACHE_NO_NULL_WARNING": True,
    })


def key_of(resource, query):
    """A key for a validated query: the same for every way to spell it."""
    canonical = json.dumps(query, sort_keys=True, default=str)
    return f"{resource}:{hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()}"


def fetch(key, groups, compute, encoding=None):
    """(entry, whether it was found, whether it is compressed with ``encoding``).

    An entry is bytes: a line about the answer, then its body. Of several who miss at once, on this
    node or another, one runs ``compute``. What ``compute`` raises is not kept.
    """
    backend = cache.cache
    deadline = time.monotonic() + BUSY_SECONDS
    try:
        while True:
            generation, entry, encoded, mine = backend.lookup(key, encoding, groups)
            if entry is not None or mine or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    except RedisClient.Away:
        return compute(), False, False
    hit, new = entry is not None, {}
    try:
        if not hit:
            entry = new[None] = compute()
        if encoding and not encoded and len(entry) >= compression.MIN_SIZE:
            head, body = entry.split(b"\n", 1)
            entry = new[encoding] = head + b"\n" + compression.COMPRESS[encoding](body)
            encoded = True
    finally:
        if new or not hit:
            with contextlib.suppress(RedisClient.Away):
                backend.store(key, generation, new, unlock=not hit)
    return entry, hit, encoded


def cached(key, groups, compute):
    """The response at ``key``: from the cache, or made by ``compute() -> (text, headers)``."""
    encoding = compression.wanted()
    entry, hit, encoded = fetch(key, groups, lambda: _entry(*compute()), encoding)
    head, body = entry.split(b"\n", 1)
    tag, *headers = head.decode().split("\t")
    response = tagged(body, tag, PUBLIC)
    response.headers["Vary"] = "Accept-Encoding"
    if encoded and response.status_code == 200:
        response.headers["Content-Encoding"] = encoding
    for header in headers:
        name, _, value = header.partition(":")
        response.headers[name] = value
    response.headers["X-Cache"] = "hit" if hit else "miss"
    return response


def invalidate(*groups):
    """Make every entry of these groups stale, everywhere, before this returns.

    While Redis is away nobody is served from it either. Whoever finds it back first makes all stale
    that it kept; a thread sees to it for nodes that have not noticed.
    """
    try:
        cache.cache.invalidate(groups)
    except RedisClient.Away:
        app = current_app._get_current_object()
        threading.Thread(target=_catch_up_later, args=(app,), daemon=True).start()


def _catch_up_later(app):
    with app.app_context():
        backend = cache.cache
        # One thread is enough; of two that think so, the other looks again when it lets go.
        while backend.behind and backend.catching_up.acquire(blocking=False):
            while backend.behind:
                time.sleep(0.25)
                with contextlib.suppress(RedisClient.Away):
                    backend.catch_up()
            backend.catching_up.release()


def _entry(text, headers=()):
    """A line of tag and headers, then the body."""
    body = text.encode()
    line = "\t".join([etag_of(body), *(f"{name}:{value}" for name, value in headers)])
    return line.encode() + b"\n" + body


def _word():
    return os.urandom(8).hex().encode()
