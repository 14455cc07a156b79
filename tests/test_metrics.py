"""Metrics, as Prometheus gets them from a real gunicorn: over its workers, and over their ends."""
import contextlib
import os
import platform
import re
import signal
import time

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from db import migrations
from tests.conftest import PASSWORD, execute, unique
from tests.test_limits import Valkey
from tests.wire import Wire

TOKEN = "metrics-token-of-the-tests"
REPORT = "/api/v1/reports/transactions?start_date=2020-01-01&end_date=2100-01-01"


class Figures:
    """One answer of /metrics. Called with a name and labels, it gives the sum of those series."""

    def __init__(self, server):
        answer = server.call("GET", "/metrics", token=TOKEN)
        assert answer.status == 200
        self.samples = [sample for family in text_string_to_metric_families(answer.body.decode())
                        for sample in family.samples]

    def __call__(self, name, **labels):
        return sum(sample.value for sample in self.samples if sample.name == f"shopfront_{name}"
                   and labels.items() <= sample.labels.items())


def comes_to(server, condition):
    """The figures for which a condition holds: each worker takes down what it holds once a second.

    The time between is left without requests, which would be counted, too.
    """
    for _ in range(10):  # a worker that leaves takes seconds, on a busy machine more
        time.sleep(1.2)
        if condition(now := Figures(server)):
            return now
    raise AssertionError([(sample.name, sample.labels, sample.value) for sample in now.samples
                          if "le" not in sample.labels and "route" not in sample.labels])


def asks(path, token=None):
    """The bytes of a GET."""
    bearer = f"Authorization: Bearer {token}\r\n" if token else ""
    return f"GET {path} HTTP/1.1\r\nHost: shop\r\n{bearer}\r\n".encode()


LIST = asks("/api/v1/categories")


@contextlib.contextmanager
def locked(url, table):
    """Whoever wants to read the table waits, for five seconds at most."""
    with psycopg.connect(url) as conn:
        conn.execute(f"LOCK TABLE {table}")
        yield


def account(server):
    """(id, token) of a new account."""
    answer = server.call("POST", "auth/register", json={
        "email": f"{unique('m')}@example.com", "password": PASSWORD, "name": "Ada"}).json()
    return answer["user"]["id"], answer["token"]


@pytest.fixture(scope="module")
def url(make_database):
    return make_database()


@pytest.fixture(scope="module")
def begin(serve, url):
    """A function that starts a server on this file's database, with nothing cached."""
    return lambda **env: serve(DATABASE_URL=url, CACHE_TYPE="NullCache", **env)


@pytest.fixture(scope="module")
def shop(begin):
    """Two workers that nothing special happens to."""
    return begin()


def test_requests_under_way_and_connections_of_all_workers(shop, url):
    with contextlib.ExitStack() as wires:
        for _ in range(5):
            wires.enter_context(Wire(shop))
        with locked(url, "categories"):
            asking = [wires.enter_context(Wire(shop, LIST)) for _ in range(3)]
            comes_to(shop, lambda now: (now("in_flight"), now("connections")) == (3, 8))
        assert [wire.answer()[0] for wire in asking] == [200] * 3
        comes_to(shop, lambda now: (now("in_flight"), now("connections")) == (0, 8))
    comes_to(shop, lambda now: now("connections") == 0)


def test_how_long_requests_wait_for_a_thread(begin, url):
    server = begin(workers=1, WEB_THREADS="1")
    with contextlib.ExitStack() as wires:
        with locked(url, "categories"):
            asking = [wires.enter_context(Wire(server, LIST)) for _ in range(2)]
            time.sleep(0.8)
        assert [wire.answer()[0] for wire in asking] == [200, 200]
    now, wait = Figures(server), "thread_wait_seconds"
    assert now(f"{wait}_count") - now(f"{wait}_bucket", le="0.5") == 1
    assert 0.5 < now(f"{wait}_sum") < 3


def test_how_long_requests_wait_for_a_connection(begin, url):
    server = begin(workers=1, POOL_MAX_SIZE="1")
    with contextlib.ExitStack() as wires:
        with locked(url, "categories"):
            asking = [wires.enter_context(Wire(server, LIST)) for _ in range(2)]
            time.sleep(1.5)
            now = Figures(server)
            assert now("pool_connections", pool="requests", state="busy") == 1
            assert now("pool_connections", pool="requests", state="idle") == 0
            assert now("pool_waiting", pool="requests") > 0
        assert sorted(wire.answer()[0] for wire in asking) == [200, 503]
    now = comes_to(server, lambda now: now("pool_connections", state="idle") == 1)
    assert now("pool_waiting") == now("pool_connections", state="busy") == 0
    assert now("pool_waits_total", pool="requests") >= 2
    assert now("pool_wait_seconds_total", pool="requests") > 1.5
    assert now("pool_errors_total", pool="requests") >= 1
    assert now("pool_errors_total", pool="reports") == 0


@pytest.fixture
def valkey(run_folder):
    folder = run_folder / unique("v")
    folder.mkdir()
    server = Valkey(folder)
    yield server
    server.kill()


def test_redis_that_goes_away_and_comes_back(begin, valkey):
    server = begin(workers=1, REDIS_URL=valkey.url)
    server.call("GET", "categories")
    here = comes_to(server, lambda now: now("redis_calls_total") > 0)
    assert here("redis_away") == 0
    assert 0 < here("redis_seconds_total") < 1
    valkey.kill()
    assert server.call("GET", "categories").status == 200
    comes_to(server, lambda now: now("redis_away") == 1)
    valkey.start()
    back = comes_to(server, lambda now: now("redis_away") == 0)
    assert back("redis_calls_total") > here("redis_calls_total")


def test_who_is_turned_away_by_which_limit(begin):
    server = begin(RATE_LIMIT="5 per hour", LOGIN_RATE_LIMIT="2 per hour",
                   REDIS_PREFIX=unique("limits"))
    body = {"email": f"{unique()}@example.com", "password": "wrong again"}
    assert [server.call("POST", "auth/login", json=body).status for _ in range(3)] == \
        [401, 401, 429]
    assert [server.call("GET", "categories").status for _ in range(4)] == [200, 200, 429, 429]
    now = Figures(server)
    assert (now("limited_total", limit="login"), now("limited_total", limit="api")) == (1, 2)


def test_failed_and_blocked_logins(shop):
    body = {"email": f"{unique()}@example.com", "password": "wrong again"}
    before = Figures(shop)
    assert [shop.call("POST", "auth/login", json=body).status for _ in range(6)] == \
        [401] * 5 + [429]
    now = Figures(shop)
    for event, count in (("login_failed", 5), ("login_blocked", 1), ("logged_in", 0)):
        assert now("security_events_total", event=event) \
            - before("security_events_total", event=event) == count


def test_downloads_that_run_and_that_may(begin, url):
    server = begin(workers=1, REPORT_CONCURRENCY="1")
    number, token = account(server)
    execute(url, f"UPDATE users SET role = 'admin' WHERE id = {number}")
    with contextlib.ExitStack() as wires:
        with locked(url, "transaction_items"):
            reading = wires.enter_context(Wire(server, asks(REPORT, token)))
            now = comes_to(server, lambda now: now("reports_running") == 1)
            assert now("report_slots") == 1
            assert now("pool_connections", pool="reports", state="busy") == 1
            assert server.call("GET", REPORT, token=token).status == 503
        assert reading.answer()[0] == 200
    comes_to(server, lambda now: now("reports_running") == 0)


def test_mails_that_wait_and_days_without_sums(shop, url):
    before = Figures(shop)
    execute(url, "INSERT INTO mails (purpose, email, created_at, due_at) VALUES ('reset', "
                 "'a@example.com', now() - interval '2 hours', now() + interval '1 hour')")
    execute(url, "UPDATE sales_sealed SET until = (now() AT TIME ZONE 'UTC')::date - 3")
    now = Figures(shop)
    assert now("mails_waiting") == before("mails_waiting") + 1
    assert 7200 <= now("oldest_mail_seconds") < 7260
    assert now("unsealed_days") == 3


def build(server):
    found, = [sample for sample in Figures(server).samples
              if sample.name == "shopfront_build_info"]
    assert found.value == 1
    return found.labels


def test_which_code_and_which_schema_run(shop, server):
    known, labels = len(migrations.files()), build(shop)
    assert re.fullmatch("[0-9a-f]{12}", labels.pop("build"))
    assert labels == {"python": platform.python_version(), "schema": str(known)}
    assert build(shop) == build(server)
    now = Figures(shop)
    assert (now("schema_version"), now("database_up")) == (known, 1)


def test_without_a_database_the_process_s_own_figures_are_left(serve, tmp_path):
    server = serve(workers=1, APP_ENV="production",
                   DATABASE_URL=f"postgresql:///shop?host={tmp_path}")
    now = Figures(server)
    names = {sample.name for sample in now.samples}
    assert now("database_up") == 0
    assert {"shopfront_database_up", "shopfront_build_info", "shopfront_requests_total"} <= names
    assert not {"shopfront_schema_version", "shopfront_unsealed_days"} & names


def test_gauges_go_with_their_worker_and_counters_stay(begin):
    server = begin(REPORT_CONCURRENCY="3")
    for _ in range(20):
        assert server.call("GET", "categories").status == 200

    def becomes(slots, clients):
        """Counted are as many slots and clients, and all requests that there were."""
        now = comes_to(server, lambda now: now("report_slots") == slots
                       and now("connections") == clients)
        assert now("requests_total", route="/api/v1/categories") == 20

    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(12)]
        becomes(6, 12)
        os.kill(server.worker_pids[0], signal.SIGKILL)
        left = 0
        for wire in wires:
            with contextlib.suppress(OSError, AssertionError):
                wire.send(asks("/health"))
                left += wire.answer()[0] == 200
        becomes(6, left)
    server.process.send_signal(signal.SIGTTOU)  # one worker less
    becomes(3, 0)
    server.process.send_signal(signal.SIGTTIN)
    becomes(6, 0)
    server.process.send_signal(signal.SIGHUP)  # others in the place of all
    becomes(6, 0)
