"""The gunicorn worker: whole requests only, the door in the loop, threads for what needs them.

One thread, the loop, accepts, reads and waits for all clients. Once a request is there to its last
byte it is parsed, by gunicorn, and the requests that arrived together go through the door together.
What the door answers is sent at once; the rest goes to the threads. So a client that is slow to
send holds a buffer, not a thread, and a short answer costs neither a thread switch nor a fight for
the interpreter. Answers that a client is slow to read are sent on by the loop, but for streams,
which keep their thread.

Behind TLS of gunicorn's own the plain ThreadWorker does the work.
"""
import contextlib
import errno
import functools
import io
import logging
import re
import resource
import selectors
import socket
import time
from functools import partial

from gunicorn import glogging, util
from gunicorn.http import message, unreader, wsgi
from gunicorn.workers.gthread import ThreadWorker

from extensions.errors import Problem
from extensions.visit import Visit

HEAD_SECONDS, BODY_SECONDS = 10, 30  # for a head from its first byte, and then for the body
READ_SECONDS = 60  # for the client to take some of an answer
CLOSE_SECONDS = 2  # for the client's own farewell (RFC 9112, 9.6)
LOOK_SECONDS = 0.25  # how often deadlines are looked at
BLOCK = 65536
LARGEST_HEAD = 65536
AHEAD = 65536  # what may be sent ahead while an answer is made
FRAMING = 1 << 20  # what a body in chunks may have around its bytes
LARGEST_ALL = 64 << 20  # what all connections of a worker may hold together
WHOLE = 1 << 20  # an answer up to this size is sent in one piece
CONNECTIONS = 8192

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*(?=\r\n)", re.I)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.I)
_EXPECTS = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.I)
_FIRST_LINE = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]{0,2000})")
_SOUND = re.compile(r"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")

# Between requests; a request's head or body is arriving; an answer is being made, sent; farewell.
IDLE, HEAD, BODY, BUSY, WRITING, CLOSING = range(6)


class Connection:
    """A client's connection: what it has sent, and what it waits for."""

    __slots__ = ("address", "closes", "data", "deadline", "end", "eof", "out", "problem", "scanned",
                 "server", "sock", "state", "watched")

    def __init__(self, sock, address, server):
        self.sock, self.address, self.server = sock, address, server
        self.state, self.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        self.data, self.out = bytearray(), b""
        self.end = None  # where the first request in ``data`` ends, -1 while its chunks must tell
        self.scanned = 0  # how far these have been looked through
        self.problem = None  # why the request is refused, if its head has been read
        self.closes = self.eof = False
        self.watched = 0


class Request(message.Request):
    """gunicorn's, which remembers the headers that clients send again and again."""

    _seen = {}

    def parse_headers(self, data, from_trailer=False):
        if from_trailer or len(data) > 1024:
            return super().parse_headers(data, from_trailer)
        key = data, _host(self.peer_addr)  # whom gunicorn may believe more, or less
        seen = self._seen.get(key)
        if seen is None:
            seen = super().parse_headers(data), self.scheme
            if len(self._seen) >= 4096:
                self._seen.clear()
            self._seen[key] = seen
        headers, self.scheme = seen
        return headers


class Gathered(unreader.Unreader):
    """What has arrived of a request, for gunicorn's parser: there is no more to come."""

    def __init__(self, data):
        self.buf = io.BytesIO()
        self.buf.write(data)

    def chunk(self, size_hint=None):
        return b""


class Response(wsgi.Response):
    """gunicorn's, whose head is checked as one text and sent in one piece with the body."""

    _text = None

    def process_headers(self, headers):
        text = "".join([f"{name}: {value}\r\n" for name, value in headers])
        names = [name.lower() for name, _ in headers]
        if not _SOUND.fullmatch(text) or text.count("\r\n") != len(headers) \
                or not util.hop_headers.isdisjoint(names):
            super().process_headers(headers)  # says what is wrong, or leaves hop-by-hop ones out
            return
        if "content-length" in names:
            self.response_length = int(headers[names.index("content-length")][1])
        self.headers, self._text = headers, text

    def default_headers(self):
        major, minor = self.req.version
        lines = [f"HTTP/{major}.{minor} {self.status}\r\nServer: {self.version}\r\n"
                 f"Date: {_date(int(time.time()))}\r\n"
                 f"Connection: {'close' if self.should_close() else 'keep-alive'}\r\n"]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked\r\n")
        return lines

    def send_headers(self):
        if not self.headers_sent:
            self.sock.sendall(self._head())

    def whole(self, body):
        """The bytes of the answer, whose body is there to its end."""
        return self._head() + (b"" if self._omits_body else body)

    def _head(self):
        self.headers_sent = True
        text = self._text
        if text is None or text.count("\r\n") != len(self.headers):
            text = "".join([f"{name}: {value}\r\n" for name, value in self.headers])
        return "".join([*self.default_headers(), text, "\r\n"]).encode("latin-1")


@functools.lru_cache(maxsize=2)
def _date(second):
    return util.http_date(second)


class Worker(ThreadWorker):
    """The loop. Only it touches the poller; a thread has a connection while that is BUSY."""

    def init_process(self):
        # Config looks every setting up by its name, some twenty times a request.
        vars(self.cfg).update({name: s.get() for name, s in self.cfg.settings.items()})
        self.connections, self.arrived, self.held = {}, [], 0
        self.looked = self.notified = 0.0
        # Beside clients there are Redis, the database, logs and whatever a view opens.
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        self.worker_connections = max(1, min(CONNECTIONS, files - 200))
        super().init_process()

    def load_wsgi(self):
        super().load_wsgi()
        app = self.app.wsgi()
        self.door, self.draining = app.extensions["door"], app.extensions["draining"]
        self.largest = app.config["MAX_CONTENT_LENGTH"]
        self.drain_seconds, self.leaves = app.config["DRAIN_SECONDS"], None

    def handle_exit(self, sig, frame):
        """TERM: say 'draining' to whoever asks, for a while, and leave then."""
        self.draining.set()
        if self.drain_seconds and self.alive:
            self.leaves = self.leaves or time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    def notify(self):
        now = time.monotonic()
        if now - self.notified > 0.5:
            self.notified = now
            super().notify()

    # Reading

    def accept(self, listener):
        if self.cfg.is_ssl:
            super().accept(listener)
            return
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.shed()
                time.sleep(0.01)  # the listener stays readable
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
                raise
            return
        sock.setblocking(True)  # for threads that send; the loop says MSG_DONTWAIT
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conn = Connection(sock, address, listener.getsockname())
        self.nr_conns += 1
        self.connections[conn] = True
        self.watch(conn, selectors.EVENT_READ)
        if self.nr_conns >= self.worker_connections:
            self.shed()

    def wait_for_and_dispatch_events(self, timeout):
        super().wait_for_and_dispatch_events(0 if self.arrived else min(timeout, LOOK_SECONDS))
        if self.arrived:
            arrived, self.arrived = self.arrived, []
            self.serve(arrived)

    def ready(self, conn, sock):
        """The poller's word: there is something to read, or room to write."""
        if conn.state == WRITING:
            self.flush(conn)
            return
        try:
            more = sock.recv(BLOCK, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            more = b""
        if conn.state == CLOSING:
            if not more:
                self.drop(conn)
        elif more:
            conn.data += more
            self.held += len(more)
            if conn.state != BUSY:
                self.gather(conn)
            elif len(conn.data) > AHEAD:
                self.watch(conn, 0)
        else:
            conn.eof = True
            if conn.state == BUSY:  # whoever shut only its own side waits for the answer
                self.watch(conn, 0)
            else:
                self.drop(conn)

    def gather(self, conn):
        """See whether a request has arrived whole, or is to be refused before it has."""
        if conn.state == IDLE:
            conn.state, conn.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        try:
            whole = self.whole(conn)
            if not whole and self.held > LARGEST_ALL:
                raise Problem("unavailable", "Too much is being sent at once.",
                              headers={"Retry-After": "5"})
        except Problem as problem:
            self.refuse(conn, problem)
        else:
            if whole:
                conn.state = BUSY
                self.arrived.append((conn, time.perf_counter()))

    def whole(self, conn):
        """Whether ``data`` has a request to its end. Raises a Problem where it never shall.

        What can't be told here counts as whole: gunicorn's parser says what is wrong with it.
        """
        data = conn.data
        if conn.end is None:
            while data[:2] == b"\r\n":  # an empty line in front is passed over (RFC 9112, 2.2)
                del data[:2]
                self.held -= 2
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > LARGEST_HEAD or data.count(b"\n") != data.count(b"\r\n"):
                    conn.end = len(data)  # too much, or with lines that end in LF alone
                return conn.end is not None
            head, body = data[:end + 2], end + 4
            lengths, chunked = _LENGTH.findall(head), _CHUNKED.search(head)
            if chunked and not lengths:
                conn.end, conn.scanned = -1, body
            elif len(lengths) == 1 and not chunked:
                conn.end = body + int(lengths[0])
            else:
                conn.end = body
            if conn.end - body > self.largest:
                raise Problem("payload_too_large")
            if conn.end != body:
                conn.state, conn.deadline = BODY, time.monotonic() + BODY_SECONDS
                if len(data) == body and _EXPECTS.search(head):
                    with contextlib.suppress(OSError):
                        conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        if conn.end == -1:
            conn.end = self.end_of_chunks(conn)
        return 0 <= conn.end <= len(data)

    def end_of_chunks(self, conn):
        """Where a body in chunks ends, or -1 while that isn't known (RFC 9112, 7.1)."""
        data = conn.data
        if len(data) > self.largest + FRAMING:
            raise Problem("payload_too_large")
        while (line := data.find(b"\r\n", conn.scanned, conn.scanned + 8192)) >= 0:
            digits = bytes(data[conn.scanned:line]).partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", digits):
                return len(data)
            size = int(digits, 16)
            if size == 0:  # then come trailers, if any, and an empty line
                end = data.find(b"\r\n\r\n", line)
                if end < 0 and len(data) - line > LARGEST_HEAD:
                    return len(data)
                return end + 4 if end >= 0 else -1
            if size > self.largest:
                raise Problem("payload_too_large")
            if line + 2 + size + 2 > len(data):
                return -1
            conn.scanned = line + 2 + size + 2
        return len(data) if len(data) - conn.scanned > 8192 else -1

    def refuse(self, conn, problem):
        """Answer with a problem, and close. If its head is there, the request passes the door."""
        conn.closes, conn.problem = True, problem
        self.held -= len(conn.data)
        end = conn.data.find(b"\r\n\r\n")
        if end >= 0:
            conn.data, conn.end = conn.data[:end + 4], end + 4
            self.held += len(conn.data)
            conn.state = BUSY
            self.arrived.append((conn, time.perf_counter()))
            return
        line = _FIRST_LINE.match(conn.data)
        method, target = line.groups() if line else (b"-", b"/")
        conn.data = bytearray()
        visit = Visit({"REQUEST_METHOD": method.decode(), "REMOTE_ADDR": _host(conn.address),
                       "PATH_INFO": target.partition(b"?")[0].decode()})
        status, headers, body = self.door.refuse(visit, problem)
        self.door.log.flush()
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        date = _date(int(time.time()))
        self.finish(conn, f"HTTP/1.1 {status}\r\nDate: {date}\r\nConnection: close\r\n{lines}\r\n"
                    .encode("latin-1") + body)

    # Answering

    def serve(self, arrived):
        """Parse requests that arrived together; answer them, or give them to the threads."""
        asked = []
        for conn, started in arrived:
            data, conn.end = bytes(conn.data[:conn.end]), None
            del conn.data[:len(data)]
            self.held -= len(data)
            try:
                request = Request(self.cfg, Gathered(data), conn.address)
                request._expected_100_continue = False  # it has been answered
                response, environ = wsgi.create(
                    request, conn.sock, conn.address, conn.server, self.cfg, Response)
            except Exception as error:
                self.log.debug("Not a request: %r", error)
                self.held -= len(conn.data)
                conn.data = bytearray(data.partition(b"\r\n\r\n")[0])
                self.held += len(conn.data)
                self.refuse(conn, Problem("bad_request"))
                continue
            environ["wsgi.multithread"] = True
            visit = self.door.visit(environ, started)
            visit.problem = conn.problem
            self.nr += 1
            if self.nr >= self.max_requests:
                self.alive = False
            conn.closes = conn.closes or conn.eof or not self.alive
            if conn.closes:
                response.force_close()
            asked.append((visit, conn, request, response))
        if not asked:
            return
        answers = self.door.answers([visit for visit, *_ in asked])
        for (visit, conn, request, response), answer in zip(asked, answers, strict=True):
            if answer is None:
                self.tpool.submit(self.work, visit, conn, request, response)
            else:
                status, headers, body = answer
                response.start_response(status, headers)
                conn.closes = response.should_close()
                self.finish(conn, response.whole(body))

    def work(self, visit, conn, request, response):
        """Have a request answered, in a thread."""
        data = b""
        try:
            parts = self.door.ask(visit, response.start_response)
            try:
                length = 0 if response._omits_body else response.response_length
                if length is not None and length <= WHOLE:
                    data = response.whole(b"".join(parts))
                else:
                    conn.sock.settimeout(READ_SECONDS)
                    for part in parts:
                        response.write(part)
                    response.close()
                    conn.sock.settimeout(None)
            finally:
                if hasattr(parts, "close"):
                    parts.close()
            conn.closes = response.should_close()
        except Exception as error:
            if not isinstance(error, OSError):
                self.log.exception("Error handling request %s", request.uri)
            conn.closes = True
        if not self.send(conn, data) or conn.closes:
            self.method_queue.defer(self.finish, conn, b"")
            return
        self.rest(conn)
        if conn.data or conn.eof or not conn.watched:  # something came meanwhile
            self.method_queue.defer(self.go_on, conn)

    def finish(self, conn, data):
        """Send an answer, or what is left of it; then be ready for the next request, or part."""
        if conn not in self.connections:
            return
        if not self.send(conn, data):
            conn.state, conn.deadline = WRITING, time.monotonic() + READ_SECONDS
            self.watch(conn, selectors.EVENT_WRITE)
        elif conn.closes:
            self.part(conn)
        else:
            self.rest(conn)
            if conn.data or conn.eof or conn.watched != selectors.EVENT_READ:
                self.go_on(conn)

    def send(self, conn, data):
        """Send as much as the socket takes at once. Whether that was everything."""
        data = conn.out + data if conn.out else data
        try:
            sent = conn.sock.send(data, socket.MSG_DONTWAIT) if data else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            conn.eof, sent = True, len(data)
            conn.closes = True
        conn.out = data[sent:]
        return not conn.out

    def flush(self, conn):
        left = len(conn.out)
        if self.send(conn, b""):
            self.finish(conn, b"")
        elif len(conn.out) < left:
            conn.deadline = time.monotonic() + READ_SECONDS

    def rest(self, conn):
        conn.deadline = time.monotonic() + (self.cfg.keepalive if self.alive else CLOSE_SECONDS)
        conn.state = IDLE

    def go_on(self, conn):
        """With the loop again: what came while the answer was made."""
        if conn.state != IDLE or conn not in self.connections:
            return
        if conn.data:
            self.gather(conn)
        if conn.eof and conn.state != BUSY:
            self.drop(conn)
        elif not conn.eof:
            self.watch(conn, selectors.EVENT_READ)

    def part(self, conn):
        """Close this side, and wait for the client's: a reset would take the answer with it."""
        if conn.eof:
            self.drop(conn)
            return
        conn.state, conn.deadline = CLOSING, time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
        self.watch(conn, selectors.EVENT_READ)

    def drop(self, conn):
        self.watch(conn, 0)
        self.connections.pop(conn)
        self.held -= len(conn.data)
        self.nr_conns -= 1
        conn.sock.close()

    def watch(self, conn, events):
        if events == conn.watched:
            return
        if not events:
            self.poller.unregister(conn.sock)
        elif conn.watched:
            self.poller.modify(conn.sock, events, partial(self.ready, conn))
        else:
            self.poller.register(conn.sock, events, partial(self.ready, conn))
        conn.watched = events

    # Time

    def murder_keepalived(self, force=False):
        """End what has waited too long."""
        now = time.monotonic()
        if not force and now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        if self.leaves and now > self.leaves:
            self.alive = False
        for conn in list(self.connections):
            if force or (conn.state != BUSY and conn.deadline < now):
                if conn.state in (HEAD, BODY) and conn.data and not force:
                    self.refuse(conn, Problem("request_timeout"))
                else:
                    self.drop(conn)

    def shed(self):
        """Part with some of those who wait longest: others want to come in."""
        waiting = [conn for conn in self.connections if conn.state != BUSY]
        for conn in sorted(waiting, key=lambda conn: conn.deadline)[:len(waiting) // 10 + 1]:
            self.drop(conn)

    def _cap_keepalive(self, deadline):
        for conn in self.connections:
            if conn.state == IDLE:
                conn.deadline = min(conn.deadline, deadline)


class Log(glogging.Logger):
    """gunicorn's own messages, as lines like all others, to where they go."""

    def setup(self, cfg):
        self.cfg, self.loglevel = cfg, self.LOG_LEVELS[cfg.loglevel]
        self._access_log_enabled = False  # the door has its own
        self.error_log = logging.getLogger("shopfront.gunicorn")
        self.error_log.setLevel(self.loglevel)


def _host(address):
    return address[0] if isinstance(address, tuple) else ""
