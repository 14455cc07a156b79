"""Rate limits: flask-limiter's window and storage, asked with one round trip to Redis.

flask-limiter resolves anew for each request which limits apply, which costs more than the limit
itself. Here a limit is counted where it is named: one for all of /api, and stricter ones by the
decorators ``@login`` and ``@registration``. While Redis is away each process counts for itself.
"""
import functools
import time

from flask import current_app, g, request
from flask_limiter import Limiter
from limits import parse
from limits.storage import MemoryStorage, Storage

from extensions.errors import Problem
from extensions.headers import add_header
from extensions.redis_client import RedisClient, client

# Count and remaining life in one answer. A key without an end, however it came to be, gets one.
COUNT = """
local count = redis.call('INCRBY', KEYS[1], ARGV[1])
local left = redis.call('PTTL', KEYS[1])
if left < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    left = tonumber(ARGV[2])
end
return {count, left}
"""


class OneRoundTrip(Storage):
    """A storage for ``limits`` that asks Redis once and remembers the answer for the headers."""

    STORAGE_SCHEME = ["shopfront"]

    def __init__(self, uri=None, **options):
        super().__init__(uri, **options)
        self._memory = MemoryStorage()

    @property
    def base_exceptions(self):
        return (RedisClient.Away,)

    def incr(self, key, expiry, amount=1):
        try:
            count, left = client().script(COUNT, [key], [amount, expiry * 1000])
            ends = time.time() + left / 1000
        except RedisClient.Away:
            count = self._memory.incr(key, expiry, amount)
            ends = self._memory.get_expiry(key)
        g.limit_state = (count, ends)
        return count

    def get(self, key):
        return g.limit_state[0]

    def get_expiry(self, key):
        return g.limit_state[1]

    def check(self):
        return True

    def reset(self):
        raise NotImplementedError

    def clear(self, key):
        raise NotImplementedError


def address():
    """The client's address: the peer's, or what TRUSTED_PROXIES makes of it."""
    return request.remote_addr or "unknown"


limiter = Limiter(address, storage_uri="shopfront://")
SETTINGS = {"api": "RATE_LIMIT", "login": "LOGIN_RATE_LIMIT", "registration": "REGISTER_RATE_LIMIT"}


def init_app(app):
    limiter.init_app(app)
    app.before_request_funcs[None].remove(limiter._check_request_limit)
    app.after_request_funcs[None].pop()
    app.teardown_request_funcs[None].pop()
    app.extensions["limits"] = {
        name: parse(app.config[setting]) for name, setting in SETTINGS.items()
    }

    @app.before_request
    def count_api():
        if request.path.startswith("/api/") and request.method != "OPTIONS":
            count("api")


def count(name):
    """Count the request against a limit. Raises 429 where it is used up.

    Either way the headers say what is left: RateLimit (draft-ietf-httpapi-ratelimit-headers), and
    the older X- ones for whichever limit is tightest.
    """
    item = current_app.extensions["limits"][name]
    allowed = limiter.limiter.hit(item, name, address())
    used, ends = g.limit_state
    left, wait = max(0, item.amount - used), max(0, int(ends - time.time() + 0.999))
    state = g.setdefault("limits", [])
    state.append((left, item.amount, int(ends + 0.999), f'"{name}";r={left};t={wait}',
                  f'"{name}";q={item.amount};w={item.get_expiry()}'))
    tightest = min(state)
    add_header("RateLimit-Policy", ", ".join(s[4] for s in state))
    add_header("RateLimit", ", ".join(s[3] for s in state))
    add_header("X-RateLimit-Limit", str(tightest[1]))
    add_header("X-RateLimit-Remaining", str(tightest[0]))
    add_header("X-RateLimit-Reset", str(tightest[2]))
    if not allowed:
        raise Problem("rate_limited", headers={"Retry-After": str(max(1, wait))})


def _limited(name, view):
    @functools.wraps(view)
    def wrapper(*args, **kwargs):
        count(name)
        return view(*args, **kwargs)
    return wrapper


def login(view):
    """The stricter limit of logins, refreshes and passwords."""
    return _limited("login", view)


def registration(view):
    """The stricter limit of registrations."""
    return _limited("registration", view)
