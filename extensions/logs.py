"""Logs: one JSON object a line, to stdout and, with LOG_DIR, to files that rotate themselves.

Any number of processes write one file. Each line is one write to a descriptor opened with O_APPEND,
which the kernel doesn't split; whoever finds the file too large renames it under a lock.
"""
import contextlib
import fcntl
import gzip
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import time
from datetime import UTC, datetime

from flask import g, has_request_context, request

MAX_BYTES = 20 * 1024 * 1024
KEEP_DAYS = 14
SKIP = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "line"}

access = logging.getLogger("shopfront.access")
security = logging.getLogger("shopfront.security")


_encode = json.JSONEncoder(default=str).encode


class Json(logging.Formatter):
    """``extra`` fields and the request's id stand beside time, level, logger and message."""

    def format(self, record):
        if (done := vars(record).get("line")) is None:  # one text for all handlers
            done = record.line = _encode(self.fields(record))
        return done

    def fields(self, record):
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname, "logger": record.name, "message": record.getMessage(),
        }
        if has_request_context() and "request_id" in g:
            line["request_id"] = g.request_id
        line |= {k: v for k, v in vars(record).items() if k not in SKIP}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return line


class SharedFile(logging.Handler):
    """Appends to ``path``; at 20 MB or at midnight UTC it is renamed, gzipped, and kept 14 days."""

    def __init__(self, path, max_bytes=MAX_BYTES):
        super().__init__()
        self.path, self.max_bytes = pathlib.Path(path), max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None

    def emit(self, record):
        try:
            line = self.format(record).encode() + b"\n"
            # Looked at before the write: a renamed file is packed soon, and takes no more lines.
            if self._file is None or self._renamed():
                self._open()
            os.write(self._file, line)
            if os.fstat(self._file).st_size >= self.max_bytes or time.time() // 86400 > self._day:
                self._rotate()
        except OSError:
            self.handleError(record)

    def _open(self):
        if self._file is not None:
            os.close(self._file)
        self._file = os.open(self.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o640)
        self._day = os.fstat(self._file).st_mtime // 86400
        self._checked = time.monotonic()

    def _renamed(self):
        """Whether another process has moved the file; asked once a second."""
        if time.monotonic() - self._checked < 1:
            return False
        self._checked = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            return os.stat(self.path).st_ino != os.fstat(self._file).st_ino
        return True

    def _rotate(self):
        mine = os.fstat(self._file).st_ino
        with open(self.path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists() and self.path.stat().st_ino == mine:
                stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H%M%S.%f")
                old = self.path.with_name(f"{self.path.stem}-{stamp}.log")
                self.path.rename(old)
                threading.Thread(target=_pack, args=(self.path, old)).start()
            self._open()


def _pack(path, old):
    """Gzip a file once nobody can still be writing to it, and drop those that are too old."""
    time.sleep(2)  # others look for the new file once a second
    packed = old.with_suffix(".log.gz")
    with open(old, "rb") as source, gzip.open(f"{packed}.new", "wb") as target:
        shutil.copyfileobj(source, target)
    os.rename(f"{packed}.new", packed)
    old.unlink()
    for file in path.parent.glob(f"{path.stem}-*.log*"):  # and what a killed process didn't pack
        with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
            if file.stat().st_mtime < time.time() - KEEP_DAYS * 86400:
                file.unlink()


# What no line shows is not looked up for every line (logging's HOWTO, "Optimization").
logging._srcfile = None
logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def init_app(app):
    root = logging.getLogger("shopfront")
    root.setLevel(app.config["LOG_LEVEL"])
    root.propagate = False
    for old in root.handlers:
        old.close()
    handlers = [logging.StreamHandler(sys.stdout)]
    if folder := app.config["LOG_DIR"]:
        handlers += [SharedFile(f"{folder}/app.log"), SharedFile(f"{folder}/error.log")]
        handlers[2].setLevel(logging.ERROR)
    for handler in handlers:
        handler.setFormatter(Json())
    root.handlers = handlers
    security.setLevel(logging.INFO)  # whatever else is left out

    @app.before_request
    def start():
        g.started = time.perf_counter()

    @app.after_request
    def note(response):
        asked, known = request._get_current_object(), g._get_current_object()
        caller = known.get("caller")
        access.info("%s %s", asked.method, asked.path, extra={
            "method": asked.method, "path": asked.path, "status": response.status_code,
            "milliseconds": round((time.perf_counter() - known.started) * 1000, 2),
            "address": asked.remote_addr, "user_agent": asked.environ.get("HTTP_USER_AGENT"),
            "user_id": caller and caller["id"],
        })
        return response


def event(name, **facts):
    """A security event: who, from where; never a password, a token or a hash."""
    security.info(name, extra={"event": name, "address": request.remote_addr, **facts})
