"""How gunicorn runs the shop: ``gunicorn`` in this folder reads this file by itself."""
import contextlib
import fcntl
import gc
import itertools
import os
import pathlib
import shutil
import socket
import tempfile

import psycopg
from flask import Flask
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker

import db
from db import migrations
from db.seed import DEMO, PASSWORD, NotEmpty, seed
from extensions import settings

wsgi_app = "wsgi:app"
worker_class = "extensions.front.worker.Worker"
logger_class = "extensions.front.worker.Log"
try:
    _settings = settings.read()
except settings.SettingsError as error:
    raise SystemExit(str(error)) from None
workers = _settings["WEB_CONCURRENCY"]
threads = _settings["WEB_THREADS"]
# The app is loaded once, in memory that the workers share; it holds no connection yet.
preload_app = True
http_parser = "python"  # gunicorn's C parser, if installed, doesn't apply our limits
forwarder_headers = ""  # no header can set SCRIPT_NAME, whoever sends it
keepalive = 15
timeout = 60
graceful_timeout = 30 + _settings["DRAIN_SECONDS"]
# All gunicorn instances of a user would share one control socket path.
control_socket_disable = True
# A heartbeat updates a file's times: on a disk it could block on I/O.
_memory = "/dev/shm"  # nosec B108 # gunicorn makes its files there by mkstemp
worker_tmp_dir = _memory if os.path.isdir(_memory) else None
loglevel = "warning"


def _locked(folder):
    """Lock a folder, for as long as this process or one forked from it lives."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _metrics_folder():
    """A new folder for all workers' metrics. Removes those that killed masters left behind."""
    shared = pathlib.Path(tempfile.gettempdir())
    for old in shared.glob("shopfront-metrics-[0-9]*-*"):
        with contextlib.suppress(OSError):  # in use, or somebody else's
            handle = _locked(old)
            shutil.rmtree(old, ignore_errors=True)
            os.close(handle)
    new = pathlib.Path(tempfile.mkdtemp(prefix="shopfront-new-"))
    _locked(new)  # before it has the name by which others find it
    folder = shared / new.name.replace("new", f"metrics-{os.getpid()}", 1)
    return str(new.rename(folder))


# It is already set if the operator did so, or if this file is read again.
if _settings["METRICS_TOKEN"] and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = _metrics_folder()


def on_starting(server: Arbiter) -> None:
    """Before the first worker: in development, migrate, and seed an empty embedded database.

    Whatever prevents the start is reported in one sentence, with exit code 1.
    """
    if not server.LISTENERS and not server.master_pid and "LISTEN_FDS" not in os.environ:
        for address in server.address:
            refuse_taken(address)
    app = server.app.wsgi()
    try:
        db.check_pooler(app.config)
        if app.config["APP_ENV"] != "production":
            prepare(app)
    except (db.PoolerError, migrations.MigrationError) as error:
        raise SystemExit(str(error)) from None
    except psycopg.OperationalError as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise SystemExit(f"The database can't be reached: {why}.") from None


def refuse_taken(address: object) -> None:
    """Exit if an address is taken: gunicorn would retry for five seconds and log six errors."""
    if not isinstance(address, tuple):
        return
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SystemExit(
                f"Can't listen on {address[0]} port {address[1]}: {error.strerror}."
            ) from None


def prepare(app: Flask) -> None:
    if app.config["DATABASE_URL"]:
        migrations.upgrade(app.config["DATABASE_URL"])
        return
    url = db.embedded_urls(app)[0]
    migrations.upgrade(url)
    with contextlib.suppress(NotEmpty):
        seed(url, DEMO)
        _first.append("Accounts: admin@example.com, user1@example.com to "
                      f"user{DEMO['users']}@example.com; password: {PASSWORD}")
        _first.append(f"Data: {app.instance_path}")


_first: list[str] = []  # what the first start prints besides the docs' URL


def when_ready(server: Arbiter) -> None:
    where = next((f"http://{host}:{port}" for host, port in
                  (a[:2] for a in server.address if isinstance(a, tuple))), "the socket")
    print(f"Shopfront is ready. Docs: {where}/api/v1/docs", *_first, sep="\n", flush=True)
    gc.freeze()  # the GC skips what exists now, so its pages stay shared by workers


def pre_fork(server: Arbiter, worker: Worker) -> None:
    """Give a worker the lowest number that no live worker has."""
    taken = {other.number for other in server.WORKERS.values()}
    worker.number = next(number for number in itertools.count(1) if number not in taken)


def post_fork(server: Arbiter, worker: Worker) -> None:
    from extensions.http import metrics  # not before PROMETHEUS_MULTIPROC_DIR is set
    metrics.process = process_of(worker)


def process_of(worker: Worker) -> str:
    """The name under which a worker's metrics count."""
    return f"{worker.ppid}-{worker.number}"


def child_exit(server: Arbiter, worker: Worker) -> None:
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from extensions.http import metrics
        metrics.forget(process_of(worker))


def post_worker_init(worker: Worker) -> None:
    worker.app.wsgi().extensions["upkeep"].start()


def on_exit(server: Arbiter) -> None:
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        shutil.rmtree(folder, ignore_errors=True)
