"""Reports: a stream of every item sold, and sums over it."""
import contextlib
import itertools
import logging
import threading
from collections.abc import Generator, Iterator
from datetime import datetime

import psycopg
from flask import Flask, Response, current_app, request
from flask.views import MethodView
from psycopg.pq import TransactionStatus

import db
from extensions.http.answers import answer
from extensions.http.arguments import Blueprint
from extensions.http.errors import Problem, raises
from extensions.jwt import admin
from schemas.reports import (
    SalesReport,
    SalesReportQuery,
    TransactionsReport,
    TransactionsReportQuery,
)

log = logging.getLogger("shopfront.reports")
blp = Blueprint("reports", __name__, url_prefix="/reports", description="What was sold")
queries = db.load("reports")

TYPES = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv"}
BLOCK = 64 * 1024
STALL_SECONDS = 60  # how long a client may leave a block unread


@blp.route("/transactions")
class Transactions(MethodView):
    @admin
    @blp.arguments(TransactionsReportQuery, location="query")
    @blp.response(200, TransactionsReport)
    @raises("not_acceptable")
    def get(self, query: dict) -> Response:
        """Download every item sold in a time, in order

        `Report-Rows` and `Report-Amount` tell what a whole download holds.
        """
        kind = query.pop("format") or negotiated_format()
        slots = current_app.extensions["report_slots"]
        if not slots.acquire(blocking=False):
            raise Problem("unavailable", "As many reports as may run at once are running.",
                          headers={"Retry-After": "5"})
        held = contextlib.ExitStack()
        held.callback(slots.release)
        try:
            response = download(held, kind, query)
        except BaseException:
            held.close()
            raise
        if request.method == "HEAD":
            held.close()
        return response


@blp.route("/sales")
class Sales(MethodView):
    @admin
    @blp.arguments(SalesReportQuery, location="query")
    @blp.response(200, SalesReport)
    def get(self, query: dict) -> Response:
        """Sum sales by day, week, month, category or product; refunds are left out"""
        with db.reports().reading() as conn:
            return answer(sums(conn, **query))


def negotiated_format() -> str:
    """The format that the Accept header prefers; JSON where it doesn't say."""
    if not request.accept_mimetypes:
        return "json"
    best = request.accept_mimetypes.best_match(TYPES.values())
    if best is None:
        raise Problem("not_acceptable", "Reports come as " + ", ".join(TYPES.values()) + ".")
    return next(kind for kind, type_ in TYPES.items() if type_ == best)


def download(held: contextlib.ExitStack, kind: str, window: dict) -> Response:
    """The response of a report, which gives back what is ``held`` at its end, however that comes.
    """
    size, blocks = begin(held, kind, window)
    # chain() has no close(), which in the middle of a COPY would wait for PostgreSQL.
    response = Response(itertools.chain(blocks, releasing(held)), content_type=TYPES[kind] + (
        "; charset=utf-8; header=present" if kind == "csv" else ""))
    response.call_on_close(held.close)  # if the client disconnects early
    name = f"transactions_{window['start_date']:%Y-%m-%d}_{window['end_date']:%Y-%m-%d}.{kind}"
    response.headers.update({
        "Content-Disposition": f'attachment; filename="{name}"',
        "Report-Rows": str(size["rows"]), "Report-Amount": size["amount"],
        "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization",
    })
    if client := request.environ.get("gunicorn.socket"):
        client.settimeout(STALL_SECONDS)
    return response


def begin(held: contextlib.ExitStack, kind: str, window: dict) -> tuple[dict, Iterator[bytes]]:
    """({rows, amount}, blocks) of a report, out of one snapshot, which ``held`` keeps.

    The blocks come out of COPY, read as fast as the client takes them.
    """
    conn = held.enter_context(db.reports().snapshot())
    # A sort would have all rows before the first; the index has them in order.
    conn.execute("SET LOCAL enable_sort = off")
    size = queries.size(conn, **window)
    blocks = stream(conn, kind, window)

    def leave():
        # A finished COPY keeps the connection locked until its ``with`` block is left; an
        # unfinished one ends when the connection is closed.
        if conn.pgconn.transaction_status == TransactionStatus.INTRANS:
            blocks.close()
    held.callback(leave)
    return size, blocks


def releasing(held: contextlib.ExitStack) -> Iterator[bytes]:
    """Yield nothing; release ``held`` once the blocks before it are read."""
    held.close()
    yield from ()


def sums(conn: db.Connection, group_by: str, **window: datetime) -> str:
    """JSON of the sums: exact, whichever part of the window is sealed."""
    if group_by == "product":
        return queries.sales_by_product(conn, **window)
    return queries.sales(conn, group_by=group_by, **window)


def stream(conn: db.Connection, kind: str, window: dict) -> Generator[bytes]:
    """The report's bytes, in blocks of about 64 kB."""
    lines = queries.csv_lines if kind == "csv" else queries.json_lines
    try:
        with lines(conn, **window) as copy:
            yield from {"csv": _csv, "json": _json, "ndjson": iter}[kind](_blocks(copy))
    except psycopg.Error as error:
        log.error("a report broke off: %s", error)
        raise  # which ends the transfer without its last chunk, so that the client can tell


def _blocks(copy):
    rows, size = [], 0
    for row in copy:
        rows.append(row)
        size += len(row)
        if size >= BLOCK:
            yield b"".join(rows)
            rows, size = [], 0
    if rows:
        yield b"".join(rows)


def _csv(blocks):
    for block in blocks:
        yield block.replace(b"\n", b"\r\n")  # RFC 4180; a name has no line breaks of its own


def _json(blocks):
    yield b'{"data": ['
    between = b""
    for block in blocks:
        yield between + block[:-1].replace(b"\n", b",\n")
        between = b",\n"
    yield b"]}"


def init_app(app: Flask) -> None:
    app.extensions["report_slots"] = threading.BoundedSemaphore(app.config["REPORT_CONCURRENCY"])
