"""The gunicorn worker: whole requests only, the door in the loop, threads for what needs them.

One thread, the event loop, accepts, reads and waits for all clients. Requests that have completely
arrived (front/wire.py) in one round of the loop go through the door together. What the door answers
is sent at once; the rest goes to the thread pool. So a slow sender holds a buffer, not a thread,
and a short answer costs neither a thread switch nor contention for the GIL. When a client is slow
to read, the loop sends the rest of its answer; only a streamed answer keeps its thread.

With gunicorn's own TLS the plain ThreadWorker does the work.
"""
import contextlib
import errno
import functools
import logging
import math
import resource
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from gunicorn import glogging
from gunicorn.http import errors, wsgi
from gunicorn.workers.gthread import ThreadWorker

from extensions.cache import POLL_SECONDS
from extensions.front.wire import (
    BODY,
    BUSY,
    CLOSING,
    HEAD,
    HEAD_SECONDS,
    IDLE,
    WRITING,
    Connection,
    Response,
    Unparsed,
    problem_of,
)
from extensions.http import metrics
from extensions.http.errors import Problem
from extensions.http.visit import Answer

READ_SECONDS = 60  # for the client to take some of an answer
FRESH_SECONDS = 0.5  # for a request that may be on its way after an accept or an answer
CLOSE_SECONDS = 2  # for the client to close its side (RFC 9112, 9.6)
LOOK_SECONDS = 0.25  # how often deadlines are checked
SAMPLE_SECONDS = 1  # how often gauges are updated
BLOCK = 65536
AHEAD = 65536  # bytes that a client may pipeline while an answer is made
LARGEST_ALL = 64 << 20  # what all connections of a worker may hold together
WHOLE = 1 << 20  # an answer up to this size is sent in one piece
CONNECTIONS = 8192


def drops_on_error(method: Callable) -> Callable:
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
        self.arrived: list[Connection] = []
        self.waiting: list[Connection] = []  # for an answer that another process computes
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
        """TERM: report 'draining' to readiness checks for DRAIN_SECONDS, then shut down."""
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

    @drops_on_error
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
            self.pass_to_door(waiting, self.door.answers_again)
            self.asked_again = time.monotonic()

    @drops_on_error
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
            conn.taken = 0
            conn.state, conn.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        try:
            whole = conn.is_complete(self.cfg, self.largest)
            if not whole and len(conn.data) > BLOCK and self.is_full():
                raise Problem("unavailable", "Too much is being sent at once.",
                              headers={"Retry-After": "5"})
        except Problem as problem:
            self.refuse(conn, problem)
        else:
            if whole:
                self.arrive(conn)

    def is_full(self) -> bool:
        """Whether all connections together hold too much."""
        if self.held > LARGEST_ALL:  # ``held`` only grows: recount now
            self.held = sum(len(conn.data) + conn.taken for conn in self.connections)
        return self.held > LARGEST_ALL

    def refuse(self, conn: Connection, problem: Problem) -> None:
        """Answer with a problem, and close: where another request would begin isn't known."""
        conn.problem = problem
        if conn.request is None:
            conn.request = Unparsed(conn.data)
        conn.data, conn.end = bytearray(), 0
        self.arrive(conn)

    def arrive(self, conn: Connection) -> None:
        conn.state, conn.started = BUSY, time.perf_counter()
        self.arrived.append(conn)

    # Answering

    def serve(self, arrived: list[Connection]) -> None:
        """Have requests that arrived together answered, by the door or by the threads."""
        self.pass_to_door([conn for conn in arrived if self.enter(conn)], self.door.answers)

    def pass_to_door(self, conns: list[Connection], door: Callable) -> None:
        if not conns:
            return
        try:
            answers = door([conn.visit for conn in conns])
        except Exception:
            if len(conns) > 1:  # one request's fault must not fail the others
                for conn in conns:
                    self.pass_to_door([conn], door)
                return
            self.log.exception("Error at the door")
            self.drop(conns[0])
            return
        for conn, answer in zip(conns, answers, strict=True):
            self.answer(conn, answer)

    @drops_on_error
    def enter(self, conn: Connection) -> bool:
        """Make a Visit of a request. Returns False if it turns out to be refused."""
        request = conn.request
        if isinstance(request, Unparsed):
            environ = request.environ(conn.address)
            conn.response = Response(request, conn.sock, self.cfg)
        else:
            request.unreader.unread(bytes(conn.data[:conn.end]))
            request._expected_100_continue = False  # it has been answered
            try:
                conn.response, environ = wsgi.create(
                    request, conn.sock, conn.address, conn.server, self.cfg, Response)
            except errors.ConfigurationProblem as error:  # a path outside of SCRIPT_NAME
                conn.request = Unparsed(f"{request.method} {request.uri}".encode())
                self.refuse(conn, problem_of(error))
                return False
        del conn.data[:conn.end]
        conn.taken = conn.end
        environ["wsgi.multithread"] = True
        conn.visit = self.door.visit(environ, conn.started)
        conn.visit.problem = conn.problem
        self.nr += 1
        if self.nr >= self.max_requests:
            self.alive = False
        if conn.problem or (conn.eof and not conn.data) or not self.alive:
            conn.response.force_close()
        return True

    @drops_on_error
    def answer(self, conn: Connection, answer: Answer | None) -> None:
        if answer is None:
            if conn.visit.found and conn.visit.found.busy:
                # The loop polls: a waiting thread could block the very request it waits for.
                self.waiting.append(conn)
                return
            self.working.add(conn)
            self.tpool.submit(self.work, time.perf_counter(), conn)
            return
        status, headers, body = answer
        conn.response.start_response(status, headers)
        conn.closes = conn.response.should_close()
        self.finish(conn, conn.response.to_bytes(body))

    def work(self, queued: float, conn: Connection) -> None:
        """Have a request answered, in a thread."""
        data, response = b"", conn.response
        if self.sampler:
            metrics.THREAD_WAIT.observe(time.perf_counter() - queued)
        try:
            parts = self.door.ask(conn.visit, response.start_response)
            try:
                length = 0 if response._omits_body else response.response_length
                if length is not None and length <= WHOLE:
                    data = response.to_bytes(b"".join(parts))
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
                self.log.exception("Error handling request %s", conn.request.uri)
            conn.closes = True
        if conn.sock.gettimeout():
            conn.sock.settimeout(None)  # or the loop would wait, too
        self.working.discard(conn)
        if not self.working:  # else the next thread to finish, or the loop, writes this line
            self.door.log.flush()
        if not self.send(conn, data) or conn.closes:
            self.method_queue.defer(self.finish, conn, b"")
            return
        self.set_idle(conn)
        # More has arrived meanwhile, or a large body is to be freed.
        if conn.data or conn.eof or not conn.watched or conn.taken > BLOCK:
            self.method_queue.defer(self.go_on, conn)

    @drops_on_error
    def finish(self, conn: Connection, data: bytes) -> None:
        """Send an answer, or what is left of it; then be ready for the next request, or part."""
        conn.taken = 0
        if not self.send(conn, data):
            conn.state, conn.deadline = WRITING, time.monotonic() + READ_SECONDS
            self.watch(conn, selectors.EVENT_WRITE)
        elif conn.closes:
            self.linger(conn)
        else:
            self.set_idle(conn)
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

    def set_idle(self, conn: Connection) -> None:
        conn.deadline = time.monotonic() + (self.cfg.keepalive if self.alive else CLOSE_SECONDS)
        conn.request = conn.visit = conn.response = None
        conn.state = IDLE

    @drops_on_error
    def go_on(self, conn: Connection) -> None:
        """Back in the loop: handle what arrived while the answer was made."""
        if conn.state != IDLE:
            return
        conn.taken = 0
        if conn.data:
            self.gather(conn)
        if conn.eof and conn.state != BUSY:
            self.drop(conn)
        elif not conn.eof:
            self.watch(conn, selectors.EVENT_READ)

    def linger(self, conn: Connection) -> None:
        """Shut down our side, and wait for the client's: a reset would discard the answer."""
        if conn.eof:
            self.drop(conn)
            return
        conn.state, conn.deadline = CLOSING, time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
        self.watch(conn, selectors.EVENT_READ)

    def drop(self, conn: Connection) -> None:
        if not self.connections.pop(conn, False):
            return
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

    @drops_on_error
    def expire(self, conn: Connection, force: bool) -> None:
        if conn.state in (HEAD, BODY) and (conn.data or conn.request) and not force:
            self.refuse(conn, Problem("request_timeout"))
        else:
            self.drop(conn)

    def shed(self) -> None:
        """Close some of the connections that have waited longest, to make room for new ones.

        Spares those just accepted or just answered: a request may lie there unread.
        """
        fresh = time.monotonic() - FRESH_SECONDS
        spared = {HEAD: fresh + HEAD_SECONDS, IDLE: fresh + self.cfg.keepalive}
        waiting = [conn for conn in self.connections if conn.state != BUSY
                   and conn.deadline < spared.get(conn.state, math.inf)]
        for conn in sorted(waiting, key=lambda conn: conn.deadline)[:len(waiting) // 10 + 1]:
            self.expire(conn, True)

    def _cap_keepalive(self, deadline):
        """The worker shuts down: serve connected clients, refuse new ones.

        A refused client can go elsewhere. If the listener stayed open until the last answer is
        sent, the kernel would accept clients that nobody serves and that the exit cuts off.
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
