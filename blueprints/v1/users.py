"""Users: an admin's list of them, and everybody's own account."""
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace

from flask import Flask, Response, current_app, g, request
from flask.views import MethodView
from werkzeug.http import http_date

import db
from blueprints.v1.auth import check_own_password, new_hash
from extensions.behind import mail
from extensions.http import logs
from extensions.http.answers import (
    answer,
    check_if_match,
    no_content,
    private_without_flask,
    require_if_match,
)
from extensions.http.arguments import Blueprint
from extensions.http.errors import Problem, invalid, or_404, raises
from extensions.http.metrics import count_deprecated
from extensions.jwt import admin, identify, is_admin, signed_in
from extensions.pages import Page, escape_like
from schemas.users import NewUser, User, UserChanges, UserPage, UserQuery

blp = Blueprint("users", __name__, url_prefix="/users", description="Accounts and their owners")
queries = db.load("users")
auth = db.load("auth")


@blp.before_app_request
def end_after_sunset() -> None:
    """Answer 410 for v1's users from V1_USERS_SUNSET on, if V1_USERS_GONE is set."""
    config = current_app.config
    if is_v1_users_path() and config["V1_USERS_GONE"] and \
            datetime.now(config["V1_USERS_SUNSET"].tzinfo) >= config["V1_USERS_SUNSET"]:
        raise Problem("gone")


def is_v1_users_path() -> bool:
    """Whether a path is below v1's users, even where no route or method matches."""
    return request.path == PATH or request.path.startswith(f"{PATH}/")


def announce_the_end(sunset: datetime) -> Callable:
    """A function that adds Deprecation (RFC 9745), Sunset (RFC 8594) and where to go instead."""
    pairs = [("Deprecation", f"@{DEPRECATED_SINCE}"), ("Sunset", http_date(sunset)),
             ("Link", '</api/v2/users>; rel="successor-version"')]

    def announce(visit, headers):
        headers += pairs
        if visit.route:
            count_deprecated(visit)
    return announce


def init_app(app: Flask) -> None:
    app.extensions["door"].notices[PATH] = announce_the_end(app.config["V1_USERS_SUNSET"])
    if not app.config["V1_USERS_GONE"]:
        answer_me(app, PATH, queries)


def answer_me(app: Flask, path: str, shape: SimpleNamespace) -> None:
    """Have the door answer "who am I" by one query, in the version's ``shape``."""
    app.extensions["door"].direct[f"{path}/me"] = f"{path}/<user_id:user_id>", lambda visit: (
        private_without_flask(visit, identify(visit, shape.me)["json"]))


PATH = "/api/v1/users"
DEPRECATED_SINCE = 1764547200  # 2025-12-01


@blp.route("")
class Users(MethodView):
    @admin
    @blp.arguments(UserQuery, location="query")
    @blp.response(200, UserPage)
    def get(self, query: dict) -> Response:
        """List users"""
        page = Page(query)
        filters = {"role": query["role"], "pattern": escape_like(query["search"])}
        with db.reading() as conn:
            rows = queries.page(conn, version=1, **filters, **page.window())
            total = page.total_of(rows, conn, queries.count, **filters)
        text, headers = page.render(rows, total, page.next_cursor(rows))
        return answer(text, headers=dict(headers))

    @admin
    @blp.arguments(NewUser)
    @blp.response(201, User)
    @raises("email_taken")
    def post(self, data: dict) -> Response:
        """Create a user, of any role"""
        user_id, text = create(data, queries)
        return answer(text, 201, location=user_id)


@blp.route("/<user_id:user_id>")
class UserById(MethodView):
    @signed_in
    @blp.response(200, User)
    def get(self, user_id: int | str) -> Response:
        """Read a user: oneself (`me`), or as an admin anybody"""
        return answer(read(user_id, queries))

    @signed_in
    @blp.arguments(UserChanges)
    @blp.response(200, User)
    @raises("email_taken", "conflict", "invalid_credentials")
    def patch(self, data: dict, user_id: int | str) -> Response:
        """Change a user

        Only an admin sets `role`. Changing one's own e-mail address takes `current_password`, and
        the new address has to be confirmed.
        """
        return answer(change(data, user_id, queries))

    @signed_in
    @blp.response(204)
    @raises("conflict")
    def delete(self, user_id: int | str) -> Response:
        """Delete a user; the sales stay, without the person"""
        remove(user_id, queries)
        return no_content()


def visible(user_id: int | str) -> int:
    """The numeric id of a user the caller may see; 404 for everybody else's."""
    if isinstance(user_id, str):  # "me"
        return g.caller["id"]
    if user_id != g.caller["id"] and not is_admin():
        raise Problem("not_found")
    return user_id


def create(data: dict, shape: SimpleNamespace) -> tuple[int, str]:
    """Store a user. Returns (id, JSON in the version's ``shape``)."""
    password_hash = new_hash(data["password"], data["email"])
    with db.connection() as conn:
        user_id = queries.insert(
            conn, email=data["email"], name=data["name"], role=data["role"],
            password_hash=password_hash,
        )
        mail.enqueue(conn, "verify", data["email"])
        text = shape.get(conn, id=user_id)
    logs.event("user_created", user_id=user_id, role=data["role"], by=g.caller["id"])
    return user_id, text


def read(user_id: int | str, shape: SimpleNamespace) -> str:
    """A user's JSON."""
    with db.reading() as conn:
        return or_404(shape.get(conn, id=visible(user_id)))


def change(data: dict, user_id: int | str, shape: SimpleNamespace) -> str:
    """Store changes of a user under If-Match. Returns the new JSON."""
    user_id = visible(user_id)
    require_if_match()
    own = user_id == g.caller["id"]
    if "role" in data and not is_admin():
        raise invalid("role", "Only an administrator may set this.")
    password = data.pop("current_password", None)
    stored = None
    if own and data.get("email", g.caller["email"]) != g.caller["email"]:
        if password is None:
            raise invalid("current_password", "Needed to change the e-mail address.")
        stored = check_own_password(password, "current_password")
    with db.connection() as conn:
        user = locked(conn, user_id, demotes=data.get("role") == "user")
        check_if_match(shape.get(conn, id=user_id))
        if stored is not None and user["password_hash"] != stored:
            raise Problem("conflict", "The password was changed at the same time.")
        moved = data.get("email", user["email"]) != user["email"]
        verified = user["email_verified"] and not moved
        queries.update(conn, **user | data | {"email_verified": verified})
        if moved:
            auth.void_mail_tokens(conn, user_id=user_id)
            mail.enqueue(conn, "verify", data["email"])
        text = shape.get(conn, id=user_id)
    if moved:
        logs.event("email_changed", user_id=user_id, by=g.caller["id"])
    if data.get("role", user["role"]) != user["role"]:
        logs.event("role_changed", user_id=user_id, role=data["role"], by=g.caller["id"])
    return text


def remove(user_id: int | str, shape: SimpleNamespace) -> None:
    """Delete a user under If-Match."""
    user_id = visible(user_id)
    require_if_match()
    with db.connection() as conn:
        locked(conn, user_id, demotes=True)
        check_if_match(shape.get(conn, id=user_id))
        queries.delete(conn, id=user_id)
    logs.event("user_deleted", user_id=user_id, by=g.caller["id"])


def locked(conn: db.Connection, user_id: int, demotes: bool) -> dict:
    """The user's row, locked. 409 if the change would leave the shop without an admin."""
    admins = [row["id"] for row in queries.lock_admins(conn)] if demotes else []
    user = or_404(queries.lock(conn, id=user_id))
    if admins == [user_id]:
        raise Problem("conflict", "This is the last administrator.")
    return user
