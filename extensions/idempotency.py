"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): a retry gets the first answer.

The key and the answer are stored in the same database transaction as the write, so that either
both are there or neither, and a crash between commit and response loses nothing.
"""
import functools
import hashlib
import json
import re
from collections.abc import Callable

from flask import g, request

import db
from extensions.http.answers import answer
from extensions.http.errors import Problem, invalid

queries = db.load("idempotency")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def idempotent(view: Callable) -> Callable:
    """Run a view, as ``view(self, conn, data)``, in a transaction; with a key, remember the answer.

    The view returns ``(json_text, location)`` of what it created, or raises a Problem, which is
    not stored.
    """
    @functools.wraps(view)
    def wrapper(self, data, **kwargs):
        key = request.headers.get("Idempotency-Key")
        with db.connection() as conn:
            if key is not None:
                digest = _digest(key, data)
                if stored := _earlier(conn, key, digest):
                    return stored
            text, location = view(self, conn, data, **kwargs)
            if key is not None:
                queries.keep(conn, user_id=g.caller["id"], key=key, request_hash=digest,
                             status=201, location=location, body=text)
        return answer(text, 201, location=location)
    wrapper.idempotent = True  # type: ignore[attr-defined] # read by the documents
    return wrapper


def _digest(key, data):
    if not _KEY.fullmatch(key):
        raise invalid("Idempotency-Key", "Must be 1 to 255 visible ASCII characters.", "header")
    path = request.path.split("/", 3)[-1]  # the same request in v1 and in v2
    return hashlib.sha256(
        json.dumps([path, data], sort_keys=True, default=str).encode()
    ).digest()


def _earlier(conn, key, digest):
    """Lock this key; return the answer stored for it, or None if this is the first request."""
    names = {"user_id": g.caller["id"], "key": key}
    if not queries.lock(conn, **names):
        raise Problem("request_in_progress", headers={"Retry-After": "1"})
    stored = queries.get(conn, **names)
    if stored is None:
        return None
    if stored["request_hash"] != digest:
        raise Problem("idempotency_key_reused")
    return answer(stored["body"], stored["status"], location=stored["location"],
                  headers={"Idempotent-Replayed": "true"})
