"""Rate limits: flask-limiter's window and storage, asked with one round trip to Redis.

flask-limiter works out for each request which limits apply, at a higher cost than counting. Here
each limit is counted where it is declared: one for all of /api, in the door, and stricter ones by
the decorators ``@login`` and ``@registration``. While Redis is away, each process counts on its
own.
"""
import functools
import time
from collections.abc import Callable
from typing import Any

from flask import Flask, current_app
from flask_limiter import Limiter
from limits import parse
from limits.storage import MemoryStorage, Storage

from extensions.http import metrics
from extensions.http.errors import Problem
from extensions.http.visit import Pairs, Visit, visit
from extensions.redis_client import RedisClient, client, lua

HIT = lua("count", "hit")


class Counters(Storage):
    """A storage for ``limits`` whose one round trip brings the count and the time left."""

    STORAGE_SCHEME = ["shopfront"]

    def __init__(self, uri: str | None = None, **options: Any) -> None:
        super().__init__(uri, **options)
        self._memory = MemoryStorage()

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        return (RedisClient.Away,)

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        try:
            counted = client().script(HIT, [client().key(key)], [expiry * 1000])
        except RedisClient.Away:
            counted = self.incr_here(key, expiry)
        visit().counted = counted
        return counted[0]

    def incr_here(self, key: str, expiry: int) -> tuple[int, float]:
        """(count, milliseconds left) in this process, for as long as Redis is away."""
        count = self._memory.incr(key, expiry)
        return count, max(0, self._memory.get_expiry(key) - time.time()) * 1000

    def get(self, key: str) -> int:
        return visit().counted[0]

    def get_expiry(self, key: str) -> float:
        return time.time() + visit().counted[1] / 1000

    def check(self) -> bool:
        return True

    def reset(self) -> None:
        raise NotImplementedError

    def clear(self, key: str) -> None:
        raise NotImplementedError


limiter = Limiter(lambda: visit().address, storage_uri="shopfront://")


class Limit:
    """One limit: so many requests of an address in a window of time."""

    def __init__(self, name: str, text: str, redis_client: RedisClient) -> None:
        self.name, self.item, self._redis = name, parse(text), redis_client
        self.amount, self.seconds = self.item.amount, self.item.get_expiry()
        self.policy = f'"{name}";q={self.amount};w={self.seconds}'

    def count(self, visit: Visit) -> None:
        """Count a visit, with a call of its own. Raises 429 where the limit is used up."""
        limiter.limiter.hit(self.item, self.name, visit.address)
        self.note(visit, *visit.counted)

    def key(self, visit: Visit) -> str:
        """Where a visit is counted."""
        return self._redis.key(self.item.key_for(self.name, visit.address))

    def count_all(self, visits: list[Visit]) -> list:
        """[(count, milliseconds left)] of visits, with one call to Redis."""
        return self._redis.scripts(HIT, [([self.key(v)], [self.seconds * 1000]) for v in visits])

    def count_here(self, visit: Visit) -> tuple[int, float]:
        """(count, milliseconds left) in this process, for as long as Redis is away."""
        storage: Any = limiter.storage  # a Counters
        return storage.incr_here(self.item.key_for(self.name, visit.address), self.seconds)

    def note(self, visit: Visit, count: int, left: float) -> None:
        """Remember what was counted, for the headers. Raises 429 where the limit is used up."""
        state = State(self, max(0, self.amount - count), left / 1000)
        visit.limits.append(state)
        if count > self.amount:
            metrics.LIMITED.labels(self.name).inc()
            raise Problem("rate_limited", headers={"Retry-After": str(max(1, state.wait))})


class State:
    """What is left of a limit, for how many whole seconds."""

    __slots__ = ("ends", "left", "limit", "wait")

    def __init__(self, limit: Limit, left: int, seconds: float) -> None:
        self.limit, self.left = limit, left
        self.wait = int(seconds + 0.999)
        self.ends = int(time.time() + seconds + 0.999)


def headers(states: list[State]) -> Pairs:
    """What is left: RateLimit (draft-ietf-httpapi-ratelimit-headers), and the older X- headers for
    whichever limit is tightest."""
    tightest = states[0] if len(states) == 1 else min(states, key=lambda state: state.left)
    return [
        ("RateLimit-Policy", ", ".join([s.limit.policy for s in states])),
        ("RateLimit", ", ".join([f'"{s.limit.name}";r={s.left};t={s.wait}' for s in states])),
        ("X-RateLimit-Limit", str(tightest.limit.amount)),
        ("X-RateLimit-Remaining", str(tightest.left)),
        ("X-RateLimit-Reset", str(tightest.ends)),
    ]


SETTINGS = {"api": "RATE_LIMIT", "login": "LOGIN_RATE_LIMIT", "registration": "REGISTER_RATE_LIMIT"}


def init_app(app: Flask) -> None:
    # Registered beforehand, so that flask-limiter takes the app as bound and adds no hooks.
    app.extensions.setdefault("limiter", set()).add(limiter)
    limiter.init_app(app)
    app.extensions["limits"] = {
        name: Limit(name, app.config[setting], app.extensions["redis_client"])
        for name, setting in SETTINGS.items()
    }


def _limited(name, view):
    @functools.wraps(view)
    def wrapper(*args, **kwargs):
        current_app.extensions["limits"][name].count(visit())
        return view(*args, **kwargs)
    return wrapper


def login(view: Callable) -> Callable:
    """The stricter limit of logins, refreshes and passwords."""
    return _limited("login", view)


def registration(view: Callable) -> Callable:
    """The stricter limit of registrations."""
    return _limited("registration", view)
