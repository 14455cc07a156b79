"""Sales. Here `transaction` always means a sale; a database transaction is a connection's block."""
from flask import Response, g
from flask.views import MethodView

import db
from extensions import cache
from extensions.http.answers import answer
from extensions.http.arguments import Blueprint
from extensions.http.errors import Problem, or_404, raises
from extensions.idempotency import idempotent
from extensions.jwt import admin, is_admin, signed_in
from extensions.pages import Page
from schemas.transactions import NewTransaction, Transaction, TransactionPage, TransactionQuery

blp = Blueprint("transactions", __name__, url_prefix="/transactions",
                description="Sales and refunds")
queries = db.load("transactions")


@blp.route("")
class Transactions(MethodView):
    @signed_in
    @blp.arguments(TransactionQuery, location="query")
    @blp.response(200, TransactionPage)
    @raises("forbidden")
    def get(self, query: dict) -> Response:
        """List sales, the newest first: one's own, as an admin everybody's"""
        if query["user_id"] is not None and not is_admin() and query["user_id"] != g.caller["id"]:
            raise Problem("forbidden", "Only an administrator may ask for others' sales.")
        page = Page(query, "-created_at")
        filters = {
            "user_id": query["user_id"] if is_admin() else g.caller["id"],
            "status": query["status"], "start": query["start"], "end": query["end"],
        }
        with db.reading() as conn:
            rows = queries.page(conn, **filters, **page.window())
            total = page.total_of(rows, conn, queries.count, **filters)
        text, headers = page.render(rows, total, page.next_cursor(rows))
        return answer(text, headers=dict(headers))

    @signed_in
    @blp.arguments(NewTransaction)
    @blp.response(201, Transaction)
    @idempotent
    @raises("out_of_stock")
    def post(self, conn: db.Connection, data: dict) -> tuple[str, int]:
        """Buy: takes the stock and records the sale at today's prices, all or nothing

        With an `Idempotency-Key` a repeated request gets the first answer, not a second sale.
        """
        items = data["items"]
        sale = queries.sell(
            conn, user_id=g.caller["id"], product_ids=[item["product_id"] for item in items],
            quantities=[item["quantity"] for item in items],
        )
        position = {item["product_id"]: i for i, item in enumerate(items)}
        if sale["unknown"]:
            raise Problem("validation_failed", "Some products do not exist.", [
                (f"items.{position[i]}.product_id", "body", f"There is no product {i}.")
                for i in sale["unknown"]
            ])
        if sale["short"]:
            raise Problem("out_of_stock", details=[
                (f"items.{position[i]}.quantity", "body", f"Not enough of product {i}.")
                for i in sale["short"]
            ])
        invalidate_stock(conn, list(position), sale["categories"])
        return sale["json"], sale["id"]


@blp.route("/<id:transaction_id>")
class TransactionById(MethodView):
    @signed_in
    @blp.response(200, Transaction)
    def get(self, transaction_id: int) -> Response:
        """Read a sale: one's own, as an admin anybody's"""
        with db.reading() as conn:
            return answer(or_404(queries.get(
                conn, id=transaction_id, user_id=None if is_admin() else g.caller["id"]
            )))


@blp.route("/<id:transaction_id>/refund")
class Refund(MethodView):
    @admin
    @blp.response(200, Transaction)
    @raises("conflict")
    def post(self, transaction_id: int) -> Response:
        """Refund a sale, once; what was sold is in stock again"""
        with db.connection() as conn:
            done = queries.refund(conn, id=transaction_id)
            text = or_404(queries.get(conn, id=transaction_id, user_id=None))
            if not done["refunded"]:
                raise Problem("conflict", "This sale was refunded before.")
            invalidate_stock(conn, done["products"] or [], done["categories"] or [])
        return answer(text)


def invalidate_stock(conn: db.Connection, products: list[int], categories: list) -> None:
    """Make stale what shows the stock of these products."""
    cache.change(
        conn, "products", *(f"product:{p}" for p in products),
        *(f"products:{c}" for c in categories if c),
    )
