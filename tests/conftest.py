"""A real PostgreSQL and a real Valkey for every test, started for the run and gone with it.

With TEST_DATABASE_URL and TEST_REDIS_URL they are those servers instead. Either way the tests
touch only databases that they create.
"""
import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import psycopg
import pytest
from psycopg import conninfo

from app import create_app
from db import migrations
from db.embedded import Servers
from extensions import redis_client
from tests.contract import Contract, Guard

ROOT = pathlib.Path(__file__).parents[1]
PASSWORD = "a long walk home"
# Here four processes share the cores with their servers: what takes a moment is not away.
REDIS_TIMEOUT, redis_client.TIMEOUT = redis_client.TIMEOUT, 1.0
ENOUGH = "1000000 per 15 minutes"
ROLE = "shopfront_test_api"  # which has the rights that `flask db grant` gives, and no others
_numbers = itertools.count()


@pytest.fixture(scope="session")
def run_folder():
    """A folder that all workers of this test run share: short for sockets, open for `nobody`."""
    folder = run_folder_of(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return folder


def run_folder_of(run):
    return pathlib.Path(tempfile.gettempdir()) / f"shopfront-test-{run[:12]}"


@pytest.fixture(scope="session")
def servers(run_folder):
    """(admin URL of PostgreSQL, URL of Redis)."""
    given = os.environ.get("TEST_DATABASE_URL"), os.environ.get("TEST_REDIS_URL")
    if all(given):
        yield given
        return
    embedded = Servers(run_folder / "servers", durable=False)
    try:
        urls = embedded.start()
        yield given[0] or urls[0], given[1] or urls[1]
    finally:
        embedded.stop()


@pytest.fixture(scope="session")
def make_database(servers, run_folder):
    """A function that makes a migrated database and returns its URL."""
    template = f"shop_template_{run_folder}"
    template = "".join(c if c.isalnum() else "_" for c in template).lower()[-60:]
    made = []
    with open(run_folder / "template.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_folder / "template.done"
        if not done.exists():
            execute(servers[0], f'DROP DATABASE IF EXISTS "{template}"')
            execute(servers[0], f'CREATE DATABASE "{template}"')
            url = conninfo.make_conninfo(servers[0], dbname=template)
            migrations.upgrade(url)
            with contextlib.suppress(psycopg.errors.DuplicateObject):
                execute(url, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
            migrations.grant(url, ROLE)
            done.touch()

    def make(empty=False):
        name = f"shop_{os.getpid()}_{next(_numbers)}_{os.urandom(3).hex()}"
        source = "" if empty else f'TEMPLATE "{template}" STRATEGY file_copy'
        execute(servers[0], f'CREATE DATABASE "{name}" {source}')
        made.append(name)
        return conninfo.make_conninfo(servers[0], dbname=name)

    yield make
    for name in made:
        execute(servers[0], f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def database_url(make_database):
    """This worker's database, which its tests share."""
    return make_database()


@pytest.fixture(scope="session")
def redis_url(servers):
    """Redis, in a numbered database of this worker."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) + 1
    return with_redis_database(servers[1], number)


def with_redis_database(url, number):
    if url.startswith("unix:"):
        return url.replace("db=0", f"db={number}")
    return f"{url.rstrip('/').rsplit('/', 1)[0] if url.count('/') > 2 else url}/{number}"


def as_role(url):
    """The same database for the role that the API runs as."""
    return conninfo.make_conninfo(url, user=ROLE, password=PASSWORD)


def execute(url, sql):
    with psycopg.connect(url, autocommit=True) as conn:
        cursor = conn.execute(sql)
        return cursor.fetchall() if cursor.description else None


@pytest.fixture(scope="session")
def settings(database_url, redis_url):
    """What an app needs to run against the test servers, with limits out of the way."""
    return {
        "DATABASE_URL": as_role(database_url), "REDIS_URL": redis_url, "JWT_SECRET_KEY": "k" * 40,
        "RATE_LIMIT": ENOUGH, "LOGIN_RATE_LIMIT": ENOUGH, "REGISTER_RATE_LIMIT": ENOUGH,
        "LOG_LEVEL": "ERROR", "METRICS_TOKEN": "metrics-token-of-the-tests",
    }


@contextlib.contextmanager
def making_apps(settings, folders):
    """A function that makes an app with other settings; at the end their threads end, too."""
    made = []

    def make(**overrides):
        app = create_app(instance_path=folders.mktemp("instance"), **settings | overrides)
        made.append(app)
        return app

    yield make
    for app in made:
        app.extensions["db"].close()
        app.extensions["db_reports"].close()
        app.extensions["redis_client"].close()


@pytest.fixture(scope="module")
def make_app(settings, tmp_path_factory):
    """A function that makes an app with other settings, for the tests of a file."""
    with making_apps(settings, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="session")
def app(settings, tmp_path_factory):
    with making_apps(settings, tmp_path_factory) as make:
        yield make()


class Client:
    """Calls an app, and holds every answer to the document.

    ``client.get(path, token=…, json=…)`` is Flask's test client; a path without a slash in front is
    below /api/v1/.
    """

    def __init__(self, app, address="127.0.0.1"):
        self.app, self.address = app, address
        self.contract = Contract(app)

    def open(self, method, path, token=None, headers=None, **kwargs):
        if not path.startswith("/"):
            path = f"/api/v1/{path}"
        headers = dict(headers or {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        response = self.app.test_client().open(
            path, method=method, headers=headers,
            environ_base={"REMOTE_ADDR": self.address}, **kwargs,
        )
        self.contract.check(method, path.partition("?")[0], response.status_code,
                            response.headers, response.get_data())
        return response

    def get(self, path, **kwargs):
        return self.open("GET", path, **kwargs)

    def head(self, path, **kwargs):
        return self.open("HEAD", path, **kwargs)

    def post(self, path, **kwargs):
        return self.open("POST", path, **kwargs)

    def patch(self, path, **kwargs):
        return self.open("PATCH", path, **kwargs)

    def delete(self, path, **kwargs):
        return self.open("DELETE", path, **kwargs)

    def options(self, path, **kwargs):
        return self.open("OPTIONS", path, **kwargs)


@pytest.fixture(scope="session")
def make_client(app):
    """A function that makes a Client: of another app, or from another address."""
    return lambda app=app, address="127.0.0.1": Client(app, address)


@pytest.fixture(scope="session")
def client(app):
    return Client(app)


def unique(word="x"):
    """A word that no other test has."""
    return f"{word}{os.getpid()}n{next(_numbers)}"


@pytest.fixture(scope="session")
def admin(client, database_url):
    """An administrator: id, email, token, refresh_token."""
    person = register(client)
    execute(database_url, f"UPDATE users SET role = 'admin' WHERE id = {person.id}")
    return person


@pytest.fixture
def user(client):
    """A user of this test's own: id, email, token, refresh_token."""
    return register(client)


@pytest.fixture
def other(client):
    """Another user."""
    return register(client)


def register(client, **fields):
    """Register through the API. Returns id, email, password, token, refresh_token."""
    body = {"email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada Lovelace"}
    response = client.post("auth/register", json=body | fields)
    assert response.status_code == 201, response.text
    data = response.json
    return SimpleNamespace(id=data["user"]["id"], email=data["user"]["email"], password=PASSWORD,
                           token=data["token"], refresh_token=data["refresh_token"])


@pytest.fixture
def make_category(client, admin):
    def make(name=None):
        response = client.post("categories", token=admin.token,
                               json={"name": name or unique("Category ")})
        assert response.status_code == 201, response.text
        return response.json
    return make


@pytest.fixture
def make_product(client, admin):
    """A function that creates a product through the API and returns it."""
    def make(**fields):
        body = {"name": unique("Product "), "price": "10.00", "stock": 100} | fields
        response = client.post("products", token=admin.token, json=body)
        assert response.status_code == 201, response.text
        return response.json
    return make


class Address:
    """Whoever answers HTTP at a port. ``call`` asks."""

    def __init__(self, port):
        self.port, self.base = port, f"http://127.0.0.1:{port}"

    def call(self, method, path, token=None, json=None, headers=None, data=None, timeout=30):
        """(status, headers, body bytes, json()) of one request."""
        if not path.startswith("/"):
            path = f"/api/v1/{path}"
        headers = dict(headers or {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if json is not None:
            data = dumps(json).encode()
            headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server(Address):
    """A real gunicorn with real workers."""

    def __init__(self, env, folder=ROOT, workers=2, port=None):
        super().__init__(port or free_port())
        self.log_file = tempfile.NamedTemporaryFile(suffix=".log", delete=False)  # noqa: SIM115
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {
            "WEB_CONCURRENCY": str(workers), "PYTHONUNBUFFERED": "1"} | env
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{self.port}"],
            cwd=folder, env=env, stdout=self.log_file, stderr=self.log_file, start_new_session=True,
        )

    def wait(self, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"gunicorn ended: {self.log}")
            with contextlib.suppress(OSError), socket.create_connection(
                ("127.0.0.1", self.port), timeout=1
            ):
                if self.call("GET", "/health").status == 200:
                    return self
            time.sleep(0.02)
        raise AssertionError(f"gunicorn does not answer: {self.log}")

    @property
    def log(self):
        return pathlib.Path(self.log_file.name).read_text(errors="replace")[-5000:]

    @property
    def worker_pids(self):
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        for pid in children.read_text().split():
            with contextlib.suppress(FileNotFoundError):  # it has ended since
                if b"gunicorn" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    def stop(self, how=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log_file.close()
        pathlib.Path(self.log_file.name).unlink(missing_ok=True)


dumps = json.dumps


class Answer(SimpleNamespace):
    def __init__(self, status, headers, body):
        super().__init__(status=status, headers=headers, body=body)

    def json(self):
        return json.loads(self.body)


@contextlib.contextmanager
def serving(settings):
    """A function that starts gunicorn against the test servers: ``serve(workers=2, **env)``."""
    with contextlib.ExitStack() as running:
        def start(workers=2, **env):
            # Nobody takes mail there: it stays in the queue, not in the project's own outbox.
            quiet = {"LOG_LEVEL": "WARNING", "SMTP_URL": "smtp://127.0.0.1:1"}
            server = Server(settings | quiet | env, workers=workers)
            running.callback(server.stop)
            return server.wait()
        yield start


@pytest.fixture(scope="module")
def serve(settings):
    """As ``serving``, for the tests of a file."""
    with serving(settings) as start:
        yield start


@pytest.fixture(scope="session")
def server(settings):
    """One gunicorn with two workers for every test that needs real processes and no more."""
    with serving(settings) as start:
        yield start()


@pytest.fixture
def copy_of_project(tmp_path):
    """The project's files in a folder of their own, as a fresh checkout would be."""
    target = tmp_path / "shop"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


# What takes twenty seconds and more, the longest first: what is begun last keeps others waiting.
LONGEST = ["test_embedded", "test_worker", "test_docs", "test_faults", "test_schemathesis",
           "test_limits", "test_cli", "test_contributing", "test_metrics", "test_pooler",
           "test_wire", "test_throttle", "test_model", "test_clients", "test_logs",
           "test_cache_marks", "test_access_matrix", "test_operations", "test_reports",
           "test_security"]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_configure(config):
    config.pluginmanager.register(Guard())


def pytest_sessionfinish(session):
    """Clean up behind the last worker."""
    if not hasattr(session.config, "workerinput"):
        manager = session.config.pluginmanager.getplugin("dsession")
        run = manager.nodemanager.testrunuid if manager else str(os.getpid())
        shutil.rmtree(run_folder_of(run), ignore_errors=True)
