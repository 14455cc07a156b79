"""Logs: one JSON object a line, to stdout and, with LOG_DIR, to files that rotate themselves.

Any number of processes write to the same file. Lines are written whole to a descriptor opened with
O_APPEND, and the kernel doesn't split a write. A process that finds the file too large renames it
under a lock.
"""
import collections
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
from select import PIPE_BUF
from typing import TextIO

from flask import Flask

from extensions.http import metrics
from extensions.http.visit import Visit, visit

MAX_BYTES = 20 * 1024 * 1024
KEEP_DAYS = 14
SKIP = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "line"}

log = logging.getLogger("shopfront.logs")
security = logging.getLogger("shopfront.security")


_encode = json.JSONEncoder(default=str).encode


class Json(logging.Formatter):
    """One JSON object: time, level, logger, message, the request's id and ``extra`` fields."""

    def format(self, record: logging.LogRecord) -> str:
        if (done := vars(record).get("line")) is None:  # formatted once for all handlers
            done = record.line = _encode(self.fields(record))
        return done

    def fields(self, record: logging.LogRecord) -> dict:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname, "logger": record.name, "message": record.getMessage(),
        }
        if here := visit():
            line["request_id"] = here.id
            if trace_id := here.trace_id:
                line["trace_id"] = trace_id
        line |= {k: v for k, v in vars(record).items() if k not in SKIP}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return line


class Text(Json):
    """Short lines for people, in colour: time, level, message and the other fields."""

    COLOURS = {"DEBUG": 2, "WARNING": 33, "ERROR": 31, "CRITICAL": 31}

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        message = fields["message"].translate(CONTROLS)
        traceback = fields.pop("traceback", None)
        more = "".join(f" {name}={value}" for name, value in fields.items() if name not in SHOWN)
        line = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname:7} {message}{_dim(more)}"
        if colour := self.COLOURS.get(record.levelname):
            line = f"\x1b[{colour}m{line}\x1b[0m"
        return f"{line}\n{traceback}" if traceback else line


SHOWN = {"time", "level", "logger", "message", "request_id", "event"}
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def _dim(text):
    return text and f"\x1b[2m{text.translate(CONTROLS)}\x1b[22m"


class SharedFile(logging.Handler):
    """Appends to ``path``; at 20 MB or at midnight UTC it is renamed, gzipped, and kept 14 days."""

    def __init__(self, path: pathlib.Path | str, max_bytes: int = MAX_BYTES) -> None:
        super().__init__()
        self.path, self.max_bytes = pathlib.Path(path), max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = -1

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(self.format(record).encode() + b"\n")
        except OSError:
            self.handleError(record)

    def write(self, lines: bytes) -> None:
        """Append whole lines. The caller holds the handler's lock."""
        # Checked before the write: a renamed file is soon gzipped, and must get no more lines.
        if self._file < 0 or self._renamed():
            self._open()
        os.write(self._file, lines)
        if os.fstat(self._file).st_size >= self.max_bytes or time.time() // 86400 > self._day:
            self._rotate()

    def _open(self):
        old, self._file = self._file, os.open(
            self.path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o640)
        if old >= 0:  # only now: a closed descriptor's number may be reused at once
            os.close(old)
        self._day = os.fstat(self._file).st_mtime // 86400
        self._checked = time.monotonic()

    def _renamed(self):
        """Whether another process has renamed the file; checked at most once a second."""
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
    """Gzip a renamed file once no process writes to it any more; delete those too old."""
    time.sleep(2)  # others look for the new file once a second
    packed = old.with_suffix(".log.gz")
    with open(old, "rb") as source, gzip.open(f"{packed}.new", "wb") as target:
        shutil.copyfileobj(source, target)
    os.rename(f"{packed}.new", packed)
    old.unlink()
    for file in path.parent.glob(f"{path.stem}-*.log*"):  # also what a killed process didn't gzip
        with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
            if file.stat().st_mtime < time.time() - KEEP_DAYS * 86400:
                file.unlink()


# No line shows where it was logged, so logging needn't find out (its HOWTO, "Optimization").
logging._srcfile = None


class Access:
    """The access log: a line for each request, written without the logging module's machinery.

    Its lines have the same format and destinations as all others. ``note`` queues a line, ``flush``
    writes all queued ones: one write for all requests that were answered together.
    """

    def __init__(self, stream: TextIO, files: list[SharedFile], people: bool, shown: bool) -> None:
        self._stream, self._files, self._people, self._shown = stream, files, people, shown
        self._lines: collections.deque[str] = collections.deque()
        self._second, self._stamp = 0, ""

    def note(self, visit: Visit, status: str) -> None:
        """Keep a line until the next ``flush``, unless LOG_LEVEL excludes it."""
        if not self._shown:
            return
        now = time.time()
        second = int(now)
        if second != self._second:
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        agent, path = visit.environ.get("HTTP_USER_AGENT"), visit.shown_path
        trace = f', "trace_id": "{visit.trace_id}"' if visit.trace_id else ""
        self._lines.append(
            f'{{"time": "{self._stamp}.{int(now % 1 * 1000):03d}+00:00", "level": "INFO", '
            f'"logger": "shopfront.access", "message": {_quoted(f"{visit.method} {path}")}, '
            f'"request_id": "{visit.id}", "method": {_quoted(visit.method)}, '
            f'"path": {_quoted(path)}, "status": {status}, '
            f'"milliseconds": {(time.perf_counter() - visit.started) * 1000:.2f}, '
            f'"address": {_quoted(visit.address)}, '
            f'"user_agent": {"null" if agent is None else _quoted(agent)}, '
            f'"user_id": {"null" if visit.caller_id is None else visit.caller_id}'
            f'{trace}}}\n')

    def flush(self) -> None:
        if not self._lines:
            return
        lines = []
        with contextlib.suppress(IndexError):  # each line goes to one of several flushing threads
            while True:
                lines.append(self._lines.popleft())
        if not lines:
            return
        data = "".join(lines).encode()
        try:
            if self._people:
                self._stream.write("".join(map(_for_people, lines)))
                self._stream.flush()
            else:  # a pipe may split larger writes, and other processes write to it, too
                for part in [data] if len(data) <= PIPE_BUF else map(str.encode, lines):
                    self._stream.buffer.write(part)
                    self._stream.flush()
            for file in self._files:
                with file.lock:  # type: ignore[union-attr] # every handler has one
                    file.write(data)
        except OSError as error:  # a full disk must not stop the service
            log.error("the access log can't be written: %s", error)


_quoted = json.encoder.encode_basestring_ascii


def _for_people(line):
    """A line of the access log for people, made from the JSON line: speed is no concern."""
    line = json.loads(line)
    colour = {2: 32, 3: 36, 4: 33}.get(line["status"] // 100, 31)
    what = line["message"].translate(CONTROLS)
    user = f" user={line['user_id']}" if line["user_id"] else ""
    more = f"{user} {line['milliseconds']:.1f} ms"
    return (f"{time.strftime('%H:%M:%S')} \x1b[{colour}m{line['status']}\x1b[0m {what}"
            f"{_dim(more)}\n")


def init_app(app: Flask) -> None:
    root = logging.getLogger("shopfront")
    root.setLevel(app.config["LOG_LEVEL"])
    root.propagate = False
    for old in root.handlers:
        old.close()
    files: list[SharedFile] = []
    if folder := app.config["LOG_DIR"]:
        files = [SharedFile(f"{folder}/app.log"), SharedFile(f"{folder}/error.log")]
        files[1].setLevel(logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout), *files]
    people = app.config["LOG_FORMAT"] == "text" or (
        not app.config["LOG_FORMAT"] and app.config["APP_ENV"] == "development"
        and sys.stdout.isatty()
    )
    for handler in handlers:
        handler.setFormatter(Json())
    if people:
        handlers[0].setFormatter(Text())
    root.handlers = handlers
    # Only the pool's own logger says why it can't connect.
    pool = logging.getLogger("psycopg.pool")
    pool.handlers, pool.propagate = handlers, False
    pool.setLevel(max(root.level, logging.WARNING))
    security.setLevel(logging.INFO)  # whatever LOG_LEVEL is
    app.extensions["access_log"] = Access(
        sys.stdout, files[:1], people, root.isEnabledFor(logging.INFO))


def event(name: str, **facts: object) -> None:
    """A security event: who, from where; never a password, a token or a hash."""
    metrics.EVENTS.labels(name).inc()
    security.info(name, extra={"event": name, "address": visit().address, **facts})
