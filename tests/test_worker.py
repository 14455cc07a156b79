"""Requests as they come over the wire: slow, in pieces, too large, half-closed, many at once."""
import contextlib
import json
import os
import pathlib
import re
import resource
import signal
import socket
import time

import psycopg
import pytest
from redis import Redis

from blueprints import VERSIONS
from tests.contract import Contract
from tests.wire import Wire

GET = b"GET /health HTTP/1.1\r\nHost: shop\r\n\r\n"


def post(path, length, *more):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: shop", "Content-Type: application/json",
                        f"Content-Length: {length}", *more, "", ""]).encode()


def bodies(app):
    """(version, method, path) of every operation that takes a body."""
    for version in VERSIONS:
        document = json.loads(app.extensions["documents"][version])
        for path, item in document["paths"].items():
            for method, operation in item.items():
                if "requestBody" in operation:
                    yield version, method.upper(), re.sub(r"\{\w+\}", "1", path)


def test_half_a_request_is_408_in_time_and_nobody_else_waits(app, server):
    """Ten seconds for a head, thirty for a body; the others are answered all the while."""
    contract, begun, operations = Contract(app), time.monotonic(), list(bodies(app))
    with contextlib.ExitStack() as wires:
        def send(data):
            return wires.enter_context(Wire(server, data))
        silent = [send(b"") for _ in range(100)]
        heads = [send(b"GET /health HTTP/1.1\r\nX-Half: ") for _ in range(100)]
        halves = [send(f"{method} {path} HTTP/1.1\r\nHost: shop\r\nContent-Length: 9\r\n"
                       "Content-Type: application/json\r\n\r\n{".encode())
                  for _, method, path in operations]
        for _ in range(20):
            asked = time.monotonic()
            assert send(GET).answer()[0] == 200
            assert time.monotonic() - asked < 5
        for wire in heads:
            status, headers, body = wire.answer()
            assert (status, json.loads(body)["code"]) == (408, "request_timeout")
            assert headers["Content-Type"] == "application/problem+json"
            assert wire.closed()
        assert 9.5 < time.monotonic() - begun < 20
        assert all(wire.closed() for wire in silent)
        for (_, method, path), wire in zip(operations, halves, strict=True):
            status, headers, body = wire.answer()
            assert status == 408
            contract.check(method, path, status, headers, body)
            assert "X-RateLimit-Remaining" in headers
            assert wire.closed()
        assert 29 < time.monotonic() - begun < 40


def test_a_request_may_come_byte_by_byte(server):
    with Wire(server) as wire:
        for byte in GET:
            wire.send(bytes([byte]))
        assert wire.answer()[0] == 200


def test_requests_in_a_row_are_answered_in_a_row(server):
    """Pipelined: known answers, answers of threads and refusals, in their order (RFC 9112, 9.3)."""
    paths = ["/health", "/api/v1/users/me", "/api/v1/categories", "/nowhere", "/health"] * 20
    data = b"".join(f"GET {p} HTTP/1.1\r\nHost: shop\r\nX-Request-ID: n{i}\r\n\r\n".encode()
                    for i, p in enumerate(paths))
    with Wire(server, data) as wire:
        answers = [wire.answer() for _ in paths]
    assert [status for status, *_ in answers] == [200, 401, 200, 404, 200] * 20
    assert [headers["X-Request-ID"] for _, headers, _ in answers] == [
        f"n{i}" for i in range(len(paths))]


def test_a_half_closed_client_still_gets_its_answer(server):
    for path in ("/health", "/api/v1/categories", "/api/v1/users/me"):
        with Wire(server, f"GET {path} HTTP/1.1\r\nHost: shop\r\n\r\n".encode()) as wire:
            wire.sock.shutdown(socket.SHUT_WR)
            assert wire.answer()[0] in (200, 401)
            assert wire.closed()


@pytest.mark.parametrize("path", ["/health", "/api/v1/products", "/nowhere"])
def test_http_1_0_closes_unless_it_is_asked_not_to(server, path):
    with Wire(server, f"GET {path} HTTP/1.0\r\n\r\n".encode()) as wire:
        assert wire.answer()[1]["Connection"] == "close"
        assert wire.closed()
    again = f"GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode()
    with Wire(server, again) as wire:
        assert wire.answer()[1]["Connection"] == "keep-alive"
        wire.send(again)
        assert wire.answer()[1]["Connection"] == "keep-alive"


def test_who_expects_100_is_told_to_go_on(server):
    body = b'{"email": "a@example.com", "password": "some password"}'
    with Wire(server, post("/api/v1/auth/login", len(body), "Expect: 100-continue")) as wire:
        assert wire.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(body)
        assert wire.answer()[0] == 401
        wire.send(GET)
        assert wire.answer()[0] == 200


def test_who_expects_100_for_too_much_is_refused_before_it_is_sent(server):
    with Wire(server, post("/api/v1/auth/login", 10485761, "Expect: 100-continue")) as wire:
        status, headers, _ = wire.answer()
        assert (status, headers["Connection"]) == (413, "close")
        assert "X-RateLimit-Remaining" in headers
        assert wire.closed()


def chunked(*chunks, trailer=b""):
    head = (b"POST /api/v1/auth/login HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n")
    return head + b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n" \
        + trailer + b"\r\n"


def test_a_body_in_chunks_may_hold_what_looks_like_its_end(server):
    body = b'{"email": "a@example.com",\r\n0\r\n\r\n "password": "some password"}'
    for pieces in ([body], [body[:30], body[30:]], [bytes([byte]) for byte in body]):
        data = chunked(*pieces, trailer=b"X-Trailer: 1\r\n")
        with Wire(server) as wire:
            for part in (data[:-9], data[-9:] + GET):
                wire.send(part)
                time.sleep(0.05)
            status, _, answer = wire.answer()
            assert (status, json.loads(answer)["code"]) == (400, "malformed_json")
            assert wire.answer()[0] == 200


def test_a_client_that_reads_slowly_gets_everything_and_holds_nobody_up(serve, make_product):
    server = serve(workers=1, WEB_THREADS="2")
    for _ in range(100):
        make_product(description="x" * 5000)
    path = b"GET /api/v1/products?limit=100 HTTP/1.1\r\nHost: shop\r\n\r\n"
    slow = []
    for _ in range(8):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(path * 4)
        slow.append(sock)
    time.sleep(0.5)
    for _ in range(20):
        asked = time.monotonic()
        with Wire(server, b"GET /api/v1/users/me HTTP/1.1\r\nHost: shop\r\n\r\n") as wire:
            assert wire.answer()[0] == 401
        assert time.monotonic() - asked < 5
    wire = Wire.__new__(Wire)
    for sock in slow:
        wire.sock, wire.left = sock, b""
        sock.settimeout(10)
        sizes = [len(json.loads(wire.answer()[2])["data"]) for _ in range(4)]
        assert sizes == [100] * 4
        sock.close()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP], ids=["TERM", "HUP"])
def test_whatever_is_under_way_is_finished_when_a_worker_leaves(serve, database_url, how):
    server = serve(workers=1, CACHE_TYPE="NullCache")
    body = b'{"email": "a@example.com", "password": "some password"}'
    login = post("/api/v1/auth/login", len(body)) + body
    listing = b"GET /api/v1/categories HTTP/1.1\r\nHost: shop\r\n\r\n"
    with contextlib.ExitStack() as wires, psycopg.connect(database_url) as locker:
        head, half, idle, made, read = (wires.enter_context(Wire(server, data)) for data in (
            GET[:20], login[:-10], GET, listing, listing * 2))
        assert idle.answer()[0] == 200
        assert made.answer()[0] == read.answer()[0] == 200
        locker.execute("LOCK TABLE categories IN ACCESS EXCLUSIVE MODE")
        made.send(listing)
        time.sleep(0.3)
        server.process.send_signal(how)
        time.sleep(0.5)
        for wire, rest in ((head, GET[20:]), (half, login[-10:]), (idle, GET)):
            wire.send(rest)
            status, headers, _ = wire.answer()
            assert (status in (200, 401), headers["Connection"]) == (True, "close")
        locker.rollback()
        for wire in (made, read):
            assert wire.answer()[0] == 200
        if how == signal.SIGTERM:
            assert server.process.wait(10) == 0
        else:
            assert wires.enter_context(Wire(server, GET)).answer()[0] == 200


@pytest.fixture
def tight(serve):
    """One worker that may open 160 files."""
    server = serve(workers=1)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (160, 160))
    replace_worker(server)  # the next one has its master's limits
    return server


def replace_worker(server):
    old, = server.worker_pids
    os.kill(old, signal.SIGKILL)
    end = time.monotonic() + 20
    while server.worker_pids in ([], [old]):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_few_descriptors_are_for_those_who_ask(tight):
    """Whoever waits longest gives way, never who comes in."""
    with contextlib.ExitStack() as silent:
        for _ in range(10):
            for _ in range(40):
                silent.enter_context(Wire(tight))
            asked = time.monotonic()
            with Wire(tight, GET * 2) as wire:
                assert wire.answer()[0] == wire.answer()[0] == 200
            assert time.monotonic() - asked < 5


def test_who_has_been_answered_gives_way_to_who_waits_at_the_door(tight, database_url):
    """More come at once than a worker takes, and none of them closes behind its answer."""
    with contextlib.ExitStack() as stack:
        with psycopg.connect(database_url) as conn:
            conn.execute("LOCK TABLE products")
            wires = [stack.enter_context(
                Wire(tight, b"GET /api/v1/products/%d HTTP/1.1\r\nHost: shop\r\n\r\n" % number)
            ) for number in range(10**9, 10**9 + 120)]
            time.sleep(0.7)  # as many as it takes are in
        asked = time.monotonic()
        assert {wire.answer()[0] for wire in wires} == {404}
        assert time.monotonic() - asked < 5


def test_who_gives_way_while_it_sends_takes_nobody_along(serve):
    """What is closed to let another in may have something to read in the same turn of the loop."""
    server = serve(workers=1)
    pid, = server.worker_pids
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(server)) for _ in range(60)]
        last = stack.enter_context(Wire(server, GET))
        assert last.answer()[0] == 200  # by now all of them are in
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), most))
        halt(pid)
        wires += [stack.enter_context(Wire(server)) for _ in range(5)]
        for wire in wires:
            wire.send(b"G")
        os.kill(pid, signal.SIGCONT)
        with Wire(server, GET) as wire:
            assert wire.answer()[0] == 200
    assert server.worker_pids == [pid]


def test_who_waits_for_another_to_compute_holds_no_thread(serve, redis_url):
    """Of a single thread, which is free for whatever doesn't wait."""
    ask = b"GET /api/v1/products?limit=7 HTTP/1.1\r\nHost: shop\r\n\r\n"
    server = serve(workers=1, WEB_THREADS="1", REDIS_PREFIX="waits")
    with Redis.from_url(redis_url) as redis, contextlib.ExitStack() as wires:
        with Wire(server, ask) as wire:
            assert wire.answer()[0] == 200
        entry, = redis.keys("*waits*:entry:*")
        lock = entry.replace(b":entry:", b":lock:")
        redis.set(lock, "another node", px=60000)
        redis.delete(entry)
        waiting = [wires.enter_context(Wire(server, ask)) for _ in range(5)]
        with Wire(server, b"GET /api/v1/users/me HTTP/1.1\r\nHost: shop\r\n\r\n") as wire:
            asked = time.monotonic()
            assert wire.answer()[0] == 401
        assert time.monotonic() - asked < 2.5
        redis.delete(lock)  # it died: one of them does it
        answers = [wire.answer() for wire in waiting]
    assert time.monotonic() - asked < 2.9
    assert [status for status, *_ in answers] == [200] * 5
    assert sorted(headers["X-Cache"] for _, headers, _ in answers) == ["hit"] * 4 + ["miss"]


def test_who_computes_is_waited_for_three_seconds(serve, redis_url):
    ask = b"GET /api/v1/products?limit=8 HTTP/1.1\r\nHost: shop\r\n\r\n"
    server = serve(workers=1, WEB_THREADS="1", REDIS_PREFIX="patient")
    with Redis.from_url(redis_url) as redis, Wire(server, ask) as wire:
        assert wire.answer()[0] == 200
        entry, = redis.keys("*patient*:entry:*")
        redis.set(entry.replace(b":entry:", b":lock:"), "another node", px=60000)
        redis.delete(entry)
        asked = time.monotonic()
        wire.send(ask)
        assert wire.answer()[0] == 200
        assert 2.9 < time.monotonic() - asked < 6


def test_a_worker_counts_on_where_a_dead_one_stopped(serve, tmp_path, settings):
    """The files of the metrics are as many as the workers, not as all that there have been."""
    server, seen = serve(workers=1, TMPDIR=str(tmp_path)), []
    for _ in range(3):
        assert server.call("GET", "categories").status == 200
        text = server.call("GET", "/metrics", token=settings["METRICS_TOKEN"]).body.decode()
        asked = re.search(r'requests_total{.*route="/api/v1/categories".*} (\d+)', text)
        seen.append((int(asked[1]), sorted(file.name for file in tmp_path.rglob("*.db"))))
        replace_worker(server)
    files = seen[0][1]
    assert len(files) == 6  # the master's, which stay empty, and the worker's
    assert seen == [(number, files) for number in (1, 2, 3)]


def test_a_worker_that_leaves_lets_nobody_in(serve):
    """Not even while it waits for others: who is refused can go to another node."""
    server = serve(workers=2)
    with contextlib.ExitStack() as wires:
        for _ in range(20):  # so that each worker has somebody to wait for
            wires.enter_context(Wire(server, b"GET /health HTTP/1.1\r\nX-Half: "))
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        with pytest.raises(ConnectionRefusedError):
            Wire(server)
        assert server.process.poll() is None


def test_who_has_come_before_a_worker_leaves_is_answered(serve):
    """Also who stands at the socket yet: nobody is let in and then cut off."""
    server = serve(workers=1)
    pid, = server.worker_pids
    with contextlib.ExitStack() as wires:
        halt(pid)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        came = [wires.enter_context(Wire(server, GET)) for _ in range(20)]
        os.kill(pid, signal.SIGCONT)
        assert [wire.answer()[0] for wire in came] == [200] * 20


def halt(pid):
    os.kill(pid, signal.SIGSTOP)
    while pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
