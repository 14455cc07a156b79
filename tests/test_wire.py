"""Bytes that no client should send: one refusal each, and nothing behind them is a request."""
import contextlib
import itertools
import json
import pathlib
import resource
import shutil
import socket
import ssl
import struct
import subprocess
import time

import pytest

from tests.conftest import Server, as_role, execute
from tests.test_errors import shaped
from tests.wire import Wire

POST = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BEHIND = b"GET /health HTTP/1.1\r\nHost: shop\r\nX-Request-ID: behind\r\n\r\n"


@pytest.fixture(autouse=True, scope="module")
def _nothing_has_ended(server):
    """After all that, the same workers answer, and at once."""
    while len(pids := server.worker_pids) < 2:  # the first answers before the second is there
        time.sleep(0.01)
    yield
    assert well(server)
    assert server.worker_pids == pids
    assert "Traceback" not in server.log


def well(server):
    """Whether the server answers, long before anything that holds it up would let go."""
    asked = time.monotonic()
    with Wire(server, BEHIND) as wire:
        return wire.answer()[0] == 200 and time.monotonic() - asked < 5


def talk(server, *parts, pause=0):
    """The answers to these bytes, until the server closes: (status, headers, body) of each."""
    with Wire(server) as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                wire.send(part)
                if pause:
                    time.sleep(pause)
        answers = []
        while wire.more():
            answers.append(wire.answer())
        return answers


def refused(server, *parts, status=400, code="bad_request", pause=0):
    """Assert that there is one answer, this problem, and that the connection ends with it."""
    answers = talk(server, *parts, BEHIND, pause=pause)
    assert [(answer[0], answer[1]["X-Request-ID"] == "behind") for answer in answers] == [
        (status, False)]
    shaped(*answers[0], code)
    assert answers[0][1]["Connection"] == "close"
    return answers[0][1]


def served(server, *parts):
    """Assert that what stands behind is served, too. Returns the first answer."""
    with Wire(server) as wire:
        for part in (*parts, BEHIND):
            wire.send(part)
        first = wire.answer()
        assert wire.answer()[1]["X-Request-ID"] == "behind"
        return first


def pieces(data, size=7):
    return (data[start:start + size] for start in range(0, len(data), size))


# Heads

LINES = [
    b"GET  / HTTP/1.1", b"GET\t/\tHTTP/1.1", b" GET / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET /",
    b"GET /a b HTTP/1.1", b"GET", b"get / HTTP/1.1", b"GET / http/1.1", b"GET / HTTP/2.0",
    b"GET / HTTP/0.9", b"GET / HTTP/1.10", b"GET / HTTP/1", b"GET / HTTP/1.1\rX: y",
    b"G(T / HTTP/1.1",
    b"GET /\x00 HTTP/1.1", b"GET /\xe9 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET /\r HTTP/1.1",
    b"GET shop:80 HTTP/1.1", b"GET * HTTP/1.1", b"GET http://[ HTTP/1.1", b"PRI * HTTP/2.0",
    b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\nGET / HTTP/1.1", b"SSH-2.0-OpenSSH_9.2",
    b"\x00\r\nQUIT\n\x21\x11\x00\x0c", b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 200 OK",
    b"GET / HTTP/1.1\nHost: x\n",
    b"\n\nGET / HTTP/1.1", b"\rGET / HTTP/1.1",
]
LENGTHS = [
    b"Content-Length : 5", b"Content-Length\t: 5", b"Content-Length:\x0b5", b"Content-Length: +5",
    b"Content-Length: -5", b"Content-Length: -0", b"Content-Length: 5, 5", b"Content-Length: 5,5",
    b"Content-Length: 5 5", b"Content-Length: 0x5", b"Content-Length: 5.0", b"Content-Length: 5e0",
    b"Content-Length:", b"Content-Length: ", b"Content-Length: \xb2", b"Content-Length: 5\xb2",
    "Content-Length: ５".encode(), b'Content-Length: "5"', b"Content-Length: 5;",
    b"Content-Length: 5_0",
    b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 5\r\ncontent-length: 5", b"Content-Length: 5\r\nX: y\r\nCONTENT-LENGTH: 0",
    b"Content-Length:\r\n 5", b"Content-Length: 5\r\n 5", b"Content-Length: 5\n",
    b"Content-Length: 5\r",
    b"Content-Length: 5\x00", b"Content-Length: 0\rContent-Length: 5",
    b"Content-Length: 0\nContent-Length: 5", b"\x00Content-Length: 5",
    b"Content-Length: " + b"9" * 5000,
    b"Content-Length: 5\r\nContent-Length: 00000000000000000000005",
]
CODINGS = [
    b"xchunked", b"chunkedx", b"chunked, chunked", b"chunked\r\nTransfer-Encoding: chunked",
    b"chunked, identity", b"identity, chunked", b"identity\r\nTransfer-Encoding: chunked",
    b"chunked\r\nTransfer-Encoding: x", b"x\r\nTransfer-Encoding: chunked", b"identity", b"gzip",
    b"gzip, chunked", b"gzip\r\nTransfer-Encoding: chunked", b"deflate, chunked", b"chunked;q=1",
    b'"chunked"', b"chunked,", b",chunked", b"", b"chun ked", b"\x0bchunked", b"chunked\x00",
    b"chunked\x0c", b"\r\n chunked", b"chunked\r\n ", b"chunk\xe9d", b"'chunked'", b"cow", b"null",
    b"chunked\r\nContent-Length: 5", b"chunked\r\nContent-Length: x",
    b"chunked\r\nContent-Length: ",
    b"chunked\r\nContent-Length: 00000000000000000000005",
]
FIELDS = [
    b"Transfer-Encoding : chunked", b" Transfer-Encoding: chunked", b"\tTransfer-Encoding: chunked",
    b"X: y\nTransfer-Encoding: chunked", b"X: y\rTransfer-Encoding: chunked",
    b"Transfer-Encoding\x00: chunked", b"Transfer\xa0Encoding: chunked", b"Transfer-Encoding",
    b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\r\n ",
    b": c", b"A B: c", b"A(: c", "Ä: c".encode(), b"X: a\x00b", b"X: a\rb", b"X: a\nb",
    b"X: a\x08b",
    b"X: a\x7fb", b"Broken", b"Host: shop", b"Content-Type: text/plain", b"Expect: 200-ok",
]
HOSTS = [b"X: y", b"Host: a b", b"Host: a/b", b"Host: a@b", b"Host: shop\xe9",
         b"Host: a\r\nHost: b", b"Host : shop", b"X: y\rHost: shop"]
HEADS = [
    *(line + b"\r\nHost: shop" for line in LINES),
    *(POST + line for line in LENGTHS),
    *(POST + b"Transfer-Encoding: " + value for value in CODINGS),
    *(POST + line for line in FIELDS),
    *(b"GET /health HTTP/1.1\r\n" + line for line in HOSTS),
    POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked",
]


def shown(data):
    return ascii(data.replace(POST, b""))[2:50]


@pytest.mark.parametrize("head", HEADS, ids=shown)
@pytest.mark.parametrize("body", [b"", b"5\r\nhello\r\n0\r\n\r\n"], ids=["bare", "body"])
def test_a_head_that_means_nothing_is_400_and_ends_the_connection(server, head, body):
    refused(server, head + b"\r\n\r\n" + body)
    refused(server, *pieces(head + b"\r\n\r\n" + body))


def test_a_length_is_what_it_says_however_it_is_written(server):
    """Twenty digits are a number, too."""
    for length in (b"5", b"\t5 ", b"00000000000000000000000005"):
        answer = served(server, POST + b"Content-Length: " + length + b"\r\n\r\nhello")
        assert json.loads(answer[2])["code"] == "malformed_json"
    for name in (b"Content_Length", b"Transfer_Encoding", b"X-Content-Length"):
        answer = served(server, b"GET /health HTTP/1.1\r\nHost: shop\r\n" + name + b": 5\r\n\r\n")
        assert answer[0] == 200


# Chunks

SIZES = [
    b"", b" 5", b"\t5", b"5 ", b"5\t", b" 5;a=b", b"+5", b"-5", b"0x5", b"5g", b"5_0", b"5h",
    b"\xb55",
    b"0000000000000000005", b"5\x00", b"5\x0b", b"5,5", b"5;", b"5;=b", b"5;a b", b"5;a=", b'5;a="',
    b'5;a="b', b"5;a=b ", b"5;a=\xe9", b"5;a\rb", b"5;a\nb", b"5\n", b"5\r", b"5;a\x00", b"5 5",
    b"5;" + b"a" * 9000, b"5;" + b" " * 9000,
]
CHUNKS = [
    *(size + b"\r\nhello\r\n0\r\n\r\n" for size in SIZES),
    b"5\nhello\n0\n\n", b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhello\r0\r\n\r\n",
    b"5\r\nhelloX\r\n0\r\n\r\n", b"5\r\nhello\n\r0\r\n\r\n", b"5\r\nhell\r\n0\r\n\r\n",
    b"0\n\n", b"0\r\nX: y\n\n", b"x" * 9000,
    *(b"5\r\nhello\r\n0\r\n" + line + b"\r\n\r\n" for line in (
        b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: shop", b"Authorization: x",
        b"Trailer: x", b"TE: x", b"X : y", b" X: y", b"X: y\r\n z", b"X: a\nb", b"X: a\rb",
        b"X: a\x00",
        b": y", b"Broken", b"GET /health HTTP/1.1")),
]


@pytest.mark.parametrize("path", [b"/api/v1/auth/login", b"/health"])
@pytest.mark.parametrize("chunks", CHUNKS, ids=lambda chunks: ascii(chunks)[2:40])
def test_chunks_that_are_none_are_400_and_end_the_connection(server, path, chunks):
    """Whether or not anyone would have read the body."""
    head = b"POST " + path + b" HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n"
    refused(server, head + chunks)
    refused(server, head, *pieces(chunks, 13))


@pytest.mark.parametrize("chunks", [
    b"5\r\nhello\r\n0\r\n\r\n", b"005\r\nhello\r\n00\r\n\r\n", b"5;a\r\nhello\r\n0;b=c\r\n\r\n",
    b'5 ; a = "x;\\"y" ;b\r\nhello\r\n0\r\n\r\n',
    b"1\r\nh\r\n4\r\nello\r\n0\r\nX: y\r\nY: z\r\n\r\n",
    b"000000000000005\r\nhello\r\n0\r\n\r\n", b"0\r\n\r\n",
], ids=lambda chunks: ascii(chunks)[2:40])
@pytest.mark.parametrize("path", [b"/api/v1/auth/login", b"/health"])
def test_what_stands_behind_chunks_is_the_next_request(server, path, chunks):
    head = b"POST " + path + b" HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n" \
           b"Transfer-Encoding: chunked\r\n\r\n"
    for parts in ([head + chunks], [head, *pieces(chunks, 3)]):
        assert served(server, *parts)[0] in (400, 405, 422)


# Sizes

GET = b"GET /api/v1/products HTTP/1.1\r\nHost: shop\r\n"
FLOODS = {
    "line": (b"GET /api/v1/products?x=" + b"a" * 5000 + b" HTTP/1.1\r\nHost: shop\r\n\r\n", 414),
    "endless line": (b"GET /api/v1/products?x=" + b"a" * 100000, 414),
    "long": (GET + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431),
    "many": (GET + b"X: y\r\n" * 101 + b"\r\n", 431),
    "endless": (GET + b"X: " + b"a" * 100000, 431),
    "endless many": (GET + b"X: y\r\n" * 20000, 431),
    "large": (GET + (b"X: " + b"a" * 8000 + b"\r\n") * 20 + b"\r\n", 431),
    "trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n", 431),
    "endless trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 20000, 431),
    "length": (POST + b"Content-Length: 10485761\r\n\r\n", 413),
    "long length": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 413),
    "zeros": (POST + b"Content-Length: " + b"0" * 30 + b"10485761\r\n\r\n", 413),
    "chunk": (CHUNKED + b"A00001\r\n", 413),
    "long chunk": (CHUNKED + b"F" * 15 + b"\r\n", 413),
}
CODES = {413: "payload_too_large", 414: "uri_too_long", 431: "headers_too_large"}


@pytest.mark.parametrize("flood", FLOODS)
def test_what_is_too_large_is_told_so_and_counted(server, flood):
    data, status = FLOODS[flood]
    for parts in ([data], pieces(data, 1000)):
        headers = refused(server, *parts, status=status, code=CODES[status])
        assert "X-RateLimit-Remaining" in headers


def test_chunks_of_a_byte_each_end_somewhere(server):
    chunks = b"1\r\nx\r\n" * 10000
    refused(server, CHUNKED, *itertools.repeat(chunks, 200),
            status=413, code="payload_too_large")


def test_a_slow_flood_of_headers_is_refused_in_time(server):
    """While it drips the others are answered."""
    begun = time.monotonic()
    with Wire(server, b"GET /api/v1/products HTTP/1.1\r\n") as slow:
        slow.sock.setblocking(False)
        while time.monotonic() - begun < 15:
            with contextlib.suppress(BlockingIOError):
                if slow.sock.recv(1, socket.MSG_PEEK):
                    break
            slow.send(b"X: y\r\n")
            assert well(server)
            time.sleep(0.3)
        slow.sock.settimeout(5)
        status, headers, body = slow.answer()
        shaped(status, headers, body, "request_timeout")
        assert "X-RateLimit-Remaining" in headers
    assert 9.5 < time.monotonic() - begun < 20


# Forms of requests that are fine, and what they must not do


@pytest.mark.parametrize(("head", "status"), [
    (b"GET http://shop/health HTTP/1.1\r\nHost: shop", 200),
    (b"GET http://elsewhere/health HTTP/1.1\r\nHost: shop", 200),
    (b"GET http://shop HTTP/1.1\r\nHost: shop", None), (b"OPTIONS * HTTP/1.1\r\nHost: shop", None),
    (b"TRACE /health HTTP/1.1\r\nHost: shop", 405), (b"GET //health HTTP/1.1\r\nHost: shop", None),
    (b"GET /health?#x HTTP/1.1\r\nHost: shop", None), (b"GET ://x HTTP/1.1\r\nHost: shop", None),
    (b"\r\n\r\n\r\nGET /health HTTP/1.1\r\nHost: shop", 200),
    (b"GET /health HTTP/1.1\r\nHost:", 200),
    (b"GET /health HTTP/1.1\r\nHost: [::1]:80\r\nUpgrade: h2c\r\nConnection: Upgrade, "
     b"HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__", 200),
    (b"GET /health HTTP/1.1\r\nHost: shop\r\nUpgrade: websocket\r\nConnection: upgrade", 200),
    (b"GET /health HTTP/1.9\r\nHost: shop", 200),
    (b"GET /health HTTP/1.0\r\nExpect: 100-continue\r\nConnection: keep-alive", 200),
], ids=lambda value: ascii(value)[2:40])
def test_an_odd_request_is_one_request(server, head, status):
    answer = served(server, head + b"\r\n\r\n")
    assert status in (None, answer[0])
    assert 200 <= answer[0] < 500


@pytest.mark.parametrize("head", [
    b"CONNECT shop:80 HTTP/1.1\r\nHost: shop", b"GET /health HTTP/1.0",
    b"GET /health HTTP/1.1\r\nHost: shop\r\nConnection: close, te",
    b"GET /health HTTP/1.1\r\nHost: shop\r\nConnection: keep-alive\r\nConnection: Close",
    b"GET /api/v1/users/me HTTP/1.1\r\nHost: shop\r\nConnection: x ,close",
], ids=ascii)
def test_behind_the_last_request_is_nothing(server, head):
    answers = talk(server, head + b"\r\n\r\n" + BEHIND)
    assert [headers["X-Request-ID"] == "behind" for _, headers, _ in answers] == [False]


def test_an_old_client_that_expects_100_is_not_told_to_go_on(server):
    """RFC 9110, 10.1.1."""
    head = POST.replace(b"1.1", b"1.0") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert [answer[0] for answer in talk(server, head, b"{}", pause=0.1)] == [422]


def test_an_answer_says_a_version_that_the_server_speaks(server):
    """RFC 9110, 2.5."""
    with Wire(server, b"GET /health HTTP/1.7\r\nHost: shop\r\n\r\n") as wire:
        assert wire.sock.recv(9) == b"HTTP/1.1 "


def test_a_header_moves_no_path(server):
    """SCRIPT_NAME belongs to whoever deploys, not to whoever calls."""
    for name in (b"SCRIPT_NAME", b"PATH_INFO", b"Script-Name"):
        head = b"GET /health/live HTTP/1.1\r\nHost: shop\r\n" + name + b": /health\r\n\r\n"
        assert served(server, head)[0] == 200


# Clients that leave

WHOLE = CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"


def test_a_client_may_shut_its_side_at_any_byte(server):
    for cut in range(len(WHOLE) + 1):
        with Wire(server, WHOLE[:cut]) as wire:
            wire.sock.shutdown(socket.SHUT_WR)
            wire.sock.settimeout(3)
            answers = []
            while wire.more():
                answers.append(wire.answer()[0])
            assert answers == ([400] if cut == len(WHOLE) else [])


def test_whoever_shut_its_side_is_answered_everything(server):
    paths = ["/health", "/api/v1/users/me", "/health", "/api/v1/users/me", "/nowhere"]
    with Wire(server, b"".join(f"GET {p} HTTP/1.1\r\nHost: shop\r\n\r\n".encode() for p in paths)
              + b"GET /hea") as wire:
        wire.sock.shutdown(socket.SHUT_WR)
        assert [wire.answer()[0] for _ in paths] == [200, 401, 200, 401, 404]
        assert not wire.more()


def reset(wire):
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.sock.close()


def test_a_client_may_reset_at_any_byte(server):
    """Before, in and behind a request, while it is answered, and with another one behind it."""
    for cut in range(0, len(WHOLE) + 1, 3):
        for behind in (b"", WHOLE, b"nonsense\n"):
            reset(Wire(server, WHOLE[:cut] + behind))
    reports = b"GET /api/v1/products?limit=100 HTTP/1.1\r\nHost: shop\r\n\r\n"
    for count in (1, 2, 50):
        for wait in (0, 0.001, 0.01, 0.05):
            wire = Wire(server, reports * count)
            time.sleep(wait)
            reset(wire)


def test_a_client_may_shut_its_side_behind_nonsense(server):
    """Refused on its last byte, in the loop and behind an answer of a thread's."""
    for first in (b"", BEHIND, b"GET /api/v1/users/me HTTP/1.1\r\nHost: shop\r\n\r\n"):
        for nonsense in (b"x\n", b"GET /" + b"a" * 5000, b"GET / HTTP/1.1\r\nX\r\n\r\n"):
            with Wire(server, first + nonsense) as wire:
                wire.sock.shutdown(socket.SHUT_WR)
                if first:
                    assert wire.answer()[0] in (200, 401)
                assert wire.answer()[0] in (400, 414)
                assert not wire.more()


def test_out_of_files_those_who_wait_longest_go_and_the_worker_stays(serve):
    server = serve(workers=1)
    pid, = server.worker_pids
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (80, most))
    try:
        for _ in range(10):
            with contextlib.ExitStack() as wires:
                waiting = [wires.enter_context(Wire(server, b"GET / HTTP/1.1\r\n"))
                           for _ in range(60)]
                for _ in range(20):
                    wires.enter_context(Wire(server))
                    for wire in waiting:
                        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                            wire.send(b"X")
        assert server.worker_pids == [pid]
        assert well(server)
        assert "Traceback" not in server.log
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


# Logins wait until nothing is held, which no lock_timeout ends.
HOLD_LOGINS = """
CREATE TABLE held AS SELECT 1;
CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$ BEGIN
    WHILE EXISTS (SELECT FROM held) LOOP PERFORM pg_sleep(0.05); END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER held BEFORE INSERT ON login_failures FOR EACH ROW EXECUTE FUNCTION wait();
"""


def test_bodies_are_counted_until_they_are_answered(serve, make_database):
    """Beyond 64 MB in all the next large one waits outside, small ones come in."""
    url = make_database()
    execute(url, HOLD_LOGINS)
    server = serve(workers=1, WEB_THREADS="2", STATEMENT_TIMEOUT_MS="60000",
                   DATABASE_URL=as_role(url))
    def large(number):
        body = b'{"email": "large%d@example.com", "password": "some password"}' % number
        body = body.ljust(10 * 1024 * 1024)
        return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body

    with contextlib.ExitStack() as wires:
        waiting = [wires.enter_context(Wire(server, large(i))) for i in range(6)]
        refused(server, large(6), status=503, code="unavailable")
        head, rest = BEHIND[:20], BEHIND[20:]
        with Wire(server, head) as small:
            time.sleep(0.05)
            small.send(rest)
            assert small.answer()[0] == 200
        execute(url, "DELETE FROM held")
        assert {wire.answer()[0] for wire in waiting} == {401}
        with Wire(server, large(7)) as wire:
            assert wire.answer()[0] == 401


def test_the_loop_never_waits_for_a_client_that_does_not_read(serve, admin):
    """Not even where a report has given the socket a timeout of its own."""
    server = serve(workers=1)
    report = ("HEAD /api/v1/reports/transactions?start_date=2026-01-01&end_date=2026-01-02 "
              f"HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer {admin.token}\r\n\r\n").encode()
    with Wire(server, report) as idle:
        assert idle.sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        idle.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                idle.send(BEHIND * 100)
        for _ in range(10):
            assert well(server)


FAULTY = """
def fault(visit, sent):
    if visit.environ["QUERY_STRING"] == "fault":
        raise RuntimeError("a bug in the loop")
app.extensions["door"].notices["/health"] = fault
"""


def test_a_fault_ends_the_connection_that_it_is_about(copy_of_project, settings):
    """It is in the log, and those who came in at the same time are answered."""
    with open(copy_of_project / "wsgi.py", "a") as file:
        file.write(FAULTY)
    server = Server(settings, folder=copy_of_project, workers=1)
    try:
        server.wait()
        pid, = server.worker_pids
        with contextlib.ExitStack() as wires:
            waiting = [wires.enter_context(Wire(server)) for _ in range(20)]
            for wire in waiting[::2]:
                wire.send(BEHIND)
            for wire in waiting[1::2]:
                wire.send(BEHIND.replace(b"/health", b"/health?fault"))
            assert all(wire.answer()[0] == 200 for wire in waiting[::2])
            assert not any(wire.more() for wire in waiting[1::2])
        assert server.worker_pids == [pid]
        assert "RuntimeError: a bug in the loop" in server.log
    finally:
        server.stop()


def test_behind_tls_who_says_nothing_is_let_go(settings, tmp_path):
    """There gunicorn's own worker keeps connections; someone has to end them."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed.")
    key, cert = tmp_path / "key", tmp_path / "cert"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=shop",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    server = Server(settings | {"GUNICORN_CMD_ARGS": f"--certfile {cert} --keyfile {key} "
                                                     "--keep-alive 1"}, workers=1)
    context = ssl.create_default_context(cafile=cert)
    try:
        while "Shopfront is ready" not in server.log:
            time.sleep(0.05)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock, \
                context.wrap_socket(sock, server_hostname="shop") as wire:
            wire.sendall(BEHIND)
            assert wire.recv(1000).startswith(b"HTTP/1.1 200")
            wire.settimeout(5)
            while wire.recv(1000):
                pass
    finally:
        server.stop()


# Behind nginx

NGINX = pathlib.Path("/usr/sbin/nginx")
CONFIG = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    log_format passed "$upstream_addr $request_id";
    access_log {folder}/access.log passed;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    underscores_in_headers on; ignore_invalid_headers off;
    upstream shop {{ server 127.0.0.1:{shop}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://shop; proxy_http_version 1.1; proxy_next_upstream off;
            proxy_request_buffering off;
            proxy_set_header Connection ""; proxy_set_header Host $http_host;
            proxy_set_header X-Request-ID $request_id;
        }}
    }}
}}
"""
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: shop\r\n\r\n"


@pytest.fixture
def behind_nginx(serve, tmp_path):
    """(nginx's port, a function that gives the ids of what it passed and the shop's log)."""
    if not NGINX.exists():
        pytest.skip("nginx is not installed.")
    server = serve(workers=1, LOG_LEVEL="INFO")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "nginx.conf"
    config.write_text(CONFIG.format(folder=tmp_path, shop=server.port, port=port))
    before = requests_of(server)
    nginx = subprocess.Popen([NGINX, "-p", tmp_path, "-c", config, "-e", tmp_path / "error.log"])
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.02)

        def seen():
            passed = [line.split()[1] for line in (tmp_path / "access.log").read_text().splitlines()
                      if not line.startswith("- ")]
            return passed, requests_of(server)[len(before):]
        yield port, seen
    finally:
        nginx.terminate()
        nginx.wait()


def requests_of(server):
    lines = pathlib.Path(server.log_file.name).read_text().splitlines()
    return [json.loads(line) for line in lines if '"shopfront.access"' in line]


def test_nginx_and_the_shop_agree_on_how_many_requests_there_are(behind_nginx):
    """CL.TE, TE.CL and TE.TE, each with a request hidden in the body."""
    port, seen = behind_nginx
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
    ended = b"0\r\n\r\n" + SMUGGLED
    heads = [b"Content-Length: %d\r\n" % len(ended),
             b"Content-Length: 000000000000000000000%d\r\n" % len(ended),
             b"Content-Length: 4\r\n", b"Content-Length: +4\r\n", b""]
    codings = [line for line in FIELDS if b"ransfer" in line]
    codings += [b"Transfer-Encoding: " + value for value in (b"chunked", *CODINGS)]
    codings += [b"Transfer_Encoding: chunked", b"X: y"]
    sent = 0
    for length, coding, body in itertools.product(heads, codings, (chunked, ended)):
        for path in (b"/health", b"/api/v1/auth/login"):
            head = b"POST " + path + b" HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n" \
                + length + coding + b"\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), timeout=5) as wire, \
                    contextlib.suppress(ConnectionError):
                wire.sendall(head + body)
                while wire.recv(65536):
                    pass
            sent += 1
    time.sleep(0.5)
    passed, served = seen()
    assert 0 < len(passed) == len(served) < sent
    assert not any("smuggled" in line["path"] for line in served)
    # A head that can't be parsed has no id that could be known.
    assert {line["status"] for line in served if line["request_id"] not in passed} <= {400}
