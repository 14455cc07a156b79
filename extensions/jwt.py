"""Tokens, and who may call what.

Every route wears exactly one guard: ``@public``, ``@signed_in`` or ``@admin``. A guard looks up
user, role and session in one query, so that a logout or a demotion counts from the next request on.
"""
import functools
import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt as pyjwt
from flask import Flask, current_app, g, request
from flask_jwt_extended import JWTManager, create_access_token, create_refresh_token

import db
from db.queries import Query
from extensions.http import arguments
from extensions.http.errors import Problem
from extensions.http.visit import Visit, visit

ALGORITHM = "HS256"
ISSUER = AUDIENCE = "shopfront"
LEEWAY_SECONDS = 60  # by which the clock of the node that made a token may be ahead
REQUIRED = ["exp", "iat", "nbf", "iss", "aud", "sub", "jti", "type", "sid"]

queries = db.load("auth")
manager = JWTManager()


def init_app(app: Flask) -> None:
    minutes, days = app.config["ACCESS_TOKEN_MINUTES"], app.config["REFRESH_TOKEN_DAYS"]
    app.config.update(
        JWT_SECRET_KEY=app.config["JWT_SECRET_KEY"] or _own_key(app),
        JWT_ALGORITHM=ALGORITHM,
        JWT_ACCESS_TOKEN_EXPIRES=timedelta(minutes=minutes),
        JWT_REFRESH_TOKEN_EXPIRES=timedelta(days=days),
        JWT_ENCODE_ISSUER=ISSUER, JWT_DECODE_ISSUER=ISSUER,
        JWT_ENCODE_AUDIENCE=AUDIENCE, JWT_DECODE_AUDIENCE=AUDIENCE,
    )
    manager.init_app(app)


def _own_key(app):
    """Development's key: made once, kept in instance/, so that restarts don't end sessions."""
    file = Path(app.instance_path) / "jwt_secret_key"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as new:
            new.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    return file.read_text()


def pair(user_id: int, session_id: int, generation: int) -> dict[str, Any]:
    """A session's tokens: ``{token, refresh_token, token_type, expires_in}`` (seconds)."""
    claims = {"sid": session_id}
    return {
        "token": create_access_token(str(user_id), additional_claims=claims),
        "refresh_token": create_refresh_token(
            str(user_id), additional_claims=claims | {"gen": generation}
        ),
        "token_type": "Bearer",
        "expires_in": current_app.config["ACCESS_TOKEN_MINUTES"] * 60,
    }


def keys() -> tuple[str, ...]:
    """The keys accepted for verification: the signing key, and the previous one if any."""
    config = current_app.config
    return tuple(filter(None, (config["JWT_SECRET_KEY"], config["JWT_SECRET_KEY_PREVIOUS"])))


def decode(token: str, kind: str) -> dict[str, Any]:
    """The claims of a token of this kind; a Problem (401) for anything that is not one."""
    claims = _verified(token, kind, keys())
    if claims["exp"] <= time.time():
        raise Problem("token_expired")
    return claims


@functools.lru_cache(maxsize=4096)
def _verified(token, kind, keys):
    """``decode`` without its expiry check, cached: a valid signature stays valid.

    PyJWT is called directly, with Flask-JWT-Extended's settings: the extension itself accepts a
    token without ``type`` or ``exp``.
    """
    key, *others = keys
    try:
        claims = pyjwt.decode(
            token, key, algorithms=[ALGORITHM], issuer=ISSUER, audience=AUDIENCE,
            leeway=LEEWAY_SECONDS, options={"require": REQUIRED},
        )
        if claims["type"] != kind:
            raise Problem("authentication_required", f"This is not a token for {kind}.")
        claims["sub"] = int(claims["sub"])
        numbers = ("sub", "sid", "gen") if kind == "refresh" else ("sub", "sid")
        if not all(type(claims.get(n)) is int and 0 <= claims[n] < 2**63 for n in numbers):
            raise ValueError("a number that the database can't have")
        return claims
    except pyjwt.InvalidSignatureError:
        if others:
            return _verified(token, kind, tuple(others))
        raise Problem("authentication_required", "The token is not valid.") from None
    except pyjwt.ExpiredSignatureError:
        raise Problem("token_expired") from None
    except (pyjwt.InvalidTokenError, ValueError, TypeError, OverflowError):
        raise Problem("authentication_required", "The token is not valid.") from None


def _bearer(visit):
    """The token of the Authorization header (RFC 6750), whose scheme has any letter case."""
    header = visit.environ.get("HTTP_AUTHORIZATION")
    if header is None:
        raise Problem("authentication_required")
    scheme, _, token = header.strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or " " in token or "," in token:
        raise Problem("authentication_required", "Send one 'Authorization: Bearer <token>'.")
    return token


def identify(visit: Visit, query: Query) -> dict[str, Any]:
    """The row of a query that looks up user and session: ``{id, idle, …}``. Raises 401."""
    claims = decode(_bearer(visit), "access")
    with db.reading() as conn:
        caller = query(conn, user_id=claims["sub"], session_id=claims["sid"])
        if caller is None:
            raise Problem("token_revoked")
        if caller["idle"]:
            queries.touch(conn, session_id=claims["sid"])
    visit.caller_id = caller["id"]
    return caller


def authenticate() -> dict[str, Any]:
    """Who is calling, as ``g.caller``: the user's row, and ``session_id``."""
    g.caller = identify(visit(), queries.caller)
    return g.caller


def is_admin() -> bool:
    return g.caller["role"] == "admin"


def public(view: Callable) -> Callable:
    """Anybody may call."""
    return _guard(view, "public")


def signed_in(view: Callable) -> Callable:
    """Whoever has a valid access token may call."""
    return _guard(view, "user")


def admin(view: Callable) -> Callable:
    """Administrators may call."""
    return _guard(view, "admin")


def _guard(view, access):
    no_query = arguments.takes_no_query(view)

    @functools.wraps(view)
    def wrapper(*args, **kwargs):
        if access != "public" and authenticate()["role"] != "admin" and access == "admin":
            raise Problem("forbidden")
        if no_query and request.query_string:
            arguments.refuse_query()
        return view(*args, **kwargs)
    wrapper.access = access  # type: ignore[attr-defined] # read by the documents
    return wrapper
