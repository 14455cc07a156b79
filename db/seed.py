"""A demo shop of any size."""
from collections.abc import Callable
from datetime import UTC, datetime

import psycopg

import db
from db import migrations

PASSWORD = "password123"
# argon2id of it, as extensions/passwords.py makes it; a login makes it anew where that has changed.
HASH = ("$argon2id$v=19$m=19456,t=2,p=1$Sx7YGvWf7HCs0quN8V+qcg$CZYRm8"
        "9vNdmpSIDIh8xblZ7CEm6RWhuPgFvkaXMXQWs")
BLOCK = {"users": 20_000, "products": 20_000, "transactions": 25_000}
DEMO = {"users": 20, "products": 1_000, "transactions": 2_000}

queries = db.load("seed", patient=True)


class NotEmpty(Exception):
    """There is a shop already."""


def seed(url: str, sizes: dict[str, int],
         progress: Callable[[str, int, int], None] = lambda name, done, size: None) -> None:
    """Fill an empty shop with ``{users, products, transactions}``, all or nothing.

    Beside user1@example.com … there is admin@example.com; everybody's password is PASSWORD.
    """
    with migrations.connect(url) as conn, conn.transaction():
        # If several processes start for the first time at once, only one seeds.
        conn.execute("SELECT pg_advisory_xact_lock(%s)", [migrations.LOCK + 1])
        if not queries.empty(conn):
            raise NotEmpty
        conn.execute("SET LOCAL work_mem = '128MB'")
        conn.execute("SET LOCAL synchronous_commit = off")
        now = datetime.now(UTC)
        queries.users(conn, first=0, last=0, password_hash=HASH)
        queries.categories(conn)
        fill = {
            "users": lambda **block: queries.users(conn, password_hash=HASH, **block),
            "products": lambda **block: queries.products(
                conn, now=now, total=sizes["products"], **block),
            "transactions": lambda **block: queries.sales(
                conn, now=now, total=sizes["transactions"], **block),
        }
        for name, make in fill.items():
            size = sizes[name]
            if name == "transactions":
                conn.execute("ANALYZE users, products")
                size = size if sizes["products"] else 0
            for first in range(1, size + 1, BLOCK[name]):
                last = min(first + BLOCK[name] - 1, size)
                make(first=first, last=last)
                progress(name, last, size)
        queries.mark_sold(conn)
        queries.continue_numbers(conn)
        queries.seal(conn)
    with migrations.connect(url) as conn:
        psycopg.Cursor(conn).execute("VACUUM ANALYZE")
