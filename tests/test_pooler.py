"""Behind PgBouncer in transaction mode, where a session is anybody's, everything holds."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from psycopg import conninfo

from db import migrations
from db.embedded import _user
from tests.conftest import ROOT, execute, unique

SERVERS = 2  # far fewer than clients, so that these do meet each other's sessions
PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="PgBouncer is not installed")


class Bouncer:
    """A PgBouncer on a Unix socket in front of the test servers' PostgreSQL."""

    def __init__(self, folder, server, **settings):
        folder.mkdir(mode=0o755)
        self.folder = folder
        into = conninfo.conninfo_to_dict(server)
        given = {k: into[k] for k in ("host", "port", "user", "password") if k in into}
        lines = ["[databases]", "* = " + " ".join(f"{k}={v}" for k, v in given.items()),
                 "[pgbouncer]", "listen_port = 6432", f"unix_socket_dir = {folder}",
                 "auth_type = any", "max_client_conn = 500"]
        settings = {"pool_mode": "transaction", "default_pool_size": SERVERS} | settings
        lines += [f"{name} = {value}" for name, value in settings.items()]
        config = folder / "pgbouncer.ini"
        config.write_text("\n".join(lines) + "\n")
        if user := _user():  # it refuses to run as root
            os.chown(folder, user["user"], user["group"])
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen([PROGRAM, config], stdout=log, stderr=log, **_user())
        end = time.monotonic() + 10
        while not (folder / ".s.PGSQL.6432").exists():
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


def test_migrations_at_once_apply_each_once(make_database, bouncer, tmp_path):
    url = make_database(empty=True)
    folder = tmp_path / "migrations"
    shutil.copytree(migrations.MIGRATIONS, folder)
    known = len(migrations.files())
    for number, sql in enumerate((
        "CREATE TABLE tally (n int, at timestamptz DEFAULT now());\nINSERT INTO tally VALUES (1);",
        "-- no-transaction\nCREATE INDEX CONCURRENTLY tally_idx ON tally (n);\n"
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
