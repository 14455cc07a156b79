"""Products: what the shop sells."""
from collections.abc import Callable, Iterable

from flask import Response, request
from flask.views import MethodView

import db
from extensions import cache
from extensions.http.answers import answer, check_if_match, no_content, require_if_match
from extensions.http.arguments import Blueprint
from extensions.http.errors import or_404, raises
from extensions.http.visit import Pairs
from extensions.idempotency import idempotent
from extensions.jwt import admin, public
from extensions.pages import Page, escape_like
from schemas.products import NewProduct, Product, ProductChanges, ProductPage, ProductQuery

blp = Blueprint("products", __name__, url_prefix="/products", description="What the shop sells")
queries = db.load("products")


@blp.route("")
class Products(MethodView):
    @public
    @blp.arguments(ProductQuery, location="query")
    @blp.response(200, ProductPage)
    def get(self, query: dict) -> Response:
        """List products, filtered, searched and sorted; the newest first"""
        page = Page(query)
        groups = tuple(f"products:{c}" for c in query["category_id"] or ()) or ("products",)
        return cache.cached(cache.Known(
            cache.key_of(request.path, query), groups, lambda: list_page(page, query)
        ))

    @admin
    @blp.arguments(NewProduct)
    @blp.response(201, Product)
    @idempotent
    @raises("sku_taken")
    def post(self, conn: db.Connection, data: dict) -> tuple[str, int]:
        """Create a product

        With an `Idempotency-Key` a repeated request gets the first answer, not a second product.
        """
        product_id = queries.insert(conn, **data)
        text = queries.get(conn, id=product_id)
        invalidate(conn, product_id, {data["category_id"]}, moves=True)
        return text, product_id


@blp.route("/<id:product_id>")
class ProductById(MethodView):
    @public
    @blp.response(200, Product)
    def get(self, product_id: int) -> Response:
        """Read a product"""
        return cache.cached(single.known(product_id))

    @admin
    @blp.arguments(ProductChanges)
    @blp.response(200, Product)
    @raises("sku_taken")
    def patch(self, data: dict, product_id: int) -> Response:
        """Change a product"""
        require_if_match()
        with db.connection() as conn:
            product = lock(conn, product_id)
            queries.update(conn, **product | data)
            text = queries.get(conn, id=product_id)
            categories = {product["category_id"], data.get("category_id", product["category_id"])}
            invalidate(conn, product_id, categories, moves=len(categories) > 1)
        return answer(text)

    @admin
    @blp.response(204)
    def delete(self, product_id: int) -> Response:
        """Delete a product; one that was sold is retired, and stays in the reports"""
        require_if_match()
        with db.connection() as conn:
            product = lock(conn, product_id)
            end = queries.retire if product["sold"] else queries.delete
            end(conn, id=product_id)
            invalidate(conn, product_id, {product["category_id"]}, moves=True)
        return no_content()


def list_page(page: Page, query: dict) -> tuple[str, Pairs]:
    """(JSON, headers) of a page of products."""
    categories = query["category_id"] or []
    if len(categories) == 1 and page.number and page.sort == "-created_at" and is_plain(query):
        return newest_page(page, categories[0])
    filters = {
        # One category is asked for by equality, which an index answers in order.
        "category": categories[0] if len(categories) == 1 else None,
        "categories": categories if len(categories) > 1 else None,
        "min_price": query["min_price"], "max_price": query["max_price"],
        "in_stock": query["in_stock"], "pattern": escape_like(query["search"]), "ids": None,
    }
    ranked = rare_matches(query["search"], filters)
    if ranked is not None:
        filters["ids"] = [product_id for product_id, _ in ranked]
    total = first_total(page, query, filters)
    rows: list[str]
    if total is not None and page.offset >= total:
        rows, key = [], None  # behind the end: there is nothing to walk to
    else:
        rows, key = read(page, query, filters, ranked)
    if query["count"] == "none":
        total = None
    elif total is None:
        total = page.total(rows, lambda estimate: counted(filters, query, page, estimate))
    return page.render(rows, total, page.next_cursor(rows, key))


def newest_page(page: Page, category: int) -> tuple[str, Pairs]:
    """What a shop shows most: a category by page, the newest first. One query."""
    with db.reading() as conn:
        found = queries.newest(conn, category=category, limit=page.limit + 1, offset=page.offset)
        total = found[0]["total"] if found else queries.total_of(conn, categories=[category])
    rows = [row["json"] for row in found]
    total = None if page.query["count"] == "none" else total
    return page.render(rows, total, page.next_cursor(rows))


def first_total(page: Page, query: dict, filters: dict) -> int | None:
    """The list's size where it has to be known, or costs nothing, before its rows are read."""
    if page.number is None or (page.number == 1 and query["count"] == "none"):
        return None
    if filters["ids"] is not None:
        return len(filters["ids"])
    if is_plain(query):
        with db.reading() as conn:
            if query["category_id"]:
                return queries.total_of(conn, categories=query["category_id"])
            return queries.total(conn)
    return counted(filters, query, page, False) if page.number > 1 else None


def is_plain(query: dict) -> bool:
    """Whether nothing but categories is filtered by."""
    return all(query[name] is None for name in ("min_price", "max_price", "in_stock", "search"))


def counted(filters: dict, query: dict, page: Page, estimate: bool) -> int:
    """How many products match the filters; an exact count is cached until a product changes."""
    def ask():
        with db.reading() as conn:
            return (queries.count.estimate if estimate else queries.count)(conn, **filters)
    if estimate:
        return ask()
    # A sale changes what is in stock, and no other count.
    shelf = "catalogue" if query["in_stock"] is None else "products"
    groups = tuple(f"{shelf}:{c}" for c in query["category_id"] or ()) or (shelf,)
    return page.kept_total("products", groups, ask)


def read(
    page: Page, query: dict, filters: dict, ranked: list | None
) -> tuple[list[str], Callable | None]:
    """A page's (rows as JSON, function from a row to its cursor's key, or None)."""
    with db.reading() as conn:
        if query["sort"] != "relevance":
            return queries.page(conn, **filters, **page.window()), None
        if ranked is not None and page.after is None:
            shown = ranked[page.offset:page.offset + page.limit + 1]
            rank = shown[:page.limit][-1][1] if shown else None
            return (queries.listed(conn, ids=[product_id for product_id, _ in shown]),
                    lambda row: [rank, row["name"]])
        after_rank, after_name = page.after or (None, None)
        found = queries.relevant(
            conn, **filters, **page.window(), search=query["search"], after_rank=after_rank,
            after_name=after_name,
        )
    last = found[min(len(found), page.limit) - 1] if found else {}
    return [row["json"] for row in found], lambda row: [last["rank"], row["name"]]


def rare_matches(search: str | None, filters: dict) -> list | None:
    """[[id, rank]] of the products that match a rare term and the filters, best first.

    None if there is no term, or a common one. PostgreSQL's statistics sample a hundred texts: if
    one of them contains the term, it estimates that 1% of all products do, and would read
    products in order until it has found enough.
    """
    if search is None:
        return None
    with db.reading() as conn:
        matches = queries.matches(conn, search=search, **filters)
    return matches["ranked"] if matches["found"] <= 500 else None


def find(product_id: int | str) -> str:
    with db.reading() as conn:
        return or_404(queries.get(conn, id=product_id))


single = cache.Single("product", "/products", find, "category_names")


def lock(conn: db.Connection, product_id: int) -> dict:
    """The product's row, locked, with If-Match checked against it."""
    product = or_404(queries.lock(conn, id=product_id))
    check_if_match(queries.get(conn, id=product_id))
    return product


def invalidate(conn: db.Connection, product_id: int, categories: Iterable[int | None],
           moves: bool = False) -> None:
    """Invalidate the cache of this product, and of the lists and counts it is in or was in.

    ``moves``: whether it enters or leaves a category.
    """
    categories = [c for c in categories if c]
    cache.change(
        conn, f"product:{product_id}", "products", "catalogue",
        *(f"{shelf}:{c}" for c in categories for shelf in ("products", "catalogue")),
        *(["categories", *(f"category:{c}" for c in categories)] if moves else []),
    )
