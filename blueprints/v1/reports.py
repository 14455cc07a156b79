"""Reports: a stream of every item sold, and sums over it."""
import logging
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
from flask import Flask, Response, current_app, request
from flask.views import MethodView
from psycopg.pq import TransactionStatus

import db
from db.pool import Database
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
        kind = query["format"] or accepted()
        window = {"start_date": query["start_date"], "end_date": query["end_date"]}
        slots = current_app.extensions["report_slots"]
        if not slots.acquire(blocking=False):
            raise Problem("unavailable", "As many reports as may run at once are running.",
                          headers={"Retry-After": "5"})
        report = Report(db.reports(), slots, kind, window)
        try:
            size = report.open()
        except BaseException:
            report.close()
            raise
        name = f"transactions_{window['start_date']:%Y-%m-%d}_{window['end_date']:%Y-%m-%d}.{kind}"
        response = Response(report, content_type=TYPES[kind] + (
            "; charset=utf-8; header=present" if kind == "csv" else ""))
        response.headers.update({
            "Content-Disposition": f'attachment; filename="{name}"',
            "Report-Rows": str(size["rows"]), "Report-Amount": size["amount"],
            "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization",
        })
        if client := request.environ.get("gunicorn.socket"):
            client.settimeout(STALL_SECONDS)
        if request.method == "HEAD":
            report.close()
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


def accepted() -> str:
    """The format that the Accept header prefers; JSON where it doesn't say."""
    if not request.accept_mimetypes:
        return "json"
    best = request.accept_mimetypes.best_match(TYPES.values())
    if best is None:
        raise Problem("not_acceptable", "Reports come as " + ", ".join(TYPES.values()) + ".")
    return next(kind for kind, type_ in TYPES.items() if type_ == best)


class Report:
    """The body of a report: blocks out of COPY, read as fast as the client takes them.

    Holds a connection with one snapshot, and a slot, until it is closed: by the server at the end
    of the response, however that comes.
    """

    _slots: threading.Semaphore | None
    _borrowed: Any  # what open() takes
    _conn: Any
    _stream: Any

    def __init__(self, database: Database, slots: threading.Semaphore, kind: str,
                 window: dict[str, datetime]) -> None:
        self._database, self._slots, self._kind, self._window = database, slots, kind, window
        self._borrowed = self._conn = self._stream = None
        self._blocks = self._read()
        self._lock = threading.Lock()

    def open(self) -> dict:
        """Take the snapshot. Returns what is in it: ``{rows, amount}``."""
        self._borrowed = self._database.snapshot()
        self._conn = self._borrowed.__enter__()
        # A sort would have all rows before the first; the index has them in order.
        self._conn.execute("SET LOCAL enable_sort = off")
        return queries.size(self._conn, **self._window)

    def __iter__(self):
        return self._blocks

    def close(self) -> None:
        """Give slot and connection back."""
        with self._lock:
            slots, self._slots = self._slots, None
        if slots is None:
            return
        try:
            # A COPY that has come to its end keeps the connection locked until its block is left.
            if self._stream and self._conn.info.transaction_status == TransactionStatus.INTRANS:
                self._stream.close()
            if self._conn is not None:
                self._borrowed.__exit__(None, None, None)
        finally:
            slots.release()

    def _read(self):
        self._stream = stream(self._conn, self._kind, self._window)
        try:
            yield from self._stream
        except psycopg.Error as error:
            log.error("a report broke off: %s", error)
            raise  # which ends the transfer without its last chunk, so that the client can tell
        finally:
            self.close()


def sums(conn: db.Connection, group_by: str, **window: datetime) -> str:
    """JSON of the sums: exact, whichever part of the window is sealed."""
    if group_by == "product":
        return queries.sales_by_product(conn, **window)
    return queries.sales(conn, group_by=group_by, **window)


def stream(conn: db.Connection, kind: str, window: dict) -> Iterator[bytes]:
    """The report's bytes, in blocks of about 64 kB."""
    lines = queries.csv_lines if kind == "csv" else queries.json_lines
    with lines(conn, **window) as copy:
        yield from {"csv": _csv, "json": _json, "ndjson": iter}[kind](_blocks(copy))


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
