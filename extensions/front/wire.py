"""HTTP/1.1 on a connection: what a client has sent so far, and an answer in one piece.

The parser is gunicorn's, made stricter where RFC 9112 is. It would block on missing bytes, so we
scan for the end of a request first: nothing is parsed twice, and nothing blocks.
"""
import contextlib
import functools
import io
import re
import socket
import time
from typing import Any

from gunicorn import util
from gunicorn.config import Config
from gunicorn.http import errors, message, unreader, wsgi
from gunicorn.http.body import CHUNK_EXT_RE, ChunkedReader

from extensions.http.errors import Problem
from extensions.http.visit import Pairs

HEAD_SECONDS, BODY_SECONDS = 10, 30  # for a head from its first byte, and then for the body
LARGEST_HEAD = 65536
LARGEST_LINE = 8192  # of a chunk's size and extensions
FRAMING = 1 << 20  # what a body in chunks may have around its bytes

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})" + CHUNK_EXT_RE.pattern)
_HOST = re.compile(r"[\w\-.~%!$&'()*+,;=:\[\]]*", re.A)
_FIRST_LINE = re.compile(rb"([A-Z]{1,20}) (/[\x21-\x7e]{0,2000})")
_SOUND = re.compile(r"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+: [\t\x20-\x7e\x80-\xff]*\r\n)*")

# Between requests; head arriving; body arriving; answer being made; being sent; lingering close.
IDLE, HEAD, BODY, BUSY, WRITING, CLOSING = range(6)


class Connection:
    """A client's connection: what it has sent, and what it waits for."""

    __slots__ = ("address", "closes", "data", "deadline", "end", "eof", "out", "problem", "request",
                 "response", "scanned", "server", "sock", "started", "state", "taken", "visit",
                 "watched")

    # Of the request that is arriving or being answered, as far as there is one:
    request: Any  # a Request or an Unparsed
    started: float  # when it was complete, on time.perf_counter's clock
    visit: Any  # a Visit
    response: Any  # a Response
    problem: Problem | None

    def __init__(self, sock: socket.socket, address: Any, server: Any) -> None:
        self.sock, self.address, self.server = sock, address, server
        self.state, self.deadline = HEAD, time.monotonic() + HEAD_SECONDS
        self.data, self.out = bytearray(), b""
        self.request = None  # its head has been removed from ``data``
        self.end = 0  # where its body ends in ``data``; -1 until the last chunk is found
        self.scanned = 0  # how far the chunks have been scanned
        self.taken = 0  # size of the body whose request is being answered
        self.problem = None  # why it is refused
        self.closes = self.eof = False
        self.watched = 0

    def is_complete(self, cfg: Config, largest: int) -> bool:
        """Whether a request is complete. Raises a Problem where it can't become valid.

        ``largest`` is what a body may have, in bytes.
        """
        data = self.data
        if self.request is None:
            self.request = request = self._head(cfg)
            if request is None:
                return False
            reader = request.body.reader
            self.end = -1 if isinstance(reader, ChunkedReader) else reader.length
            self.scanned = 0
            if self.end > largest:
                raise Problem("payload_too_large")
            if self.end:
                self.state, self.deadline = BODY, time.monotonic() + BODY_SECONDS
                if not data and request._expected_100_continue:
                    with contextlib.suppress(OSError):
                        self.sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        if self.end == -1:
            self.end = self._end_of_chunks(largest)
        return 0 <= self.end <= len(data)

    def _head(self, cfg):
        """Take a request's head out of ``data``, parsed, or None while it isn't there."""
        data = self.data
        while data[:2] == b"\r\n":  # an empty line in front is passed over (RFC 9112, 2.2)
            del data[:2]
        end = data.find(b"\r\n\r\n", 0, LARGEST_HEAD)
        if end < 0:
            longest = cfg.limit_request_line
            if _bare(data, 0):
                raise Problem("bad_request")
            if len(data) > longest + 2 and data.find(b"\r\n", 0, longest + 2) < 0:
                raise Problem("uri_too_long")
            if len(data) > LARGEST_HEAD:
                raise Problem("headers_too_large")
            return None
        try:
            request = Request(cfg, Gathered(data[:end + 4]), self.address)
        except errors.ParseException as error:
            raise problem_of(error)
        del data[:end + 4]
        return request

    def _end_of_chunks(self, largest):
        """Where a body in chunks ends, or -1 while that isn't known (RFC 9112, 7.1).

        What gunicorn's parser would not take is refused here: a view may never read its body.
        """
        data = self.data
        if len(data) > largest + FRAMING:
            raise Problem("payload_too_large")
        while (line := data.find(b"\r\n", self.scanned, self.scanned + LARGEST_LINE)) >= 0:
            found = _CHUNK.fullmatch(data, self.scanned, line)
            if not found:
                raise Problem("bad_request")
            size = int(found[1], 16)
            if size == 0:
                return self._end_of_trailers(line)
            if size > largest:
                raise Problem("payload_too_large")
            end = line + 2 + size
            if data[end:end + 2] != b"\r\n"[:max(0, len(data) - end)]:
                raise Problem("bad_request")
            if len(data) < end + 2:
                return -1
            self.scanned = end + 2
        if _bare(data, self.scanned) or len(data) - self.scanned > LARGEST_LINE:
            raise Problem("bad_request")
        return -1

    def _end_of_trailers(self, line):
        """Where the trailers (if any) end, or -1; ``line`` is where the last chunk's line ends."""
        data = self.data
        end = data.find(b"\r\n\r\n", line, line + LARGEST_HEAD)
        if end < 0:
            if _bare(data, line):
                raise Problem("bad_request")
            if len(data) - line > LARGEST_HEAD:
                raise Problem("headers_too_large")
            return -1
        if end > line:
            try:
                self.request.parse_headers(bytes(data[line + 2:end]), from_trailer=True)
            except errors.ParseException as error:
                raise problem_of(error)
        return end + 4


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


class Unparsed:
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
    """Feeds gunicorn's parser the bytes that have arrived, so that it never waits for more."""

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

    def to_bytes(self, body: bytes) -> bytes:
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


def _bare(data, start):
    """Whether a line ends in a bare LF: the CRLF that this module scans for may never come."""
    return data.count(b"\n", start) != data.count(b"\r\n", start)


def problem_of(error: errors.ParseException) -> Problem:
    """The Problem of a head, or of trailers, that gunicorn's parser doesn't take."""
    if isinstance(error, errors.LimitRequestLine):
        return Problem("uri_too_long")
    if isinstance(error, errors.LimitRequestHeaders):
        return Problem("headers_too_large")
    return Problem("bad_request")


def _host(address):
    return address[0] if isinstance(address, tuple) else ""
