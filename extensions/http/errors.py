"""Every error, wherever it is raised, is answered in one format: RFC 9457 problem details.

Code that knows what is wrong raises ``Problem("out_of_stock", ...)``; every other exception
(from the router, the limiter, PostgreSQL, a bug) is mapped here.
"""
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

import psycopg
import psycopg_pool
from flask import Flask, Response, request
from psycopg import errors as pg
from werkzeug.exceptions import HTTPException

from extensions.http import logs
from extensions.http.visit import Answer, visit
from schemas.problems import PROBLEMS

log = logging.getLogger("shopfront.errors")
PATH_SAFE = "/:@!$&'()*+,;=~"  # RFC 3986, pchar

BY_STATUS = {
    400: "bad_request", 401: "authentication_required", 403: "forbidden", 404: "not_found",
    405: "method_not_allowed", 406: "not_acceptable", 409: "conflict", 410: "gone",
    408: "request_timeout", 412: "precondition_failed", 413: "payload_too_large",
    414: "uri_too_long", 415: "unsupported_media_type",
    422: "validation_failed", 428: "precondition_required", 429: "rate_limited",
    431: "headers_too_large", 503: "unavailable", 504: "timeout",
}

BY_CONSTRAINT = {
    "users_email_key": "email_taken",
    "products_sku_key": "sku_taken",
    "categories_name_key": "name_taken",
    # The caller's account was deleted between the check of the token and the write.
    "transactions_user_id_fkey": "token_revoked",
    "idempotency_keys_user_id_fkey": "token_revoked",
}

# What PostgreSQL raises for a value that got past the schemas: too big, too long, not text.
OUT_OF_RANGE = (psycopg.DataError, pg.ProgramLimitExceeded)
BUSY = (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests, pg.LockNotAvailable,
        pg.DeadlockDetected, pg.SerializationFailure, pg.ReadOnlySqlTransaction,
        psycopg.OperationalError, psycopg.InterfaceError)


class Problem(Exception):
    """An answer other than success. ``code`` is one of PROBLEMS.

    ``details`` are (field, where, message) triples, ``headers`` go onto the response.
    """

    def __init__(self, code: str, detail: str | None = None,
                 details: Sequence[tuple[str, str, str]] = (),
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(code)
        self.code, self.detail, self.details = code, detail, details
        self.headers = headers or {}


def invalid(field: str, message: str, where: str = "body") -> Problem:
    """The Problem of one field that is not valid."""
    return Problem("validation_failed", "1 field is not valid.", [(field, where, message)])


def or_404(row: Any) -> Any:
    """Return a query's row, or raise a 404 if there is none."""
    if row is None:
        raise Problem("not_found")
    return row


def raises(*codes: str) -> Callable[[Callable], Callable]:
    """Document the problems that a view raises by itself."""
    def decorate(view):
        view.problems = codes
        return view
    return decorate


def init_app(app: Flask) -> None:
    app.register_error_handler(Exception, respond)


def respond(error: Exception) -> Response:
    """The response for any exception."""
    here, problem = visit(), problem_of(error)
    if problem.code == "forbidden":
        logs.event("forbidden", user_id=here.caller_id, method=here.method, path=here.shown_path)
    status, headers, body = render(problem, here.shown_path, here.id)
    return Response(body, status, headers=headers)


def problem_of(error: BaseException) -> Problem:
    """The Problem that the client gets for an exception."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, HTTPException):
        return _from_http(error)
    if isinstance(error, psycopg.Error):
        return _from_database(error)
    log.exception("unhandled %s", type(error).__name__, exc_info=error)
    return Problem("internal_error")


def _from_http(error):
    code = BY_STATUS.get(error.code)
    if code is None:
        code = "bad_request" if 400 <= error.code < 500 else "internal_error"
    headers = {}
    if error.code == 405 and error.valid_methods:
        headers["Allow"] = ", ".join(sorted({*error.valid_methods, "OPTIONS"}))
    return Problem(code, headers=headers)


def _from_database(error):
    constraint = error.diag.constraint_name or ""
    if code := BY_CONSTRAINT.get(constraint):
        return Problem(code)
    if constraint == "products_category_id_fkey":
        if request.method == "DELETE":
            return Problem("category_in_use")
        return invalid("category_id", "No such category.")
    if isinstance(error, pg.CheckViolation) and constraint.endswith("_check"):
        field = constraint.removesuffix("_check").removeprefix(f"{error.diag.table_name}_")
        return invalid(field, "Not a valid value.")
    if isinstance(error, OUT_OF_RANGE):
        log.warning("a value got past its schema: %s", type(error).__name__)
        return Problem("validation_failed", "A value is out of range.")
    if isinstance(error, pg.QueryCanceled):
        log.warning("statement timed out")
        return Problem("timeout")
    if isinstance(error, BUSY):
        log.error("database unavailable: %s", error)
        return Problem("unavailable", headers={"Retry-After": "1"})
    log.exception("unhandled %s", type(error).__name__, exc_info=error)
    return Problem("internal_error")


def render(problem: Problem, path: str, request_id: str) -> Answer:
    """The answer of a problem: RFC 9457, as application/problem+json."""
    status, title, meaning = PROBLEMS[problem.code]
    body = {
        "type": f"/problems/{problem.code}", "title": title, "status": status,
        "detail": problem.detail or meaning, "instance": quote(path, safe=PATH_SAFE),
        "code": problem.code, "request_id": request_id, "error": title,
    }
    if problem.details:  # a client may make up field names, of any length
        body["details"] = [
            {"field": field[:500], "in": where, "message": message}
            for field, where, message in problem.details[:100]
        ]
    text = json.dumps(body).encode()
    headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(text))),
               ("Cache-Control", "no-store"), *problem.headers.items()]
    if status == 401:
        challenge = "Bearer"
        if problem.code in ("token_expired", "token_revoked"):
            challenge = f'Bearer error="invalid_token", error_description="{title}"'  # RFC 6750
        headers.append(("WWW-Authenticate", challenge))
    return f"{status} {title}", headers, text
