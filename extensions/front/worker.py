"""The gunicorn worker: whole requests only, the door in the loop, threads for what needs them.

One thread, the loop, accepts, reads and waits for all clients. A request's head is parsed, by
gunicorn, once it is there; that alone tells where the request ends. Those that arrived together, to
their last byte, go through the door together.
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
import math
import re
import resource
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from gunicorn import glogging, util
from gunicorn.http import errors, message, unreader, wsgi
from gunicorn.http.body import CHUNK_EXT_RE, ChunkedReader
from gunicorn.workers.gthread import ThreadWorker

from extensions.cache import POLL_SECONDS
from extensions.http import metrics
from extensions.http.errors import Problem
from extensions.http.visit import Answer, Pairs, Visit

HEAD_SECONDS, BODY_SECONDS = 10, 30  # for a head from its first byte, and then for the body
READ_SECONDS = 60  # for the client to take some of an answer
FRESH_SECONDS = 0.5  # for a request on its way: behind a connection, behind an answer
CLOSE_SECONDS = 2  # for the client's own farewell (RFC 9112, 9.6)
LOOK_SECONDS = 0.25  # how often deadlines are looked at
SAMPLE_SECONDS = 1  # how often metrics are told of what there is
BLOCK = 65536
LARGEST_HEAD = 65536
LARGEST_LINE = 8192  # of a chunk's size and extensions
AHEAD = 65536  # what may be sent ahead while an answer is made
FRAMING = 1 << 20  # what a body in chunks may have around its bytes
LARGEST_ALL = 64 << 20  # what all connections of a worker may hold together
WHOLE = 1 << 20  # an answer up to this size is sent in one piece
CONNECTIONS = 8192

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})" + CHUNK_EXT_RE.pattern)
_HOST = re.compile(r"[\w\-.~%!$&'()*+,;=:\[\]]*", re.A)
_FIRST_LINE = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]{0,2000})")
_SOUND = re.compile(r"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")

# Between requests; a request's head or body is arriving; an answer is being made, sent; farewell.
IDLE, HEAD, BODY, BUSY, WRITING, CLOSING = range(6)


class Connection:
    """A client's connection: what it has sent, and what it waits for."""

    __slots__ = ("address", "closes", "data", "deadline", "end", "eof", "out", "problem", "request",
                 "scanned", "server", "sock", "state", "taken", "watched")

    request: Any  # a Request or an Unread
    problem: Problem | None

    def __init__(self, sock: socket.socket, address: Any, server: Any) -> None:
        self.sock, self.address, self.server = sock, address, server
        self.state, self.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        self.data, self.out = bytearray(), b""
        self.request = None  # whose head has been taken out of ``data``
        self.end = 0  # where its body ends there, -1 while its chunks must tell
        self.scanned = 0  # how far these have been looked through
        self.taken = 0  # the size of the body, while it is being answered
        self.problem = None  # why it is refused
        self.closes = self.eof = False
        self.watched = 0


class Request(message.Request):
    """gunicorn's, which remembers the headers that clients send again and again."""

    _seen: dict[tuple, tuple] = {}
    scheme: str

    def parse_headers(self, data: bytes, from_trailer: bool = False) -> Any:
        if from_trailer or len(data) > 1024:
            return super().parse_headers(data, from_trailer)
        key = data, _host(self.peer_addr)  # gunicorn trusts some addresses more
        seen = self._seen.get(key)
        if seen is None:
            seen = super().parse_headers(data), self.scheme
            if len(self._seen) >= 4096:
                self._seen.clear()
            self._seen[key] = seen
        headers, self.scheme = seen
        return headers

    def set_body_reader(self) -> None:
        super().set_body_reader()
        hosts, codings = 0, []
        for name, value in self.headers:
            if name == "HOST":
                hosts += 1
                if not _HOST.fullmatch(value):
                    raise errors.InvalidHeader("HOST")
            elif name == "TRANSFER-ENCODING":
                codings.append(value.lower())
            elif name == "CONNECTION" and "close" in re.split("[ \t]*,[ \t]*", value.lower()):
                self.force_close()
        if not hosts and self.version > (1, 0):  # RFC 9112, 3.2
            raise errors.InvalidHeader("HOST")
        if codings and codings != ["chunked"]:
            raise errors.UnsupportedTransferCoding(", ".join(codings))


class Unread:
    """In place of a request whose head can't be parsed: what its first line tells."""

    version = 1, 1
    method: str
    uri: str

    def __init__(self, data: bytes | bytearray) -> None:
        line = _FIRST_LINE.match(data)
        self.method, self.uri = (part.decode() for part in line.groups()) if line else ("-", "/")

    def environ(self, address: Any) -> dict:
        path, _, query = self.uri.partition("?")
        return {"REQUEST_METHOD": self.method, "PATH_INFO": util.unquote_to_wsgi_str(path),
                "QUERY_STRING": query, "REMOTE_ADDR": _host(address)}

    def should_close(self) -> bool:
        return True


class Gathered(unreader.Unreader):
    """The bytes of a request that are there, for gunicorn's parser, which never waits for more."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.buf = io.BytesIO()
        self.buf.write(data)

    def chunk(self, size_hint: int | None = None) -> bytes:
        return b""


class Response(wsgi.Response):
    """gunicorn's, whose head is checked as one text and sent in one piece with the body."""

    _text: str | None = None
    response_length: int | None

    def process_headers(self, headers: Pairs) -> None:
        text = "".join([f"{name}: {value}\r\n" for name, value in headers])
        names = [name.lower() for name, _ in headers]
        if not _SOUND.fullmatch(text) or text.count("\r\n") != len(headers) \
                or not util.hop_headers.isdisjoint(names):
            super().process_headers(headers)  # says what is wrong, or leaves hop-by-hop ones out
            return
        if "content-length" in names:
            self.response_length = int(headers[names.index("content-length")][1])
        self.headers, self._text = headers, text

    def default_headers(self) -> list[str]:
        minor = min(self.req.version[1], 1)  # RFC 9110, 2.5: what the server conforms to
        lines = [f"HTTP/1.{minor} {self.status}\r\nServer: {self.version}\r\n"
                 f"Date: {_date(int(time.time()))}\r\n"
                 f"Connection: {'close' if self.should_close() else 'keep-alive'}\r\n"]
        if self.chunked:
            lines.append("Transfer-Encoding: chunked\r\n")
        return lines

    def send_headers(self) -> None:
        if not self.headers_sent:
            self.sock.sendall(self._head())

    def whole(self, body: bytes) -> bytes:
        """The bytes of the answer, whose body is there to its end."""
        return self._head() + (b"" if self._omits_body else body)

    def _head(self):
        self.headers_sent = True
        text = self._text
        if text is None or text.count("\r\n") != len(self.headers):
            text = "".join([f"{name}: {value}\r\n" for name, value in self.headers])
        return "".join([*self.default_headers(), text, "\r\n"]).encode("latin-1")


Entered = tuple[Visit, Connection, Request | Unread, Response]


@functools.lru_cache(maxsize=2)
def _date(second):
    return util.http_date(second)


def contained(method: Callable) -> Callable:
    """A method of the loop whose error ends the connection that it is about, not the worker."""
    @functools.wraps(method)
    def call(self, conn, *args):
        if conn not in self.connections:  # dropped since this was called for
            return None
        try:
            return method(self, conn, *args)
        except Exception:
            self.log.exception("Error on a connection")
            with contextlib.suppress(Exception):
                self.drop(conn)
    return call


class Worker(ThreadWorker):
    """The loop. Only it touches the poller; a thread has a connection while that is BUSY."""

    def init_process(self) -> None:
        # Config looks every setting up by its name, some twenty times a request.
        self.cfg.__dict__.update({name: s.get() for name, s in self.cfg.settings.items()})
        self.connections: dict[Connection, bool] = {}
        self.arrived: list[tuple[Connection, float]] = []
        self.waiting: list[Entered] = []
        self.held = 0
        self.working: set[Connection] = set()  # those that threads have
        self.looked = self.notified = self.sampled = self.asked_again = 0.0
        # Beside clients there are Redis, the database, logs and whatever a view opens.
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        self.worker_connections = max(1, min(CONNECTIONS, files - min(200, files // 2)))
        super().init_process()

    def load_wsgi(self) -> None:
        super().load_wsgi()
        app = self.app.wsgi()
        self.door, self.draining = app.extensions["door"], app.extensions["draining"]
        self.largest = app.config["MAX_CONTENT_LENGTH"]
        self.sampler = app.extensions.get("sampler")
        self.drain_seconds = app.config["DRAIN_SECONDS"]
        self.leaves: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """TERM: say 'draining' to whoever asks, for a while, and leave then."""
        self.draining.set()
        if self.drain_seconds and self.alive:
            self.leaves = self.leaves or time.monotonic() + self.drain_seconds
        else:
            super().handle_exit(sig, frame)

    def notify(self) -> None:
        now = time.monotonic()
        if now - self.notified > 0.5:
            self.notified = now
            super().notify()

    # Reading

    def accept(self, listener: Any) -> bool:
        """Accept a client. Returns whether there was one."""
        if self.cfg.is_ssl:
            before = self.nr_conns
            super().accept(listener)
            return self.nr_conns > before
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                raise
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.shed()
                time.sleep(0.01)  # the listener stays readable
            return False  # any other error is about the client (accept(2), "Error handling")
        conn = Connection(sock, address, listener.getsockname())
        self.nr_conns += 1
        self.connections[conn] = True
        self.begin(conn)
        if self.nr_conns >= self.worker_connections:
            self.shed()
        return True

    @contained
    def begin(self, conn: Connection) -> None:
        conn.sock.setblocking(True)  # for threads that send; the loop says MSG_DONTWAIT
        if conn.sock.family != socket.AF_UNIX:
            conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.watch(conn, selectors.EVENT_READ)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        wait = POLL_SECONDS if self.waiting else min(timeout, LOOK_SECONDS)
        super().wait_for_and_dispatch_events(0 if self.arrived else wait)
        self.door.log.flush()
        if self.arrived:
            arrived, self.arrived = self.arrived, []
            self.serve(arrived)
        if self.waiting and time.monotonic() - self.asked_again > POLL_SECONDS:
            waiting, self.waiting = self.waiting, []
            self.knock(waiting, self.door.answers_again)
            self.asked_again = time.monotonic()

    @contained
    def ready(self, conn: Connection, sock: socket.socket) -> None:
        """The poller reports something to read, or room to write."""
        if conn not in self.connections:  # dropped since the poller spoke
            return
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
            if conn.state == BUSY:  # a half-closed client waits for its answer
                self.watch(conn, 0)
            elif conn.state == IDLE:  # a thread may just have left it, with more to answer
                self.watch(conn, 0)
                self.go_on(conn)
            else:
                self.drop(conn)

    def gather(self, conn: Connection) -> None:
        """Pass a request on once it is complete; refuse it as soon as it can't become valid."""
        if conn.state == IDLE:
            self.release(conn)
            conn.state, conn.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        try:
            whole = self.whole(conn)
            if not whole and self.held > LARGEST_ALL and len(conn.data) > BLOCK:
                raise Problem("unavailable", "Too much is being sent at once.",
                              headers={"Retry-After": "5"})
        except Problem as problem:
            self.refuse(conn, problem)
        else:
            if whole:
                self.arrive(conn)

    def whole(self, conn: Connection) -> bool:
        """Whether a request is complete. Raises a Problem where it can't become valid."""
        data = conn.data
        if conn.request is None:
            conn.request = request = self.head(conn)
            if request is None:
                return False
            reader = request.body.reader
            conn.end = -1 if isinstance(reader, ChunkedReader) else reader.length
            conn.scanned = 0
            if conn.end > self.largest:
                raise Problem("payload_too_large")
            if conn.end:
                conn.state, conn.deadline = BODY, time.monotonic() + BODY_SECONDS
                if not data and request._expected_100_continue:
                    with contextlib.suppress(OSError):
                        conn.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        if conn.end == -1:
            conn.end = self.end_of_chunks(conn)
        return 0 <= conn.end <= len(data)

    def head(self, conn: Connection) -> Request | None:
        """Take a request's head out of ``data``, parsed, or None while it isn't there."""
        data = conn.data
        while data[:2] == b"\r\n":  # an empty line in front is passed over (RFC 9112, 2.2)
            del data[:2]
            self.held -= 2
        end = data.find(b"\r\n\r\n", 0, LARGEST_HEAD)
        if end < 0:
            longest = self.cfg.limit_request_line
            if _bare(data, 0):
                raise Problem("bad_request")
            if len(data) > longest + 2 and data.find(b"\r\n", 0, longest + 2) < 0:
                raise Problem("uri_too_long")
            if len(data) > LARGEST_HEAD:
                raise Problem("headers_too_large")
            return None
        try:
            request = Request(self.cfg, Gathered(data[:end + 4]), conn.address)
        except errors.ParseException as error:
            raise _problem_of(error)
        del data[:end + 4]
        self.held -= end + 4
        return request

    def end_of_chunks(self, conn: Connection) -> int:
        """Where a body in chunks ends, or -1 while that isn't known (RFC 9112, 7.1).

        What gunicorn's parser would not take is refused here: a view may never read its body.
        """
        data = conn.data
        if len(data) > self.largest + FRAMING:
            raise Problem("payload_too_large")
        while (line := data.find(b"\r\n", conn.scanned, conn.scanned + LARGEST_LINE)) >= 0:
            found = _CHUNK.fullmatch(data, conn.scanned, line)
            if not found:
                raise Problem("bad_request")
            size = int(found[1], 16)
            if size == 0:
                return self.end_of_trailers(conn, line)
            if size > self.largest:
                raise Problem("payload_too_large")
            end = line + 2 + size
            if data[end:end + 2] != b"\r\n"[:max(0, len(data) - end)]:
                raise Problem("bad_request")
            if len(data) < end + 2:
                return -1
            conn.scanned = end + 2
        if _bare(data, conn.scanned) or len(data) - conn.scanned > LARGEST_LINE:
            raise Problem("bad_request")
        return -1

    def end_of_trailers(self, conn: Connection, line: int) -> int:
        """Where the trailers end, if there are any, behind the end of the last chunk's line."""
        data = conn.data
        end = data.find(b"\r\n\r\n", line, line + LARGEST_HEAD)
        if end < 0:
            if _bare(data, line):
                raise Problem("bad_request")
            if len(data) - line > LARGEST_HEAD:
                raise Problem("headers_too_large")
            return -1
        if end > line:
            try:
                conn.request.parse_headers(bytes(data[line + 2:end]), from_trailer=True)
            except errors.ParseException as error:
                raise _problem_of(error)
        return end + 4

    def refuse(self, conn: Connection, problem: Problem) -> None:
        """Answer with a problem, and close: where another request would begin isn't known."""
        conn.problem = problem
        if conn.request is None:
            conn.request = Unread(conn.data)
        self.held -= len(conn.data)
        conn.data, conn.end = bytearray(), 0
        self.arrive(conn)

    def arrive(self, conn: Connection) -> None:
        conn.state = BUSY
        self.arrived.append((conn, time.perf_counter()))

    # Answering

    def serve(self, arrived: list[tuple[Connection, float]]) -> None:
        """Have requests that arrived together answered, by the door or by the threads."""
        self.knock([entered for arrival in arrived if (entered := self.enter(*arrival))],
                   self.door.answers)

    def knock(self, asked: list[Entered], door: Callable) -> None:
        if not asked:
            return
        try:
            answers = door([visit for visit, *_ in asked])
        except Exception:
            if len(asked) > 1:  # one request's fault must not fail the others
                for one in asked:
                    self.knock([one], door)
                return
            self.log.exception("Error at the door")
            self.drop(asked[0][1])
            return
        for (visit, conn, request, response), answer in zip(asked, answers, strict=True):
            self.answer(conn, visit, request, response, answer)

    @contained
    def enter(self, conn: Connection, started: float) -> Entered | None:
        """(visit, conn, request, response) of a request; None if it turns out to be refused."""
        request, conn.request = conn.request, None
        if isinstance(request, Unread):
            environ = request.environ(conn.address)
            response = Response(request, conn.sock, self.cfg)
        else:
            request.unreader.unread(bytes(conn.data[:conn.end]))
            request._expected_100_continue = False  # it has been answered
            try:
                response, environ = wsgi.create(
                    request, conn.sock, conn.address, conn.server, self.cfg, Response)
            except errors.ConfigurationProblem as error:  # a path outside of SCRIPT_NAME
                conn.request = Unread(f"{request.method} {request.uri}".encode())
                self.refuse(conn, _problem_of(error))
                return None
        del conn.data[:conn.end]
        conn.taken = conn.end
        environ["wsgi.multithread"] = True
        visit = self.door.visit(environ, started)
        visit.problem = conn.problem
        self.nr += 1
        if self.nr >= self.max_requests:
            self.alive = False
        if conn.problem or (conn.eof and not conn.data) or not self.alive:
            response.force_close()
        return visit, conn, request, response

    @contained
    def answer(self, conn: Connection, visit: Visit, request: Request | Unread, response: Response,
               answer: Answer | None) -> None:
        if answer is None:
            if visit.found and visit.found.busy:
                # A thread could keep the very request waiting that it waits for.
                self.waiting.append((visit, conn, request, response))
                return
            self.working.add(conn)
            self.tpool.submit(self.work, time.perf_counter(), visit, conn, request, response)
            return
        status, headers, body = answer
        response.start_response(status, headers)
        conn.closes = response.should_close()
        self.finish(conn, response.whole(body))

    def work(self, queued: float, visit: Visit, conn: Connection, request: Request | Unread,
             response: Response) -> None:
        """Have a request answered, in a thread."""
        data = b""
        if self.sampler:
            metrics.THREAD_WAIT.observe(time.perf_counter() - queued)
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
            finally:
                if hasattr(parts, "close"):
                    parts.close()
            conn.closes = response.should_close()
        except Exception as error:
            if not isinstance(error, ConnectionError | TimeoutError):
                self.log.exception("Error handling request %s", request.uri)
            conn.closes = True
        if conn.sock.gettimeout():
            conn.sock.settimeout(None)  # or the loop would wait, too
        self.working.discard(conn)
        if not self.working:  # else the next to be done writes this line, too, or the loop does
            self.door.log.flush()
        if not self.send(conn, data) or conn.closes:
            self.method_queue.defer(self.finish, conn, b"")
            return
        self.rest(conn)
        # More has arrived meanwhile, or a large body is to be freed.
        if conn.data or conn.eof or not conn.watched or conn.taken > BLOCK:
            self.method_queue.defer(self.go_on, conn)

    @contained
    def finish(self, conn: Connection, data: bytes) -> None:
        """Send an answer, or what is left of it; then be ready for the next request, or part."""
        self.release(conn)
        if not self.send(conn, data):
            conn.state, conn.deadline = WRITING, time.monotonic() + READ_SECONDS
            self.watch(conn, selectors.EVENT_WRITE)
        elif conn.closes:
            self.part(conn)
        else:
            self.rest(conn)
            if conn.data or conn.eof or conn.watched != selectors.EVENT_READ:
                self.go_on(conn)

    def send(self, conn: Connection, data: bytes) -> bool:
        """Send as much as the socket takes at once. Returns whether that was everything."""
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

    def flush(self, conn: Connection) -> None:
        left = len(conn.out)
        if self.send(conn, b""):
            self.finish(conn, b"")
        elif len(conn.out) < left:
            conn.deadline = time.monotonic() + READ_SECONDS

    def rest(self, conn: Connection) -> None:
        conn.deadline = time.monotonic() + (self.cfg.keepalive if self.alive else CLOSE_SECONDS)
        conn.state = IDLE

    @contained
    def go_on(self, conn: Connection) -> None:
        """With the loop again: what came while the answer was made."""
        if conn.state != IDLE:
            return
        self.release(conn)
        if conn.data:
            self.gather(conn)
        if conn.eof and conn.state != BUSY:
            self.drop(conn)
        elif not conn.eof:
            self.watch(conn, selectors.EVENT_READ)

    def part(self, conn: Connection) -> None:
        """Close this side, and wait for the client's: a reset would take the answer with it."""
        if conn.eof:
            self.drop(conn)
            return
        conn.state, conn.deadline = CLOSING, time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
        self.watch(conn, selectors.EVENT_READ)

    def release(self, conn: Connection) -> None:
        """Stop counting a body: its request has been answered."""
        self.held -= conn.taken
        conn.taken = 0

    def drop(self, conn: Connection) -> None:
        if not self.connections.pop(conn, False):
            return
        self.release(conn)
        self.held -= len(conn.data)
        self.nr_conns -= 1
        try:
            self.watch(conn, 0)
        finally:
            conn.sock.close()

    def watch(self, conn: Connection, events: int) -> None:
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

    def murder_keepalived(self, force: bool = False) -> None:
        """End what has waited too long."""
        super().murder_keepalived(force)  # behind TLS
        now = time.monotonic()
        if not force and now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        if self.sampler and now - self.sampled > SAMPLE_SECONDS:
            self.sampled = now
            metrics.CONNECTIONS.set(len(self.connections))
            metrics.IN_FLIGHT.set(sum(conn.state == BUSY for conn in self.connections))
            self.sampler.sample()
        if self.leaves and now > self.leaves:
            self.alive = False
        if self.nr_conns >= self.worker_connections:
            self.shed()  # no client is accepted until one leaves
        for conn in list(self.connections):
            if force or (conn.state != BUSY and conn.deadline < now):
                self.expire(conn, force)

    @contained
    def expire(self, conn: Connection, force: bool) -> None:
        if conn.state in (HEAD, BODY) and (conn.data or conn.request) and not force:
            self.refuse(conn, Problem("request_timeout"))
        else:
            self.drop(conn)

    def shed(self) -> None:
        """Part with some of those who wait longest: others want to come in.

        Not with who has just come in or been answered: a request may lie there unread.
        """
        fresh = time.monotonic() - FRESH_SECONDS
        spared = {HEAD: fresh + HEAD_SECONDS, IDLE: fresh + self.cfg.keepalive}
        waiting = [conn for conn in self.connections if conn.state != BUSY
                   and conn.deadline < spared.get(conn.state, math.inf)]
        for conn in sorted(waiting, key=lambda conn: conn.deadline)[:len(waiting) // 10 + 1]:
            self.expire(conn, True)

    def _cap_keepalive(self, deadline):
        """The worker leaves: clients that are connected are served, new ones are refused.

        A refused client can go elsewhere. If the socket stayed open until the last answer is out,
        the kernel would accept clients that nobody serves and that the worker's end cuts off.
        """
        for listener in self.sockets:
            while self.accept(listener):
                pass
            listener.close()
        super()._cap_keepalive(deadline)
        for conn in self.connections:
            if conn.state == IDLE:
                conn.deadline = min(conn.deadline, deadline)


class Log(glogging.Logger):
    """gunicorn's own messages, as lines like all others, to where they go."""

    def setup(self, cfg: Any) -> None:
        self.cfg, self.loglevel = cfg, self.LOG_LEVELS[cfg.loglevel]
        self._access_log_enabled = False  # the door has its own
        self.error_log = logging.getLogger("shopfront.gunicorn")
        self.error_log.setLevel(self.loglevel)


def _bare(data, start):
    """Whether a line ends in LF alone: what follows never ends the way it is read here."""
    return data.count(b"\n", start) != data.count(b"\r\n", start)


def _problem_of(error):
    """The Problem of a head, or of trailers, that gunicorn's parser doesn't take."""
    if isinstance(error, errors.LimitRequestLine):
        return Problem("uri_too_long")
    if isinstance(error, errors.LimitRequestHeaders):
        return Problem("headers_too_large")
    return Problem("bad_request")


def _host(address):
    return address[0] if isinstance(address, tuple) else ""
