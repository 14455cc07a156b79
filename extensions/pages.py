"""Pages of a list: cursors, totals, Link headers, around rows that are JSON text already."""
import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from flask import request
from itsdangerous import BadData, URLSafeSerializer

from db import Connection
from db.queries import Query
from extensions import cache, jwt
from extensions.http.errors import invalid
from extensions.http.visit import Pairs

WALKING = ("cursor", "page", "limit", "count")


def escape_like(search: str | None) -> str | None:
    """Escape a search term for LIKE, so that %, _ and \\ match literally. None stays None."""
    return search and search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


class Page:
    """One page of a list, asked for by a validated query.

    ``sort`` is the column, with ``-`` in front for descending; by default it comes from the
    query's ``sort`` and ``order``. ``kept`` are the parameters that a cursor is bound to, and that
    every link repeats.
    """

    def __init__(self, query: dict, sort: str | None = None) -> None:
        self.query, self.limit = query, query["limit"]
        self.path, self.name = request.path, str(request.endpoint).rpartition(".")[2]
        self.sort = sort or ("-" if query["order"] == "desc" else "") + query["sort"]
        self.number = None if query["cursor"] else query.get("page") or 1
        self.kept = {k: v for k, v in query.items() if k not in WALKING}
        self.after, self.after_id = self._read_cursor(query["cursor"])

    def window(self) -> dict[str, Any]:
        """Parameters for a page query; one row more than asked tells whether there is a next."""
        return {"sort": self.sort, "limit": self.limit + 1, "offset": self.offset,
                "after": self.after, "after_id": self.after_id}

    def next_cursor(self, rows: list[str], key: Callable[[dict], Any] | None = None) -> str | None:
        """The cursor after the last row shown, or None on the last page. Drops the extra row.

        ``key`` gets that row as a dict and returns its sort value; the default is the column.
        """
        if len(rows) <= self.limit:
            return None
        del rows[self.limit:]
        last = json.loads(rows[-1])
        value = key(last) if key else last[self.sort.lstrip("-")]
        return self._signer(jwt.keys()[0]).dumps([value, last["id"]])

    @property
    def offset(self) -> int:
        """How many rows come before the page."""
        return (self.number - 1) * self.limit if self.number else 0

    def total(self, rows: list[str], count: Callable[[bool], int]) -> int | None:
        """The list's size, as the parameter ``count`` asks: exact, estimated, or None.

        ``rows`` includes the extra row, if there is one: without it, this is the last page and
        tells an exact total by itself. Otherwise ``count(estimate)`` is called.
        """
        how = self.query["count"]
        if self.number is None or how == "none":
            return None
        if how == "exact" and len(rows) <= self.limit and (rows or self.number == 1):
            return self.offset + len(rows)
        return count(how == "estimated")

    def total_of(self, rows: list[str], conn: Connection, count: Query,
                 **filters: object) -> int | None:
        """``total``, by a query of how many rows these filters let pass."""
        return self.total(rows, lambda estimate: (
            count.estimate if estimate else count)(conn, **filters))

    def kept_total(self, resource: str, groups: tuple[str, ...], count: Callable[[], int]) -> int:
        """An exact count from the cache: counted once a filter, not once a page."""
        key = cache.key_of(f"count:{resource}", {k: v for k, v in self.kept.items()
                                                 if k not in ("sort", "order")})
        entry, _, _ = cache.fetch(cache.Known(key, groups, lambda: (str(count()), ())))
        return int(entry.partition(b"\n")[2])

    def render(self, rows: list[str], total: int | None,
               next_cursor: str | None) -> tuple[str, Pairs]:
        """(JSON text, headers) of ``{data, pagination}`` and its Link header (RFC 8288)."""
        pages = None if total is None else -(-total // self.limit)
        pagination = {"page": self.number, "limit": self.limit, "total": total, "pages": pages,
                      "next_cursor": next_cursor}
        text = f'{{"data": [{", ".join(rows)}], "pagination": {json.dumps(pagination)}}}'
        return text, [("Link", self._links(pages, next_cursor))]

    def link(self, **parameters: object) -> str:
        """This list's address with the caller's parameters and these."""
        given = {"limit": self.limit} if self.query["limit"] != 20 else {}
        if self.query.get("count", "exact") != "exact":
            given["count"] = self.query["count"]
        kept = {k: str(v).lower() if isinstance(v, bool) else v
                for k, v in self.kept.items() if v is not None}
        return f"{self.path}?{urlencode(kept | given | parameters, doseq=True)}"

    def _links(self, pages, next_cursor):
        links = {"first": self.link() if self.number is None else self.link(page=1)}
        if self.number is None:
            if next_cursor:
                links["next"] = self.link(cursor=next_cursor)
        else:
            if self.number > 1:
                links["prev"] = self.link(page=self.number - 1)
            if next_cursor:
                links["next"] = self.link(page=self.number + 1)
            if pages is not None:
                links["last"] = self.link(page=max(1, pages))
        return ", ".join(f'<{url}>; rel="{name}"' for name, url in links.items())

    def _signer(self, key):
        # The list and filters are the salt: another list's cursor fails the signature check.
        bound = cache.key_of(self.name + self.path, self.kept)
        return URLSafeSerializer(key, salt=bound, signer_kwargs={
            "digest_method": hashlib.sha256, "key_derivation": "hmac"})

    def _read_cursor(self, cursor):
        if not cursor:
            return None, None
        for signer in map(self._signer, jwt.keys()):
            try:
                after, after_id = signer.loads(cursor)
                if signer.dumps([after, after_id]) == cursor:  # base64 has several spellings
                    return after, int(after_id)
            except (BadData, ValueError, TypeError):
                pass
        raise invalid("cursor", "Not a cursor of this list, filter and order.", "query")
