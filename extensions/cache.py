"""The response cache: flask-caching over a backend that keeps bytes, by generation.

An entry belongs to one or more groups (``products``, ``product:7``). Each group has a generation, a
random word; an entry carries the words that were read *before* its query ran. A write marks its
groups before it commits and gives them new words afterwards, at the same cost for one entry as for
a million: while a mark stands, a lookup neither serves nor stores an entry, and from then on every
older entry is a miss. The mark of a writer that died expires once its COMMIT can no longer happen.

The door (front/door.py) counts a request and looks up its answer in one call to Redis, if it can
tell from the URL which entry that is.
"""
import contextlib
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, current_app, request
from flask_caching import Cache

from db import Connection
from extensions.cache_backends import (
    BACKENDS,
    BUSY_SECONDS,
    EVERYTHING,
    LEASE_SECONDS,
    Found,
    Known,
)
from extensions.http import compression
from extensions.http.answers import PUBLIC, etag_of, without_flask
from extensions.http.visit import Answer, Visit, visit
from extensions.redis_client import RedisClient

__all__ = ["EVERYTHING", "Found", "Known", "Single", "answer", "cached", "change", "fetch",
           "invalidate", "key_of", "learned", "look_again", "render"]

POLL_SECONDS = 0.005
RECENT = 4096  # entries in a process's own cache of answers that were requested once
RECENT_SIZE = 4096  # bytes; a larger answer goes to Redis after its first request

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
    """Maps URLs that were valid before to the answers they ask for: two thousand at most."""

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
        return Known(key, (key, *self.others), lambda: (self.find(number), ()), route,
                     expensive=False)

    def mount(self, app: Flask, prefix: str) -> None:
        """Register the resources below a prefix with the door."""
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
    """(entry, whether it was a hit, whether it is compressed with ``encoding``).

    An entry is bytes: a line about the answer, then its body. When several requests miss at once,
    one computes it: one per process, or one across all processes for an ``expensive`` answer. An
    error is not cached. ``found`` is the result if the door has looked it up already.
    """
    started = time.perf_counter()
    found = found or look_again(known, encoding, started)
    while found.busy:
        time.sleep(POLL_SECONDS)
        found = look_again(known, encoding, started)
    if found.generation is None:
        entry, encoded = _packed(_made(known), encoding)
        return entry, False, encoded
    if known.expensive or found.entry is not None:
        return _fetch_expensive(known, found, encoding)
    return _fetch_cheap(known, found, encoding)


def look_again(known: Known, encoding: str | None, started: float) -> Found:
    """Look up an answer now. It is ``busy`` for at most BUSY_SECONDS after ``started``, a
    time.perf_counter() value: by then the process that computes it must have died."""
    try:
        found = cache.cache.lookup(known, encoding)
    except RedisClient.Away:
        return Found(None)
    if found.busy and time.perf_counter() - started > BUSY_SECONDS:
        return found._replace(busy=False)
    return found


def _fetch_expensive(known, found, encoding):
    hit, entry, encoded = found.entry is not None, found.entry, found.encoded
    new: dict[str | None, bytes] = {}
    try:
        if not hit:
            entry = new[None] = _made(known)
        if not encoded:
            entry, encoded = _packed(entry, encoding)
            if encoded:
                new[encoding] = entry
    finally:
        if new or not hit:
            with contextlib.suppress(RedisClient.Away):
                cache.cache.store(known, found.generation, new, unlock=known.expensive and not hit)
    return entry, hit, encoded


def _fetch_cheap(known, found, encoding):
    slot, mine = current_app.extensions["cache_recent"].claim(known.key, found.generation)
    entry = slot.fill(lambda: _made(known)) if mine else slot.wait()
    hit = not mine and entry is not None
    entry = entry if entry is not None else _made(known)
    packed, encoded = _packed(entry, encoding)
    new = {None: entry} | ({encoding: packed} if encoded else {})
    if (hit or len(entry) > RECENT_SIZE) and not slot.stored:
        slot.stored, slot.entry = True, slot.entry if hit else None
        with contextlib.suppress(RedisClient.Away):
            cache.cache.store(known, found.generation, new, unlock=False)
    return packed, hit, encoded


def cached(known: Known) -> Response:
    """The response of a Known, which the door knows by its URL from then on."""
    here = visit()
    status, headers, body = answer(here, known)
    if here.known is None and known.expensive:
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
    """Invalidate what a write changes: the last step of its transaction.

    The groups are marked now, and renewed once the transaction is committed or rolled back. While
    Redis is away, the writer's response waits until no stale entry can be served any more: for
    little more than LEASE_SECONDS at most.
    """
    backend, mark = cache.cache, None
    with contextlib.suppress(RedisClient.Away):
        mark = backend.mark(groups)

    def renew(known_outcome):
        if not known_outcome and mark:
            return  # the COMMIT may still happen: the mark has to outlive it
        _renew(backend, mark, groups)
    conn.on_complete.append(renew)


def invalidate(*groups: str) -> None:
    """Make every entry of these groups stale, everywhere, before this returns."""
    _renew(cache.cache, None, groups)


def _renew(backend, mark, groups):
    """Renew groups, or wait until no process can serve their entries from a Redis that is away.

    Wait even if they are marked: a Redis that was restarted has lost the mark.
    """
    try:
        backend.renew(mark, groups)
    except RedisClient.Away:
        if mark:
            backend.unmark_later(mark, groups)
        _outwait(backend, mark, groups)


def _outwait(backend, mark, groups):
    """Wait until the lease expires, or Redis is back and its entries have been invalidated since.

    A reconnect already under way may have invalidated them before the write was committed. Another
    process may reconnect sooner and store what it read before that: so this one renews them, too.
    """
    here = backend.redis
    begun = here.returns_begun
    end = (here.away_since or time.monotonic()) + LEASE_SECONDS + 0.2
    if here.probe():
        end = max(end, time.monotonic() + LEASE_SECONDS)
    while here.wait(end - time.monotonic()):
        if here.returned > begun:
            return
        with contextlib.suppress(RedisClient.Away):
            backend.renew(mark, groups)
            return


def _packed(entry, encoding):
    """(entry, whether it is compressed), if that is asked for and worth it."""
    if encoding is None or len(entry) < compression.MIN_SIZE:
        return entry, False
    head, _, body = entry.partition(b"\n")
    return head + b"\n" + compression.COMPRESS[encoding](body), True


def _made(known):
    """Make the entry of a Known: a line of tag and headers, then the body."""
    text, headers = known.find()
    body = text.encode()
    line = "\t".join([etag_of(body), *(f"{name}:{value}" for name, value in headers)])
    return line.encode() + b"\n" + body
