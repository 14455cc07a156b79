"""Accounts: registration, login, sessions, passwords, addresses."""
import time

from flask import Response, current_app, g, json, request
from flask.views import MethodView

import db
from extensions import jwt, limits, passwords
from extensions.behind import mail
from extensions.http import logs
from extensions.http.answers import NO_STORE, answer, no_content
from extensions.http.arguments import Blueprint
from extensions.http.errors import Problem, invalid, raises
from extensions.http.visit import visit
from extensions.jwt import public, signed_in
from schemas.auth import (
    Accepted,
    Forgotten,
    Login,
    LogoutQuery,
    OpenSessions,
    PasswordChange,
    Refresh,
    Registration,
    Reset,
    Session,
    Tokens,
    Verification,
)

blp = Blueprint("auth", __name__, url_prefix="/auth",
                description="Registration, login, sessions, passwords")
queries = db.load("auth")
users = db.load("users")


@blp.route("/register")
class Register(MethodView):
    @public
    @limits.registration
    @blp.arguments(Registration)
    @blp.response(201, Session)
    @raises("email_taken")
    def post(self, data: dict) -> Response:
        """Open an account and its first session

        The role is always `user`. A mail goes out to confirm the address.
        """
        password_hash = new_hash(data["password"], data["email"])
        with db.connection() as conn:
            user_id = queries.register(
                conn, email=data["email"], name=data["name"], password_hash=password_hash
            )
            session = open_session(conn, user_id, password_hash)
            mail.enqueue(conn, "verify", data["email"])
        logs.event("registered", user_id=user_id)
        return answer(session, 201, cache=NO_STORE,  # type: ignore[arg-type] # its user is new
                      headers={"Location": f"{api_root()}/users/{user_id}"})


@blp.route("/login")
class LogIn(MethodView):
    @public
    @limits.login
    @blp.arguments(Login)
    @blp.response(200, Session)
    @raises("invalid_credentials", "forbidden")
    def post(self, data: dict) -> Response:
        """Open a session with e-mail address and password

        A wrong address and a wrong password are answered alike. After five failures for an account
        from one address each further try has to wait, whatever its password; the wait doubles.
        """
        attempt_from = {"email": data["email"], "address": visit().address}
        count_attempt(attempt_from)
        with db.reading() as conn:
            user = queries.credentials(conn, email=data["email"])
        password, stored = data["password"], user and user["password_hash"]
        if not passwords.matches(password, stored):
            logs.event("login_failed", email=data["email"])
            raise Problem("invalid_credentials")
        if current_app.config["REQUIRE_VERIFIED_EMAIL"] and not user["email_verified"]:
            with db.reading() as conn:
                queries.forgive(conn, **attempt_from)  # the password was right
            raise Problem("forbidden", "Confirm your e-mail address before you log in.")
        fresh = passwords.hashed(password) if passwords.outdated(stored) else None
        with db.connection() as conn:
            if fresh and queries.rehash(conn, id=user["id"], new=fresh, old=stored):
                stored = fresh
            session = open_session(conn, user["id"], stored)
            if session is None:  # the password was changed since it was checked
                raise Problem("invalid_credentials")
            queries.forgive(conn, **attempt_from)
            queries.drop_expired(conn, user_id=user["id"])
        logs.event("logged_in", user_id=user["id"])
        return answer(session, cache=NO_STORE)


@blp.route("/refresh")
class RefreshTokens(MethodView):
    @public
    @limits.login
    @blp.arguments(Refresh)
    @blp.response(200, Tokens)
    @raises("authentication_required", "token_expired", "token_revoked")
    def post(self, data: dict) -> Response:
        """Exchange a refresh token for a new pair

        The old one is spent. A racing twin within 10 s gets a pair to go on with; a later use of a
        spent token ends its whole session, for one of the two users must be a thief.
        """
        claims = jwt.decode(data["refresh_token"], "refresh")
        user_id, session_id = claims["sub"], claims["sid"]
        names = {"user_id": user_id, "session_id": session_id, "generation": claims["gen"]}
        days = current_app.config["REFRESH_TOKEN_DAYS"]
        with db.connection() as conn:
            generation = queries.rotate(
                conn, **names, days=days, max_days=current_app.config["SESSION_MAX_DAYS"]
            )
            if generation is None:
                generation = queries.rotated_just_now(conn, **names)
            replayed = generation is None and queries.close(
                conn, user_id=user_id, session_id=session_id
            )
        if generation is None:
            if replayed:
                logs.event("refresh_token_reused", user_id=user_id, session_id=session_id)
            raise Problem("token_revoked")
        logs.event("refreshed", user_id=user_id, session_id=session_id)
        return answer(json.dumps(jwt.pair(user_id, session_id, generation)), cache=NO_STORE)


@blp.route("/logout")
class Logout(MethodView):
    @signed_in
    @blp.arguments(LogoutQuery, location="query")
    @blp.response(204)
    def post(self, query: dict) -> Response:
        """End this session, or every session of the caller"""
        with db.connection() as conn:
            if query["everywhere"]:
                queries.close_all(conn, user_id=g.caller["id"], keep=None)
            else:
                queries.close(conn, user_id=g.caller["id"], session_id=g.caller["session_id"])
        logs.event("logged_out", user_id=g.caller["id"], everywhere=query["everywhere"])
        return no_content()


@blp.route("/sessions")
class Sessions(MethodView):
    @signed_in
    @blp.response(200, OpenSessions)
    def get(self) -> Response:
        """List the caller's open sessions, last used first"""
        with db.reading() as conn:
            rows = queries.list(
                conn, user_id=g.caller["id"], current=g.caller["session_id"]
            )
        return answer(f'{{"data": [{", ".join(rows)}]}}')


@blp.route("/sessions/<id:session_id>")
class SessionById(MethodView):
    @signed_in
    @blp.response(204)
    def delete(self, session_id: int) -> Response:
        """End one of the caller's sessions"""
        with db.connection() as conn:
            if not queries.close(conn, user_id=g.caller["id"], session_id=session_id):
                raise Problem("not_found")
        logs.event("session_ended", user_id=g.caller["id"], session_id=session_id)
        return no_content()


@blp.route("/password")
class Password(MethodView):
    @signed_in
    @limits.login
    @blp.arguments(PasswordChange)
    @blp.response(204)
    @raises("invalid_credentials", "conflict")
    def post(self, data: dict) -> Response:
        """Change the password; every other session ends"""
        stored = check_own_password(data["current_password"], "current_password")
        fresh = new_hash(data["new_password"], g.caller["email"], "new_password")
        with db.connection() as conn:
            if not queries.change_password(
                conn, user_id=g.caller["id"], new=fresh, old=stored
            ):
                raise Problem("conflict", "The password was changed at the same time.")
            queries.close_all(conn, user_id=g.caller["id"], keep=g.caller["session_id"])
            queries.void_mail_tokens(conn, user_id=g.caller["id"])
        logs.event("password_changed", user_id=g.caller["id"])
        return no_content()


@blp.route("/password/forgot")
class Forgot(MethodView):
    @public
    @limits.login
    @blp.arguments(Forgotten)
    @blp.response(202, Accepted)
    def post(self, data: dict) -> Response:
        """Have a link for a new password sent, if the address has an account"""
        with db.connection() as conn:
            mail.enqueue(conn, "reset", data["email"])
        logs.event("password_forgotten", email=data["email"])
        return accepted()


@blp.route("/password/reset")
class ResetPassword(MethodView):
    @public
    @limits.login
    @blp.arguments(Reset)
    @blp.response(204)
    @raises("invalid_credentials")
    def post(self, data: dict) -> Response:
        """Set a new password with the token of a mail; every session ends"""
        fresh = new_hash(data["password"])
        with db.connection() as conn:
            user = redeem(conn, data["token"], "reset")
            if weakness := passwords.weakness(data["password"], user["email"]):
                raise invalid("password", weakness)  # which leaves the token unused
            queries.reset_password(conn, user_id=user["id"], new=fresh)
            queries.close_all(conn, user_id=user["id"], keep=None)
            queries.void_mail_tokens(conn, user_id=user["id"])
            queries.forgive(conn, email=user["email"], address=visit().address)
        logs.event("password_reset", user_id=user["id"])
        return no_content()


@blp.route("/email/verify")
class Verify(MethodView):
    @public
    @limits.login
    @blp.arguments(Verification)
    @blp.response(204)
    @raises("invalid_credentials")
    def post(self, data: dict) -> Response:
        """Confirm an e-mail address with the token of a mail"""
        with db.connection() as conn:
            user = redeem(conn, data["token"], "verify")
            queries.verify_email(conn, user_id=user["id"])
        logs.event("email_verified", user_id=user["id"])
        return no_content()


@blp.route("/email/verification")
class SendVerification(MethodView):
    @signed_in
    @limits.login
    @blp.response(202, Accepted)
    def post(self) -> Response:
        """Send the mail that confirms the caller's address again"""
        with db.connection() as conn:
            mail.enqueue(conn, "verify", g.caller["email"])
        return accepted()


def open_session(conn: db.Connection, user_id: int, password_hash: str) -> str | None:
    """JSON of a new session and its tokens; None if the hash isn't the user's any more."""
    session_id = queries.open(
        conn, user_id=user_id, password_hash=password_hash, address=visit().address,
        days=current_app.config["REFRESH_TOKEN_DAYS"],
        user_agent=(request.headers.get("User-Agent") or "")[:200] or None,
    )
    if session_id is None:
        return None
    tokens = json.dumps(jwt.pair(user_id, session_id, 0))
    return f'{{"user": {users.get(conn, id=user_id)}, {tokens[1:]}'


def redeem(conn: db.Connection, token: str, purpose: str) -> dict:
    """The user of a mailed token, which is used up by this. 401 for any other token."""
    user = queries.redeem(conn, token_hash=mail.token_hash(token), purpose=purpose)
    if user is None:
        raise Problem("invalid_credentials", "The token is wrong, used or too old.")
    return user


def new_hash(password: str, email: str | None = None, field: str = "password") -> str:
    """The hash of a password to be set. 422 if it is too common, or the address."""
    if weakness := passwords.weakness(password, email):
        raise invalid(field, weakness)
    return passwords.hashed(password)


def count_attempt(attempt_from: dict) -> None:
    """Count a password attempt before it is checked. 429 while the account is blocked.

    Attempts are counted first so that of any number of concurrent ones only five are checked. A
    correct one among them lifts the block; the others wait up to a second for that.
    """
    for _ in range(15):
        with db.reading() as conn:
            block = queries.attempt(conn, **attempt_from)
        if block is None:
            return
        if not block["fresh"]:
            break
        time.sleep(0.07)
    logs.event("login_blocked", email=attempt_from["email"])
    raise Problem("rate_limited", "Too many wrong passwords.",
                  headers={"Retry-After": str(max(1, block["wait"]))})


def check_own_password(password: str, field: str) -> str:
    """The caller's stored hash, if this is the caller's password. Throttled like a login."""
    attempt_from = {"email": g.caller["email"], "address": visit().address}
    count_attempt(attempt_from)
    with db.reading() as conn:
        user = queries.credentials_by_id(conn, id=g.caller["id"])
    if user is None:  # deleted since the token was looked at
        raise Problem("token_revoked")
    stored = user["password_hash"]
    if not passwords.matches(password, stored):
        logs.event("password_check_failed", user_id=g.caller["id"])
        raise Problem("invalid_credentials", f"{field} is not the account's password.")
    with db.reading() as conn:
        queries.forgive(conn, **attempt_from)
    return stored


def api_root() -> str:
    """/api/v1 or /api/v2, whichever the request came through."""
    return "/".join(request.path.split("/", 3)[:3])


def accepted() -> Response:
    return answer('{"status": "accepted"}', 202, cache=NO_STORE)
