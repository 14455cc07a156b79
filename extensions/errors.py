"""Every error, whoever raises it, leaves as one shape: RFC 9457 problem details.

``raise Problem("out_of_stock", ...)`` where something is known; everything else that is raised
(by the router, the limiter, PostgreSQL, a bug) is mapped here.
"""
import json
import logging
from urllib.parse import quote

import psycopg
import psycopg_pool
from flask import Response, request
from psycopg import errors as pg
from werkzeug.exceptions import HTTPException

from extensions import logs
from extensions.visit import visit

log = logging.getLogger("shopfront.errors")
PATH_SAFE = "/:@!$&'()*+,;=~"  # RFC 3986, pchar

# code -> (status, title, what it means and what to do)
PROBLEMS = {
    "bad_request": (400, "Bad request",
        "The request can't be understood as HTTP for this API. Mend it before sending it again."),
    "malformed_json": (400, "Malformed JSON",
        "The body is not valid JSON: check the syntax, the UTF-8, repeated names and NaN."),
    "authentication_required": (401, "Authentication required",
        "Send an access token from POST /auth/login as 'Authorization: Bearer <token>'."),
    "invalid_credentials": (401, "Invalid credentials",
        "The e-mail address, the password or the one-time token is wrong. Which, is not told."),
    "token_expired": (401, "Token expired",
        "The token's time is over. Get a new pair from POST /auth/refresh, or log in again."),
    "token_revoked": (401, "Token revoked",
        "The session of this token has ended. Log in again."),
    "forbidden": (403, "Forbidden",
        "You are known, but this is for others: most likely for administrators."),
    "not_found": (404, "Not found",
        "There is nothing here, or nothing that you may know of. Check the path and the id."),
    "method_not_allowed": (405, "Method not allowed",
        "The path exists, the method doesn't. The Allow header lists those that do."),
    "not_acceptable": (406, "Not acceptable",
        "The Accept header names no format that this address can give."),
    "conflict": (409, "Conflict",
        "The request contradicts what is stored. Read the resource again and decide anew."),
    "email_taken": (409, "E-mail address taken",
        "Another account has this address. Log in instead, or use another address."),
    "sku_taken": (409, "SKU taken", "Another product has this SKU. Use another one, or none."),
    "name_taken": (409, "Name taken", "Another category has this name. Use another one."),
    "category_in_use": (409, "Category in use",
        "Products belong to this category. Move or delete them first."),
    "out_of_stock": (409, "Out of stock",
        "There isn't enough of the products named in 'details'. Nothing was sold. Buy fewer."),
    "request_in_progress": (409, "Request in progress",
        "A request with this Idempotency-Key is still running. Wait a moment and send it again."),
    "gone": (410, "Gone",
        "This part of version 1 has ended. Use the successor that the Link header names."),
    "precondition_failed": (412, "Precondition failed",
        "The resource has changed since you read its ETag. Read it again, then repeat the change."),
    "request_timeout": (408, "Request timeout",
        "The request did not arrive whole in time. Send it again, in one go."),
    "payload_too_large": (413, "Payload too large", "The body is over the limit of 10 MB."),
    "uri_too_long": (414, "URI too long",
        "The request line is over the limit of 4094 bytes. Ask for less in one query."),
    "unsupported_media_type": (415, "Unsupported media type",
        "Send application/json, or a form where the body is flat."),
    "validation_failed": (422, "Validation failed",
        "Some fields are not valid; 'details' says which and why. Mend them and send it again."),
    "idempotency_key_reused": (422, "Idempotency key reused",
        "This Idempotency-Key belongs to another request. Use a new key for a new request."),
    "precondition_required": (428, "Precondition required",
        "Send If-Match with the ETag of the resource that you mean to change."),
    "headers_too_large": (431, "Request header fields too large",
        "There are over 100 headers, one is over 8190 bytes, or all are over 64 KB. Send fewer."),
    "rate_limited": (429, "Too many requests",
        "The limit is used up. Wait as many seconds as Retry-After says."),
    "internal_error": (500, "Internal error",
        "A fault of ours. It has been logged; quote request_id when you report it."),
    "unavailable": (503, "Unavailable",
        "A part of the service does not answer just now. Try again after Retry-After seconds."),
    "timeout": (504, "Timeout", "The answer took too long and was given up. Ask for less."),
}

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

# What PostgreSQL says of a value that got past the schemas: too big, too long, not text.
OUT_OF_RANGE = (psycopg.DataError, pg.ProgramLimitExceeded)
BUSY = (psycopg_pool.PoolTimeout, psycopg_pool.TooManyRequests, pg.LockNotAvailable,
        pg.DeadlockDetected, pg.SerializationFailure, pg.ReadOnlySqlTransaction,
        psycopg.OperationalError, psycopg.InterfaceError)


class Problem(Exception):
    """An answer other than success. ``code`` is one of PROBLEMS.

    ``details`` are (field, where, message) triples, ``headers`` go onto the response.
    """

    def __init__(self, code, detail=None, details=(), headers=None):
        super().__init__(code)
        self.code, self.detail, self.details = code, detail, details
        self.headers = headers or {}


def invalid(field, message, where="body"):
    """The Problem of one field that is not valid."""
    return Problem("validation_failed", "1 field is not valid.", [(field, where, message)])


def init_app(app):
    app.register_error_handler(Exception, respond)


def respond(error):
    """The response for any exception."""
    here, problem = visit(), problem_of(error)
    if problem.code == "forbidden":
        logs.event("forbidden", user_id=here.caller_id, method=here.method, path=here.shown_path)
    status, headers, body = render(problem, here.shown_path, here.id)
    return Response(body, status, headers=headers)


def problem_of(error):
    """The Problem that an exception is to its client."""
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


def render(problem, path, request_id):
    """(status, headers, body) of a problem: RFC 9457, as application/problem+json."""
    status, title, meaning = PROBLEMS[problem.code]
    body = {
        "type": f"/problems/{problem.code}", "title": title, "status": status,
        "detail": problem.detail or meaning, "instance": quote(path, safe=PATH_SAFE),
        "code": problem.code, "request_id": request_id, "error": title,
    }
    if problem.details:  # whose fields may be names that the client made up, of any length
        body["details"] = [
            {"field": field[:500], "in": where, "message": message}
            for field, where, message in problem.details[:100]
        ]
    body = json.dumps(body).encode()
    headers = [("Content-Type", "application/problem+json"), ("Content-Length", str(len(body))),
               ("Cache-Control", "no-store"), *problem.headers.items()]
    if status == 401:
        challenge = "Bearer"
        if problem.code in ("token_expired", "token_revoked"):
            challenge = f'Bearer error="invalid_token", error_description="{title}"'  # RFC 6750
        headers.append(("WWW-Authenticate", challenge))
    return f"{status} {title}", headers, body
