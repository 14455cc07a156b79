"""One request: what the door and the code that handles it know of it."""
import os
import re
import time
from typing import Any

from flask import has_request_context, request

Pairs = list[tuple[str, str]]  # headers
Answer = tuple[str, Pairs, bytes]  # status, headers, body
KEY = "shopfront.visit"  # the Visit's key in a WSGI environ
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}"
                          r"-[0-9a-f]{2}(-.*)?")


class Visit:
    """A request, from its arrival until its line in the access log.

    ``id`` is the client's X-Request-ID or a new one; ``known`` identifies its answer in the cache,
    and ``found`` is the result of the look-up; ``limits`` are the rate limits it was counted
    against; ``problem`` is why the worker refuses it, if it does.
    """

    __slots__ = ("accepts", "address", "caller_id", "counted", "environ", "found", "id", "known",
                 "limits", "method", "path", "problem", "route", "started", "url")
    known: Any  # the types of these belong to layers above
    found: Any
    counted: Any
    limits: list
    route: str | None
    caller_id: int | None
    problem: Exception | None

    def __init__(self, environ: dict, started: float | None = None) -> None:
        self.environ, self.started = environ, started or time.perf_counter()
        environ[KEY] = self
        sent = environ.get("HTTP_X_REQUEST_ID", "")
        self.id = sent if sent and _SANE_ID.fullmatch(sent) else os.urandom(16).hex()
        self.method, self.path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.url = self.path, environ.get("QUERY_STRING", "")
        self.address = environ.get("REMOTE_ADDR") or "unknown"
        self.accepts = environ.get("HTTP_ACCEPT_ENCODING", "")
        self.limits = []
        self.known = self.found = self.route = self.caller_id = self.counted = None
        self.problem = None

    @property
    def trace_id(self) -> str | None:
        """The trace id in the client's traceparent (W3C Trace Context, 3.2), or None."""
        sent = self.environ.get("HTTP_TRACEPARENT")
        found = sent and _TRACEPARENT.fullmatch(sent)
        # Only versions after 00 may have more fields.
        return found[2] if found and (found[1] != "00" or not found[3]) else None

    @property
    def shown_path(self) -> str:
        """The path decoded from UTF-8: WSGI passes its bytes as Latin-1 (PEP 3333)."""
        return self.path.encode("latin-1").decode("utf-8", "replace")


def visit() -> Any:  # not Visit | None: within a request no caller has to check
    """The current request's Visit, or None outside of one."""
    return request.environ.get(KEY) if has_request_context() else None
