"""Answers out of JSON text: bytes, a strong ETag, conditional requests (RFC 9110, 13)."""
import hashlib

from flask import Response, current_app, request
from werkzeug.http import parse_etags

from extensions.http import compression
from extensions.http.errors import Problem
from extensions.http.visit import Answer, Pairs, Visit

PRIVATE = "private, no-cache"
PUBLIC = "public, no-cache"  # may be stored, must be revalidated: our own cache is never stale
NO_STORE = "no-store"


def etag_of(body: bytes) -> str:
    """The strong tag of a representation: a hash of its bytes, before any compression."""
    return hashlib.blake2b(body, digest_size=12).hexdigest()


def answer(text: str | bytes, status: int = 200, *, cache: str = PRIVATE,
           location: int | str | None = None, headers: dict[str, str] | None = None) -> Response:
    """A JSON response; 304 if If-None-Match contains its ETag.

    ``location`` is appended to the request's path for the Location header.
    """
    body = text.encode() if isinstance(text, str) else text
    if cache == NO_STORE:
        response = Response(body, status, content_type="application/json")
        response.headers["Cache-Control"] = NO_STORE
    else:
        response = tagged(body, etag_of(body), cache, status)
    if headers:
        response.headers.update(headers)
    if location is not None:
        response.headers["Location"] = f"{request.path.rstrip('/')}/{location}"
    return response


def tagged(body: bytes, tag: str, cache: str, status: int = 200) -> Response:
    """A response with an ETag that is already known; an empty 304 if the client has it."""
    if request.method in ("GET", "HEAD") and request.if_none_match.contains_weak(tag):
        response = Response(status=304)
        response.headers.remove("Content-Type")
    else:
        response = Response(body, status, content_type="application/json")
    response.headers["ETag"] = f'"{tag}"'
    response.headers["Cache-Control"] = cache
    if cache == PRIVATE:
        response.headers["Vary"] = "Authorization"
    return response


def without_flask(visit: Visit, body: bytes, headers: Pairs, tag: str,
                  encoding: str | None = None) -> Answer:
    """The door's answer for JSON whose ETag is known: 304 if the client has it.

    With an ``encoding`` the body is already compressed.
    """
    headers = [("ETag", f'"{tag}"'), *headers]
    asked = visit.environ.get("HTTP_IF_NONE_MATCH")
    if asked and parse_etags(asked).contains_weak(tag):
        return "304 NOT MODIFIED", headers, b""
    if encoding:
        headers.append(("Content-Encoding", encoding))
    headers += ("Content-Type", "application/json"), ("Content-Length", str(len(body)))
    return "200 OK", headers, body


def private_without_flask(visit: Visit, text: str) -> Answer:
    """``without_flask`` for the caller's private data."""
    body = text.encode()
    encoding = compression.choose(visit.accepts) if len(body) >= compression.MIN_SIZE else None
    return without_flask(
        visit, compression.COMPRESS[encoding](body) if encoding else body,
        [("Cache-Control", PRIVATE), ("Vary", "Authorization, Accept-Encoding")],
        etag_of(body), encoding,
    )


def no_content() -> Response:
    """204, with no body."""
    response = Response(status=204)
    response.headers.remove("Content-Type")
    return response


def check_if_match(text: str) -> None:
    """Refuse with 412 if If-Match was sent and doesn't match the resource's current ETag.

    ``text`` is the JSON of a row that the calling code has locked, so that of two writers with the
    same ETag the second sees the first one's change.
    """
    sent = request.if_match
    if "If-Match" in request.headers and not (
        sent.star_tag or sent.is_strong(etag_of(text.encode()))
    ):
        raise Problem("precondition_failed")


def require_if_match() -> None:
    """Refuse with 428 where the operator asks for If-Match and none was sent."""
    if current_app.config["REQUIRE_IF_MATCH"] and "If-Match" not in request.headers:
        raise Problem("precondition_required")
