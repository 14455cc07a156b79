"""Users in the shape of version 2. What they may do is version 1's."""
import json

from flask import Flask, Response
from flask.views import MethodView

import db
from blueprints.v1 import users as v1
from extensions.http.answers import answer, no_content
from extensions.http.arguments import Blueprint
from extensions.http.errors import raises
from extensions.jwt import admin, signed_in
from extensions.pages import Page, escape_like
from schemas.users_v2 import NewUserV2, UserChangesV2, UserPageV2, UserQueryV2, UserV2

blp = Blueprint("users", __name__, url_prefix="/users", description="Accounts and their owners")
queries = db.load("users_v2")


def init_app(app: Flask) -> None:
    v1.answer_me(app, "/api/v2/users", queries)


@blp.route("")
class Users(MethodView):
    @admin
    @blp.arguments(UserQueryV2, location="query")
    @blp.response(200, UserPageV2)
    def get(self, query: dict) -> Response:
        """List users, by cursor"""
        page = Page(query)
        with db.reading() as conn:
            rows = v1.queries.page(conn, version=2, role=query["role"],
                                   pattern=escape_like(query["search"]), **page.window())
        cursor = page.next_cursor(rows, key=lambda row: {
            "name": row["profile"]["name"], "email": row["email"], "created_at": row["created_at"],
        }[query["sort"]])
        here = page.link(cursor=query["cursor"]) if query["cursor"] else page.link()
        links = {"self": here, "next": page.link(cursor=cursor) if cursor else None}
        return answer(f'{{"data": [{", ".join(rows)}], "links": {json.dumps(links)}}}')

    @admin
    @blp.arguments(NewUserV2)
    @blp.response(201, UserV2)
    @raises("email_taken")
    def post(self, data: dict) -> Response:
        """Create a user, of any role"""
        user_id, text = v1.create(flat(data), queries)
        return answer(text, 201, location=user_id)


@blp.route("/<user_id:user_id>")
class UserById(MethodView):
    @signed_in
    @blp.response(200, UserV2)
    def get(self, user_id: int | str) -> Response:
        """Read a user: oneself (`me`), or as an admin anybody"""
        return answer(v1.read(user_id, queries))

    @signed_in
    @blp.arguments(UserChangesV2)
    @blp.response(200, UserV2)
    @raises("email_taken", "conflict", "invalid_credentials")
    def patch(self, data: dict, user_id: int | str) -> Response:
        """Change a user

        Only an admin sets `role`. Changing one's own e-mail address takes `current_password`, and
        the new address has to be confirmed.
        """
        return answer(v1.change(flat(data), user_id, queries))

    @signed_in
    @blp.response(204)
    @raises("conflict")
    def delete(self, user_id: int | str) -> Response:
        """Delete a user; the sales stay, without the person"""
        v1.remove(user_id, queries)
        return no_content()


def flat(data: dict) -> dict:
    """Version 2's body as version 1's."""
    profile = data.pop("profile", None)
    return data | profile if profile else data
