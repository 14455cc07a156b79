"""Named queries out of ``sql/*.sql``, each a function of a connection and its parameters.

A query starts with ``-- name: <name> :<shape>`` and runs to the next one. The shape says what
calling it returns:

======== ===========================================================================
one      one row as a dict, or None
many     all rows as a list of dicts
value    the first column of the first row, or None
count    how many rows it changed
json     the row as JSON text that PostgreSQL made, or None
rows     every row as JSON text, a list
column   the first column of every row, a list
csv      COPY of the rows as CSV with a header line: a psycopg Copy to read blocks from
ndjson   COPY of the rows as JSON, one a line: a psycopg Copy to read blocks from
======== ===========================================================================

A query that takes longer than SLOW_SECONDS is named in the log.

``replan`` after the shape means that the statement is not prepared: each run is planned with its
actual values, so that unused filters are optimised away and an ordinary index can be used.
"""
import logging
import math
import pathlib
import re
import time
from types import SimpleNamespace
from typing import Any

from psycopg.rows import dict_row

from db.pool import Connection

SLOW_SECONDS = 0.5
log = logging.getLogger("shopfront.sql")
FOLDER = pathlib.Path(__file__).parents[1] / "sql"
_HEAD = re.compile(r"^-- name: (\w+) :(\w+)( replan)?\n", re.M)
_BARE_PERCENT = re.compile(r"%(?!\(\w+\)s)")
_JSON = "WITH r AS (\n{}\n) SELECT row_to_json(r)::text FROM r"
# JSON has no control characters: with these two as CSV's own, its text passes unchanged.
_NDJSON = "COPY (SELECT row_to_json(r) FROM (\n{}\n) r) TO STDOUT (FORMAT csv, QUOTE E'\\x01', " \
          "DELIMITER E'\\x02')"
_WRAP = {"json": _JSON, "rows": _JSON, "ndjson": _NDJSON,
         "csv": "COPY (\n{}\n) TO STDOUT (FORMAT csv, HEADER)"}


class Query:
    """One named query. Call it with a connection and the named parameters."""

    def __init__(self, name: str, shape: str, replan: str | None, sql: str,
                 patient: bool = False) -> None:
        self.name, self.shape = name, shape
        self._slow = math.inf if patient else SLOW_SECONDS
        self.prepare = False if replan else None
        text = "\n".join(x for x in sql.splitlines() if not x.startswith("--")).strip().rstrip(";")
        self.plain = text
        self.sql = _WRAP.get(shape, "{}").format(text)
        # The leading name identifies the statement in PostgreSQL's activity view and slow log.
        self._escaped = f"/* {name} */ {_BARE_PERCENT.sub('%%', self.sql)}"
        self.index = re.findall(r"^-- index: (\w+)", sql, re.M)
        self._fetch = getattr(self, f"_{shape}")

    def __call__(self, conn: Connection, **params: object) -> Any:
        return self._fetch(conn, params)

    def estimate(self, conn: Connection, **params: object) -> int:
        """How many rows PostgreSQL guesses that a ``SELECT count(*)`` would count."""
        explain = f"EXPLAIN (FORMAT JSON) {self._escaped}"
        node = conn.execute(explain, params, prepare=False).fetchall()[0][0][0]["Plan"]
        while node["Node Type"] in ("Aggregate", "Gather", "Gather Merge"):
            node = node["Plans"][0]
        return int(node["Plan Rows"])

    def _run(self, conn, params, **kwargs):
        began = time.monotonic()
        try:
            return conn.cursor(**kwargs).execute(self._escaped, params, prepare=self.prepare)
        finally:
            if (seconds := time.monotonic() - began) > self._slow:
                log.warning("slow query", extra={"query": self.name, "seconds": round(seconds, 3)})

    def _one(self, conn, params):
        return self._run(conn, params, row_factory=dict_row).fetchone()

    def _many(self, conn, params):
        return self._run(conn, params, row_factory=dict_row).fetchall()

    def _value(self, conn, params):
        row = self._run(conn, params).fetchone()
        return row and row[0]

    def _count(self, conn, params):
        return self._run(conn, params).rowcount

    def _rows(self, conn, params):
        return [row[0] for row in self._run(conn, params).fetchall()]

    def _copy(self, conn, params):
        return conn.cursor().copy(self._escaped, params)

    _json, _column, _csv, _ndjson = _value, _rows, _copy, _copy


def load(name: str, patient: bool = False) -> SimpleNamespace:
    """The queries of ``sql/<name>.sql``, as attributes of one object.

    ``patient`` where they may take their time, and are not named in the log for it.
    """
    text = (FOLDER / f"{name}.sql").read_text()
    parts = _HEAD.split(text)[1:]
    found = zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True)
    return SimpleNamespace(**{
        query: Query(f"{name}.{query}", shape, replan, sql, patient)
        for query, shape, replan, sql in found
    })
