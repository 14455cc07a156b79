"""A shop to measure, with servers of its own, and how a figure is taken and shown."""
import contextlib
import pathlib
import shutil
import statistics
import tempfile
import time

from db import migrations
from db.embedded import Servers
from db.seed import PASSWORD, NotEmpty, seed
from tests.conftest import ENOUGH, Server

ENV = {"JWT_SECRET_KEY": "k" * 40, "RATE_LIMIT": ENOUGH, "LOGIN_RATE_LIMIT": ENOUGH,
       "REGISTER_RATE_LIMIT": ENOUGH, "LOG_LEVEL": "ERROR"}


@contextlib.contextmanager
def stack(folder):
    """(a function that starts a server, database URL, Redis URL), on an empty database."""
    own = folder or tempfile.mkdtemp(prefix="shopfront-bench-")
    pathlib.Path(own).mkdir(exist_ok=True)
    pathlib.Path(own).chmod(0o755)
    servers = Servers(own)
    url, redis = servers.start()
    running = []

    def start(**env):
        running.append(Server(ENV | {"DATABASE_URL": url, "REDIS_URL": redis} | env).wait())
        return running[-1]

    try:
        yield start, url, redis
    finally:
        for server in running:
            server.stop()
        servers.stop()
        if not folder:
            shutil.rmtree(own, ignore_errors=True)


@contextlib.contextmanager
def shop(folder, sizes):
    """(a function that starts a server, database URL) of a shop of these sizes."""
    with stack(folder) as (start, url, _):
        fill(url, sizes)
        yield start, url


def fill(url, sizes):
    """Migrate a database, and seed it if there is no shop in it."""
    migrations.upgrade(url)
    with contextlib.suppress(NotEmpty):
        began = time.monotonic()
        seed(url, sizes, lambda name, done, size: print(
            f"\r{name} {done:,}", end="", flush=True))
        print(f"\rseeded in {time.monotonic() - began:.1f} s: {sizes}")


def login(server, email):
    answer = server.call("POST", "auth/login", json={"email": email, "password": PASSWORD})
    return answer.json()["token"]


def timed(work, times=15):
    """Median milliseconds, and the last result."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        result = work()
        found.append((time.perf_counter() - start) * 1000)
    return statistics.median(found), result


def show(what, value):
    print(f"{what:58} {value}", flush=True)
