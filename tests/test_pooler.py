"""Behind PgBouncer in transaction mode, where a session is anybody's, everything holds."""
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import conninfo

from db import migrations
from db.embedded import _user, listener_pid
from db.pool import Database, PoolerError, refuse_pooler
from db.seed import PASSWORD, seed
from extensions.behind.upkeep import tidy
from tests.conftest import ROOT, Client, execute, unique

SERVERS = 2  # far fewer than clients, so that these do meet each other's sessions
PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
WINDOW = "start_date=2020-01-01&end_date=2100-01-01"
# A server whose own settings would show in answers and in time.
HOSTILE = {"timezone": "America/New_York", "datestyle": "SQL, DMY", "jit": "on",
           "lock_timeout": "0", "statement_timeout": "0", "max_parallel_workers_per_gather": "4"}
SENTENCE = ("DATABASE_URL leads to a connection pooler that does not keep a session for each "
            "client: set DATABASE_POOLER=transaction.")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="PgBouncer is not installed")


class Bouncer:
    """A PgBouncer on a Unix socket in front of the test servers' PostgreSQL."""

    def __init__(self, folder, server, **settings):
        folder.mkdir(mode=0o755)
        self.folder = folder
        into = conninfo.conninfo_to_dict(server)
        given = {k: into[k] for k in ("host", "port", "user", "password") if k in into}
        lines = ["[databases]", "* = " + " ".join(f"{k}={v}" for k, v in given.items()),
                 "[pgbouncer]", f"unix_socket_dir = {folder}", "auth_type = any",
                 "max_client_conn = 500"]
        settings = {"pool_mode": "transaction", "default_pool_size": SERVERS,
                    "listen_port": 6432} | settings
        lines += [f"{name} = {value}" for name, value in settings.items()]
        config = folder / "pgbouncer.ini"
        config.write_text("\n".join(lines) + "\n")
        if user := _user():  # it refuses to run as root
            os.chown(folder, user["user"], user["group"])
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen([PROGRAM, config], stdout=log, stderr=log, **_user())
        end = time.monotonic() + 10
        while listener_pid(folder / f".s.PGSQL.{settings['listen_port']}") is None:
            assert self.process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.01)

    def url(self, direct):
        """The way through it to the database that ``direct`` leads to."""
        return conninfo.make_conninfo(direct, host=str(self.folder), port=6432)

    @contextlib.contextmanager
    def frozen(self):
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def bounce(servers, run_folder):
    """A function that starts a PgBouncer: ``bounce(pool_mode="session")``."""
    started = []

    def start(**settings):
        started.append(Bouncer(run_folder / unique("bouncer"), servers[0], **settings))
        return started[-1]

    yield start
    for bouncer in started:
        bouncer.stop()


@pytest.fixture(scope="module")
def bouncer(bounce):
    return bounce()


@pytest.fixture(scope="module")
def direct(make_database):
    """The straight way to a demo shop on a server with settings of its own."""
    url = make_database()
    seed(url, {"users": 20, "products": 200, "transactions": 1000})
    database = conninfo.conninfo_to_dict(url)["dbname"]
    for name, value in HOSTILE.items():
        execute(url, f"ALTER DATABASE \"{database}\" SET {name} = '{value}'")
    return url


@pytest.fixture(scope="module")
def pooled(bouncer, direct):
    return bouncer.url(direct)


@pytest.fixture(scope="module")
def app(make_app, pooled):
    return make_app(DATABASE_URL=pooled, DATABASE_POOLER="transaction", CACHE_TYPE="NullCache")


@pytest.fixture(scope="module")
def client(app):
    return Client(app)


@pytest.fixture(scope="module")
def hasty(make_app, pooled):
    """A Client of an app that gives every statement a second."""
    return Client(make_app(DATABASE_URL=pooled, DATABASE_POOLER="transaction",
                           CACHE_TYPE="NullCache", STATEMENT_TIMEOUT_MS="1000"))


@pytest.fixture(scope="module")
def straight(make_app, direct):
    """A Client of an app without a pooler on the same database."""
    return Client(make_app(DATABASE_URL=direct, CACHE_TYPE="NullCache"))


@pytest.fixture(scope="module")
def token(client):
    answer = client.post("auth/login",
                         json={"email": "admin@example.com", "password": PASSWORD})
    return answer.json["token"]


@pytest.fixture
def database(pooled):
    """A function that makes a Database through the pooler."""
    with contextlib.ExitStack() as stack:
        def make(size=4, timeout_ms=30_000):
            made = Database(pooled, size, timeout_ms, sessionless=True)
            stack.callback(made.close)
            return made
        yield make


SETTINGS = ("timezone", "datestyle", "jit", "lock_timeout", "statement_timeout",
            "max_parallel_workers_per_gather")


def settings_of(conn):
    return conn.execute("SELECT " + ", ".join(f"current_setting('{s}')" for s in SETTINGS)
                        ).fetchone()


@pytest.mark.parametrize("way", ["reading", "connection", "snapshot"])
def test_every_statement_has_the_shop_s_settings(database, way):
    shop = database(size=8)

    def ask(_):
        with getattr(shop, way)() as conn:
            return {settings_of(conn) for _ in range(5)}
    with ThreadPoolExecutor(8) as pool:
        seen = set().union(*pool.map(ask, range(40)))
    assert seen == {("UTC", "ISO, DMY", "off", "5s", "30s", "0")}


def test_slow_work_has_no_time_out(database):
    with database().without_timeout().connection() as conn:
        assert settings_of(conn)[4:] == ("0", "4")


def test_nothing_stays_in_a_session(database, pooled):
    shop = database()
    for way in ("reading", "connection", "snapshot"):
        with getattr(shop, way)() as conn:
            settings_of(conn)
    with psycopg.connect(pooled, autocommit=True) as conn:
        for _ in range(SERVERS * 2):
            assert settings_of(conn)[0] == "America/New_York"
            assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


@pytest.mark.parametrize("way", ["reading", "connection"])
def test_times_are_read_as_utc(database, way):
    with getattr(database(), way)() as conn:
        moment, = conn.execute("SELECT timestamptz '2026-07-01T12:00:00.25Z'").fetchone()
    assert moment.isoformat() == "2026-07-01T12:00:00.250000+00:00"


def test_a_statement_that_stands_alone_is_one_round_trip(database, tmp_path):
    with database().reading() as conn, open(tmp_path / "trace", "w") as trace:
        conn.pgconn.trace(trace.fileno())
        conn.execute("SELECT %s::int", [7])
        conn.pgconn.untrace()
    assert len(re.findall(r"^.*\tB\t\d+\tReadyForQuery", (tmp_path / "trace").read_text(),
                          re.M)) == 1


def test_a_block_begins_with_one_round_trip_and_ends_with_one(database, tmp_path):
    shop = database()
    with shop.reading() as conn:
        pass  # the one connection that there is from now on
    with open(tmp_path / "trace", "w") as trace:
        conn.pgconn.trace(trace.fileno())
        with shop.connection() as same:
            assert same is conn
        conn.pgconn.untrace()
    assert len(re.findall(r"^.*\tB\t\d+\tReadyForQuery", (tmp_path / "trace").read_text(),
                          re.M)) == 2


def test_a_block_is_all_or_nothing(database, direct):
    shop, name = database(), unique("Category ")
    insert = "INSERT INTO categories (name) VALUES (%s)"
    with contextlib.suppress(ZeroDivisionError), shop.connection() as conn:
        conn.execute(insert, [name])
        1 / 0
    with shop.connection() as conn:
        with contextlib.suppress(psycopg.errors.UniqueViolation), conn.transaction():
            conn.execute(insert, [name])
            conn.execute(insert, [name])
        conn.execute(insert, [name])
    assert execute(direct, f"SELECT count(*) FROM categories WHERE name = '{name}'") == [(1,)]


@pytest.mark.parametrize("way", ["reading", "connection", "snapshot"])
def test_a_statement_is_ended_in_time(database, way):
    begun = time.monotonic()
    with pytest.raises(psycopg.errors.QueryCanceled), \
            getattr(database(timeout_ms=200), way)() as conn:
        conn.execute("SELECT pg_sleep(5)")
    assert time.monotonic() - begun < 4


def test_a_request_is_ended_in_time(hasty, direct):
    with psycopg.connect(direct) as blocker:
        blocker.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        begun = time.monotonic()
        answer = hasty.get("products")
        assert (answer.status_code, answer.json["code"]) == (504, "timeout")
        assert time.monotonic() - begun < 3
    assert hasty.get("products").status_code == 200


def test_a_frozen_pooler_costs_a_bounded_time(bouncer, hasty, token):
    assert hasty.get("users/me", token=token).status_code == 200
    with bouncer.frozen():
        begun = time.monotonic()
        answer = hasty.get("users/me", token=token)
        assert answer.status_code == 503
        assert time.monotonic() - begun < 7
    end = time.monotonic() + 5
    while hasty.get("users/me", token=token).status_code != 200:
        assert time.monotonic() < end


def test_lost_servers_are_not_seen_by_a_read(client, token, direct):
    assert client.get("users/me", token=token).status_code == 200
    execute(direct, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()")
    assert client.get("users/me", token=token).status_code == 200


READS = [
    "products?sort=price&limit=50", "products?search=tea", "products?search=te&sort=relevance",
    "products?min_price=10&max_price=90&in_stock=true&sort=name&order=desc&page=2", "products/7",
    "categories", "categories/3", "users?count=exact", "users?search=user1&sort=name", "users/me",
    "/api/v2/users/me", "/api/v2/users", "transactions?limit=20", "transactions/5",
    "transactions?from=2020-01-01&status=completed", "auth/sessions",
    *(f"reports/sales?{WINDOW}&group_by={by}" for by in ("day", "month", "category", "product")),
    *(f"reports/transactions?{WINDOW}&format={kind}" for kind in ("csv", "json", "ndjson")),
]


@pytest.mark.parametrize("path", READS)
def test_a_read_is_answered_as_without_a_pooler(client, straight, token, path):
    answer = client.get(path, token=token)
    assert answer.status_code == 200, answer.text
    plain = straight.get(path, token=token)
    assert answer.data == plain.data
    assert answer.headers.get("Report-Amount") == plain.headers.get("Report-Amount")


CUSTOMERS, TURNS = 12, 4


def shop_for_a_day(call, number, product, admin):
    """One customer registers, looks, buys, has the last sale refunded, and leaves."""
    name = unique(f"Ada {number} ")
    body = {"email": f"{unique('p')}@example.com", "password": PASSWORD * 2, "name": name}
    mine = call("POST", "auth/register", json=body).json()
    token = mine["token"]
    for turn in range(TURNS):
        assert call("GET", "users/me", token=token).json()["name"] == name
        sale = buy_twice(call, token, f"{name}{turn}".replace(" ", "-"), product, turn + 1)
        look_around(call, 1 + (number * 7 + turn) % 200, admin)
        name = f"{name}."
        changed = call("PATCH", "users/me", token=token, json={"name": name})
        assert changed.json()["name"] == name
    assert call("GET", "/health/ready").json() == {"status": "ok"}
    call("POST", f"transactions/{sale}/refund", token=admin)
    token = call("POST", "auth/refresh", json={
        "refresh_token": mine["refresh_token"]}).json()["token"]
    call("DELETE", "users/me", token=token)


def buy_twice(call, token, key, product, quantity):
    """With one key, so it is one sale. Returns its id."""
    basket = {"items": [{"product_id": product, "quantity": quantity}]}
    sale, again = (call("POST", "transactions", token=token, json=basket,
                        headers={"Idempotency-Key": key}) for _ in range(2))
    assert sale.body == again.body
    assert sale.json()["total"] == f"{2.5 * quantity:.2f}"
    newest = call("GET", "transactions?limit=1", token=token).json()["data"]
    assert [one["id"] for one in newest] == [sale.json()["id"]]
    return sale.json()["id"]


def look_around(call, product, admin):
    assert call("GET", f"products/{product}").json()["id"] == product
    assert len(call("GET", "products?limit=30&search=e").json()["data"]) == 30
    report = call("GET", f"reports/transactions?{WINDOW}&format=csv", token=admin)
    assert report.body.count(b"\r\n") == int(report.headers["Report-Rows"]) + 1
    call("GET", f"reports/sales?{WINDOW}&group_by=month", token=admin)


def test_requests_of_all_kinds_at_once_are_answered_right(serve, pooled, direct, redis_url):
    """Two servers of two workers each, all of whose clients share two sessions."""
    env = {"DATABASE_URL": pooled, "DATABASE_POOLER": "transaction", "CACHE_TYPE": "NullCache",
           "APP_ENV": "production", "REPORT_CONCURRENCY": "8"}
    ports = [serve(workers=2, **env) for _ in range(2)]
    admin = ports[0].call("POST", "auth/login", json={
        "email": "admin@example.com", "password": PASSWORD}).json()["token"]
    product = ports[0].call("POST", "products", token=admin, json={
        "name": unique("Product "), "price": "2.50", "stock": 10_000}).json()["id"]
    calls = []

    def live(number):
        def call(method, path, **kwargs):
            answer = ports[number % 2].call(method, path, **kwargs)
            calls.append(answer.status)
            assert answer.status < 300, (method, path, answer.body)
            return answer
        shop_for_a_day(call, number, product, admin)

    with ThreadPoolExecutor(CUSTOMERS) as pool:
        list(pool.map(live, range(CUSTOMERS)))
    assert len(calls) == CUSTOMERS * (TURNS * 9 + 5)
    stock = execute(direct, f"SELECT stock FROM products WHERE id = {product}")[0][0]
    assert stock == 10_000 - CUSTOMERS * sum(range(1, TURNS + 1)) + CUSTOMERS * TURNS


def test_a_download_that_breaks_off_leaves_the_rest_alone(app, client, token):
    for _ in range(SERVERS * 3):
        response = app.test_client().get(
            f"/api/v1/reports/transactions?{WINDOW}&format=ndjson", buffered=False,
            headers={"Authorization": f"Bearer {token}"})
        assert next(response.iter_encoded())
        response.close()
    assert client.get(f"reports/sales?{WINDOW}", token=token).status_code == 200
    assert client.head(f"reports/transactions?{WINDOW}", token=token).status_code == 200


def test_upkeep_tidies_and_seals(app, direct):
    execute(direct, "UPDATE sales_sealed SET until = '1970-01-01'")
    execute(direct, "TRUNCATE sales_days, sales_product_months")
    tidy(app)
    assert execute(direct, "SELECT until > now() - interval '2 days 1 hour' FROM sales_sealed") \
        == [(True,)]


def test_every_command_works(make_app, make_database, bouncer, tmp_path):
    url = make_database(empty=True)
    runner = make_app(DATABASE_URL=bouncer.url(url), DATABASE_POOLER="transaction"
                      ).test_cli_runner()

    def run(*args):
        done = runner.invoke(args=args)
        assert done.exit_code == 0, done.output
        return done.output
    known = len(migrations.files())
    assert f"{known} applied." in run("db", "upgrade")
    assert "1 undone." in run("db", "downgrade")
    assert "1 applied." in run("db", "upgrade")
    assert run("db", "status").count(": applied") == known
    run("db", "seed", "--users", "5", "--products", "20", "--transactions", "50")
    run("users", "create", "ada@example.com", "--admin", "--password", "a long walk home")
    assert "ada@example.com" in run("users", "list")
    run("mail", "send")
    file = tmp_path / "catalogue.csv"
    file.write_text("sku,name,price\nNEW-1,New,1.00\nNEW-2,Newer,2.00\n")
    assert "had this not been a dry run" in run("products", "import", "--dry-run", str(file))
    assert "2 created, 0 changed." in run("products", "import", str(file))
    assert run("products", "export").count("NEW-") == 2
    window = "--from", "2020-01-01", "--to", "2100-01-01"
    assert run("reports", "transactions", *window).startswith("transaction_id,")
    assert "total" in run("reports", "sales", *window)
    run("db", "reset", "--yes")
    assert execute(url, "SELECT count(*) FROM users") == [(0,)]


def test_migrations_at_once_apply_each_once(make_database, bouncer, tmp_path):
    url = make_database(empty=True)
    folder = tmp_path / "migrations"
    shutil.copytree(migrations.MIGRATIONS, folder)
    known = len(migrations.files())
    for number, sql in enumerate((
        "CREATE TABLE tally (n int, at timestamptz DEFAULT now());\nINSERT INTO tally VALUES (1);",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY IF NOT EXISTS tally_idx ON tally (n);\n"
        "INSERT INTO tally VALUES (2);",
        "SELECT pg_sleep(0.3);\nINSERT INTO tally VALUES (3);",
    ), known + 1):
        (folder / f"{number:04d}_tally.sql").write_text(sql + "\n")
    program = ("import pathlib, sys; from db import migrations; "
               "migrations.MIGRATIONS = pathlib.Path(sys.argv[1]); "
               "print(migrations.upgrade(sys.argv[2]))")
    runs = [subprocess.Popen([sys.executable, "-c", program, folder, bouncer.url(url)], cwd=ROOT,
                             text=True, stdout=subprocess.PIPE) for _ in range(5)]
    applied = sorted(int(run.communicate(timeout=60)[0]) for run in runs)
    assert applied == [0, 0, 0, 0, known + 3]
    assert execute(url, "SELECT n FROM tally ORDER BY n") == [(1,), (2,), (3,)]
    assert execute(url, "SELECT indisvalid FROM pg_index "
                        "WHERE indexrelid = 'tally_idx'::regclass") == [(True,)]


# Without the setting.

POOLERS = {
    "that refuses options": {},
    "that ignores options": {"ignore_startup_parameters": "options"},
    "that goes round its servers": {"ignore_startup_parameters": "options",
                                    "server_round_robin": "1"},
    "that drops settings": {"ignore_startup_parameters": "options", "pool_mode": "session"},
}


@pytest.fixture(scope="module", params=POOLERS)
def unannounced(request, bounce, direct):
    return bounce(**POOLERS[request.param]).url(direct)


@pytest.mark.parametrize("name", ["DATABASE_URL", "DATABASE_READ_URL"])
def test_a_pooler_that_keeps_no_session_is_noticed(unannounced, name):
    with pytest.raises(PoolerError) as refused:
        refuse_pooler(name, unannounced)
    assert str(refused.value) == SENTENCE.replace("DATABASE_URL", name)


@pytest.mark.parametrize("environment", ["production", "development"])
@pytest.mark.parametrize("command", [["gunicorn", "-b", "127.0.0.1:0"], ["flask", "db", "upgrade"]],
                         ids=["gunicorn", "flask"])
@pytest.mark.parametrize("ignored", ["", "options"])
def test_a_start_behind_an_unannounced_pooler_is_refused(bounce, direct, settings, command,
                                                         environment, ignored):
    url = bounce(ignore_startup_parameters=ignored).url(direct)
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | settings | {"APP_ENV": environment, "DATABASE_URL": url})
    assert done.returncode == 1
    assert (done.stdout, done.stderr.removeprefix("Error: ")) == ("", f"{SENTENCE}\n")


def test_sessions_that_keep_their_settings_are_not_a_pooler_s(direct):
    refuse_pooler("DATABASE_URL", direct)


def test_a_database_that_does_not_answer_is_not_a_pooler(tmp_path):
    refuse_pooler("DATABASE_URL", f"postgresql:///shop?host={tmp_path}")
