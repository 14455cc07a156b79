"""Migrations: plain SQL files, applied once each, in the order of their numbers.

A file ``sql/migrations/0001_shop.sql`` holds the way up, then ``-- down`` and the way back. Each
runs in a transaction of its own, unless its first line is ``-- no-transaction`` (for CREATE INDEX
CONCURRENTLY), when its statements run one by one, under the server's own settings. An advisory lock
lets any number of processes try at once, through a pooler as well. What was applied is remembered
with a checksum, so that an edited file shows.
"""
import contextlib
import hashlib
import re
import time
from dataclasses import dataclass

import psycopg

from db.pool import Sessionless
from db.queries import FOLDER

LOCK = 0x53484F50  # "SHOP"
MIGRATIONS = FOLDER / "migrations"


class MigrationError(Exception):
    """The schema and the files don't fit; the message says how."""


@dataclass(frozen=True)
class Migration:
    version: int
    name: str
    up: str
    down: str
    in_transaction: bool
    checksum: str


def files():
    """Every migration on disk, in order."""
    found = []
    for path in sorted(MIGRATIONS.glob("*.sql")):
        match = re.fullmatch(r"(\d{4})_(\w+)", path.stem)
        if not match:
            raise MigrationError(f"{path.name} is not named like 0001_what_it_does.sql.")
        text = path.read_text()
        up, _, down = text.partition("\n-- down\n")
        found.append(Migration(
            int(match[1]), match[2], up, down, not text.startswith("-- no-transaction"),
            hashlib.sha256(text.encode()).hexdigest(),
        ))
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise MigrationError("The numbers of the migration files have a gap or a double.")
    return found


def connect(url):
    """A connection of its own: a migration must not be ended by a request's time-outs."""
    return Sessionless.connect(
        url, autocommit=True, connect_timeout=10, application_name="shopfront",
        settings={"timezone": "UTC", "datestyle": "ISO", "client_min_messages": "warning",
                  "lock_timeout": "60s", "statement_timeout": 0,
                  "idle_in_transaction_session_timeout": 0},
    )


def applied(conn):
    """{version: (name, checksum)} of what the database has seen."""
    conn.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations (version int PRIMARY KEY, name text NOT NULL,"
        " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
    )
    rows = conn.execute("SELECT version, name, checksum FROM schema_migrations ORDER BY version")
    return {version: (name, checksum) for version, name, checksum in rows}


def check(known, seen):
    """Raise unless what was applied is a beginning of what is on disk, unedited."""
    by_version = {m.version: m for m in known}
    for version, (name, checksum) in seen.items():
        migration = by_version.get(version)
        if migration is None and version > len(known):
            raise MigrationError(
                f"The database is at migration {max(seen):04d}, the code knows {len(known):04d}: "
                "the schema is newer than this code. Deploy the newer code, or restore a backup."
            )
        if migration is None or migration.name != name:
            raise MigrationError(f"Migration {version:04d}_{name}.sql was applied but is missing.")
        if migration.checksum != checksum:
            raise MigrationError(
                f"Migration {version:04d}_{name}.sql was edited after it was applied. "
                "Put the change into a new file."
            )


def upgrade(url, report=lambda text: None):
    """Apply what is new. Returns how many. Safe to call from any number of processes at once."""
    known = files()
    with _alone(url), connect(url) as conn:
        seen = applied(conn)
        check(known, seen)
        new = [m for m in known if m.version not in seen]
        for migration in new:
            report(f"applying {migration.version:04d}_{migration.name}")
            _run(conn, migration, migration.up, (
                "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                (migration.version, migration.name, migration.checksum),
            ))
        return len(new)


def downgrade(url, steps=1, report=lambda text: None):
    """Take the last ``steps`` migrations back. Returns how many were."""
    known = files()
    with _alone(url), connect(url) as conn:
        seen = applied(conn)
        check(known, seen)
        undone = [m for m in reversed(known) if m.version in seen][:steps]
        for migration in undone:
            if not migration.down.strip():
                raise MigrationError(f"{migration.version:04d}_{migration.name} has no way back.")
            report(f"undoing {migration.version:04d}_{migration.name}")
            _run(conn, migration, migration.down, (
                "DELETE FROM schema_migrations WHERE version = %s", (migration.version,),
            ))
        return len(undone)


@contextlib.contextmanager
def _alone(url):
    """Be the only process that migrates.

    The lock belongs to a transaction on a connection of its own, since a pooler may change what
    is behind a session. CREATE INDEX CONCURRENTLY waits for every snapshot, so that transaction
    must keep none: who comes second asks again and again instead of waiting inside a statement,
    and asks by a ClientCursor, since a statement with parameters keeps its snapshot until the next.
    """
    with connect(url) as conn:
        asking = psycopg.ClientCursor(conn)
        while True:
            with conn.transaction():
                asking.execute("SELECT pg_try_advisory_xact_lock(%s)", [LOCK])
                if asking.fetchone()[0]:
                    yield
                    return
            time.sleep(0.05)


def _run(conn, migration, sql, remember):
    statements = [sql] if migration.in_transaction else [
        part for part in re.split(r";[ \t]*\n", sql)
        if re.sub(r"^--.*$", "", part, flags=re.M).strip()
    ]
    try:
        with conn.transaction() if migration.in_transaction else contextlib.nullcontext():
            for statement in statements:
                psycopg.Cursor(conn).execute(statement)
            conn.execute(*remember)
    except psycopg.Error as error:
        raise MigrationError(
            f"Migration {migration.version:04d}_{migration.name}.sql failed: {error}"
        ) from error


def reset(url):
    """Drop what is there, then build the schema anew."""
    with connect(url) as conn:
        conn.execute("DROP SCHEMA public CASCADE")
        conn.execute("CREATE SCHEMA public")
    upgrade(url)
