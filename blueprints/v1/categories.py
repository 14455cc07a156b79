"""Categories of the catalogue."""
from flask import Response
from flask.views import MethodView

import db
from extensions import cache
from extensions.http.answers import answer, check_if_match, no_content, require_if_match
from extensions.http.arguments import Blueprint
from extensions.http.errors import or_404, raises
from extensions.jwt import admin, public
from schemas.categories import Categories as CategoryList
from schemas.categories import Category, CategoryIn

blp = Blueprint("categories", __name__, url_prefix="/categories",
                description="Categories of the catalogue")
queries = db.load("categories")


@blp.route("")
class Categories(MethodView):
    @public
    @blp.response(200, CategoryList)
    def get(self) -> Response:
        """List all categories by name, each with its number of products"""
        return cache.cached(everything)

    @admin
    @blp.arguments(CategoryIn)
    @blp.response(201, Category)
    @raises("name_taken")
    def post(self, data: dict) -> Response:
        """Create a category"""
        with db.connection() as conn:
            category_id = queries.insert(conn, name=data["name"])
            text = queries.get(conn, id=category_id)
            cache.change(conn, "categories")
        return answer(text, 201, location=category_id)


@blp.route("/<id:category_id>")
class CategoryById(MethodView):
    @public
    @blp.response(200, Category)
    def get(self, category_id: int) -> Response:
        """Read a category"""
        return cache.cached(single.known(category_id))

    @admin
    @blp.arguments(CategoryIn)
    @blp.response(200, Category)
    @raises("name_taken")
    def patch(self, data: dict, category_id: int) -> Response:
        """Rename a category"""
        require_if_match()
        with db.connection() as conn:
            lock(conn, category_id)
            queries.update(conn, id=category_id, name=data["name"])
            text = queries.get(conn, id=category_id)
            # Every product shows its category's name, in lists and by itself.
            cache.change(conn, "categories", f"category:{category_id}", "category_names",
                         "products", f"products:{category_id}")
        return answer(text)

    @admin
    @blp.response(204)
    @raises("category_in_use")
    def delete(self, category_id: int) -> Response:
        """Delete a category that no product belongs to"""
        require_if_match()
        with db.connection() as conn:
            lock(conn, category_id)
            queries.delete(conn, id=category_id)
            cache.change(conn, "categories", f"category:{category_id}")
        return no_content()


def find_all() -> tuple[str, tuple]:
    with db.reading() as conn:
        rows = queries.list(conn)
    return f'{{"data": [{", ".join(rows)}]}}', ()


everything = cache.Known("categories", ("categories",), find_all)


def find(category_id: int | str) -> str:
    with db.reading() as conn:
        return or_404(queries.get(conn, id=category_id))


single = cache.Single("category", "/categories", find)


def lock(conn: db.Connection, category_id: int) -> None:
    """Lock a category and check If-Match against it."""
    or_404(queries.lock(conn, id=category_id))
    check_if_match(queries.get(conn, id=category_id))
