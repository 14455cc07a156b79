"""PostgreSQL goes away, comes back, or freezes: the shop says so at once and recovers by itself."""
import contextlib
import os
import pathlib
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from blueprints.health import READY_SECONDS
from db import migrations
from db.embedded import Servers
from tests.conftest import execute, register, unique

TIMEOUT_MS = 500  # a statement's, so that a freeze costs little
REPORT = "reports/sales?start_date=2020-01-01&end_date=2100-01-01"
DOWNLOAD = "reports/transactions?start_date=2020-01-01&end_date=2100-01-01"


class Postgres:
    """A PostgreSQL of the test's own, which can be stopped, started and frozen."""

    durable = False

    def __init__(self, folder):
        self.folder, self.leases, self.stopped = folder, [], contextlib.ExitStack()
        self.url, self.redis_url = self.start()

    def start(self):
        self.stopped.close()
        self.leases.append(Servers(self.folder, self.durable))
        return self.leases[-1].start()

    @property
    def pid(self):
        file = self.leases[0].home / "data/postmaster.pid"
        return int(file.read_text().split()[0])

    def stop(self, how=signal.SIGINT):
        """Stop it until start(): while the gate is taken, the watcher can't start it again."""
        self.stopped.enter_context(self.leases[0].gate())
        pid = self.pid
        os.kill(pid, how)
        while running(pid):
            time.sleep(0.01)

    def restart(self):
        self.stop()
        self.start()

    @contextlib.contextmanager
    def frozen(self):
        """The server and all its backends stand still."""
        pids = [self.pid, *self.children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in {*pids, *self.children()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def children(self):
        listed = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in listed.read_text().split()]


def running(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def postgres(run_folder):
    folder = run_folder / unique("outage")
    folder.mkdir(mode=0o755)
    postgres = Postgres(folder)
    migrations.upgrade(postgres.url)
    yield postgres
    for lease in postgres.leases:
        lease.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shop(postgres, make_app, make_client, redis_url):
    """A Client of an app on that PostgreSQL, with an admin's token. No cache to hide behind."""
    app = make_app(DATABASE_URL=postgres.url, STATEMENT_TIMEOUT_MS=str(TIMEOUT_MS),
                   CACHE_TYPE="NullCache")
    shop = make_client(app)
    person = register(shop)
    execute(postgres.url, "UPDATE users SET role = 'admin'")
    shop.token = person.token
    shop.product = shop.post("products", token=shop.token,
                             json={"name": "Tea", "price": 1, "stock": 10**6}).json
    return shop


@pytest.fixture(autouse=True)
def well(postgres, shop):
    """Each test begins with everything running and all pools full of connections."""
    if not running(postgres.pid):
        postgres.start()
    end = time.monotonic() + 10
    while shop.get("/health/ready").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    with ThreadPoolExecutor(6) as pool:
        for path in ("users/me", REPORT):
            answers = pool.map(lambda _, path=path: shop.get(path, token=shop.token), range(6))
            assert {answer.status_code for answer in answers} == {200}


def buy(shop):
    return shop.post("transactions", token=shop.token, json={
        "items": [{"product_id": shop.product["id"], "quantity": 1}]})


CALLS = {
    "a public list": lambda shop: shop.get("products"),
    "a signed-in read": lambda shop: shop.get("users/me", token=shop.token),
    "a purchase": buy,
    "sums": lambda shop: shop.get(REPORT, token=shop.token),
    "a download": lambda shop: shop.get(DOWNLOAD, token=shop.token),
    "a login": lambda shop: shop.post("auth/login", json={
        "email": "x@example.com", "password": "some password"}),
}


def is_503(answer, seconds, begun):
    """An answer that says 'unavailable, come again', and said so soon."""
    assert (answer.status_code, answer.json["code"]) == (503, "unavailable"), answer.text
    assert int(answer.headers["Retry-After"]) >= 1
    assert time.monotonic() - begun < seconds


def recovers(call, seconds):
    begun = time.monotonic()
    while (answer := call()).status_code not in (200, 201, 401):
        assert answer.status_code in (503, 504), answer.text
        assert time.monotonic() - begun < seconds, answer.text
        time.sleep(0.05)


def test_without_a_database_every_request_says_so_soon(postgres, shop):
    def fails(call):
        begun = time.monotonic()
        is_503(call(shop), 3.5, begun)
    postgres.stop()
    try:
        with ThreadPoolExecutor(len(CALLS)) as pool:
            for _ in range(2):
                list(pool.map(fails, CALLS.values()))
    finally:
        postgres.start()
    begun = time.monotonic()
    for call in CALLS.values():
        recovers(lambda call=call: call(shop), 2)
    assert time.monotonic() - begun < 4


def test_health_tells_what_is_wrong_and_life_goes_on(postgres, shop):
    postgres.stop()
    try:
        begun = time.monotonic()
        is_503(shop.get("/health/ready"), 1, begun)
        assert shop.get("/health/live").status_code == 200
        assert shop.get("/health").status_code == 200
    finally:
        postgres.start()
    recovers(lambda: shop.get("/health/ready"), 2)


@pytest.mark.parametrize("call", ["a public list", "a signed-in read", "sums", "a download"])
def test_the_first_read_after_a_restart_is_answered(postgres, shop, call):
    """Every idle connection is dead; a read is asked again on a new one."""
    postgres.restart()
    assert CALLS[call](shop).status_code == 200


def test_the_first_purchase_after_a_restart_is_made_once(postgres, shop):
    def count():
        return execute(postgres.url, "SELECT count(*) FROM transactions")[0][0]
    before = count()
    postgres.restart()
    assert buy(shop).status_code == 201
    assert count() == before + 1


def test_many_at_once_after_a_restart_are_answered(postgres, shop):
    postgres.restart()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: shop.get("users/me", token=shop.token), range(16)))
    assert {answer.status_code for answer in answers} == {200}


def test_a_crash_is_as_good_as_a_restart(postgres, shop):
    postgres.stop(signal.SIGQUIT)  # an immediate shutdown: no farewell, recovery at the start
    postgres.start()
    recovers(lambda: shop.get("users/me", token=shop.token), 2)


def test_a_frozen_database_costs_a_bounded_time(postgres, shop):
    with postgres.frozen():
        begun = time.monotonic()
        answer = shop.get("/health/ready")
        is_503(answer, 1.2, begun)
        begun = time.monotonic()
        assert shop.get("/health/live").status_code == 200
        assert time.monotonic() - begun < READY_SECONDS  # what asking it would have taken
        with ThreadPoolExecutor(4) as pool:
            begun = time.monotonic()
            answers = list(pool.map(lambda call: call(shop), (
                CALLS["a public list"], CALLS["a signed-in read"], buy, CALLS["a login"])))
            for answer in answers:
                assert answer.status_code in (503, 504), answer.text
            assert time.monotonic() - begun < 8
    for call in (CALLS["a public list"], CALLS["a signed-in read"], buy):
        recovers(lambda call=call: call(shop), 4)
    recovers(lambda: shop.get("/health/ready"), 2)
