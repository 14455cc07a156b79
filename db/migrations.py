"""Migrations: plain SQL files, applied once each, in the order of their numbers.

A file ``sql/migrations/0001_shop.sql`` holds the upgrade, then ``-- down`` and the downgrade. Each
runs in its own transaction. It waits only briefly for a lock, since other sessions queue behind
it; then it is rolled back and retried. An advisory lock lets any number of processes migrate at
once, even through a pooler. Applied migrations are recorded with a checksum, which reveals a
later edit.

If the first line of a file is ``-- no-transaction``, its statements run one by one, with the
server's own settings. This is for CREATE INDEX CONCURRENTLY, and may be interrupted at any point:
the next upgrade drops a half-built index and runs the whole file again.
"""
import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import psycopg
from psycopg import sql

from db.pool import Connection, Sessionless
from db.queries import FOLDER

LOCK = 0x53484F50  # "SHOP"
LOCK_SECONDS = 2  # an attempt's lock timeout; requests queue meanwhile, and wait up to 5 s
ATTEMPTS, PAUSE_SECONDS = 60, 3
MIGRATIONS = FOLDER / "migrations"


_INDEX = re.compile(r"CONCURRENTLY IF NOT EXISTS (\w+)")


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


def files() -> list[Migration]:
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
        for index in re.findall(r"^CREATE (?:UNIQUE )?INDEX (.*)", text, re.M):
            if not found[-1].in_transaction and not _INDEX.match(index):
                raise MigrationError(f"{path.name} begins anew when it was broken off: "
                                     "say CREATE INDEX CONCURRENTLY IF NOT EXISTS.")
    if [m.version for m in found] != list(range(1, len(found) + 1)):
        raise MigrationError("The numbers of the migration files have a gap or a double.")
    return found


def connect(url: str, lock_seconds: int = 60) -> Sessionless:
    """A connection of its own: a migration must not be ended by a request's time-outs."""
    return Sessionless.connect(
        url, autocommit=True, connect_timeout=10, application_name="shopfront",
        settings={"timezone": "UTC", "datestyle": "ISO", "client_min_messages": "warning",
                  "lock_timeout": f"{lock_seconds}s", "statement_timeout": 0,
                  "idle_in_transaction_session_timeout": 0},
    )


def applied(conn: Connection) -> dict[int, tuple[str, str]]:
    """{version: (name, checksum)} of what the database has seen."""
    if not _has_history(conn):
        return {}
    rows = conn.execute("SELECT version, name, checksum FROM schema_migrations ORDER BY version")
    return {version: (name, checksum) for version, name, checksum in rows}


def _has_history(conn):
    return conn.execute("SELECT to_regclass('schema_migrations')").fetchone() != (None,)


def check(known: list[Migration], seen: dict[int, tuple[str, str]]) -> None:
    """Raise unless every applied migration is still on disk, unedited."""
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


def pending(conn: Connection) -> list[Migration]:
    """The migrations that are to be applied. Raises MigrationError where the files don't fit."""
    known, seen = files(), applied(conn)
    check(known, seen)
    return [m for m in known if m.version not in seen]


def upgrade(url: str, report: Callable[[str], None] = lambda text: None) -> int:
    """Apply what is new. Returns how many. Safe to call from any number of processes at once."""
    with _migration_lock(url), connect(url, LOCK_SECONDS) as conn:
        if not _has_history(conn):
            conn.execute("CREATE TABLE schema_migrations (version int PRIMARY KEY,"
                         " name text NOT NULL, checksum text NOT NULL,"
                         " applied_at timestamptz NOT NULL DEFAULT now())")
        todo = pending(conn)
        for migration in todo:
            report(f"applying {migration.version:04d}_{migration.name}")
            _run(conn, migration, migration.up, (
                "INSERT INTO schema_migrations (version, name, checksum) VALUES (%s, %s, %s)",
                (migration.version, migration.name, migration.checksum),
            ), report)
        return len(todo)


def downgrade(url: str, steps: int = 1, report: Callable[[str], None] = lambda text: None) -> int:
    """Take the last ``steps`` migrations back. Returns how many were."""
    known = files()
    with _migration_lock(url), connect(url, LOCK_SECONDS) as conn:
        seen = applied(conn)
        check(known, seen)
        undone = [m for m in reversed(known) if m.version in seen][:steps]
        for migration in undone:
            if not migration.down.strip():
                raise MigrationError(f"{migration.version:04d}_{migration.name} has no way back.")
            report(f"undoing {migration.version:04d}_{migration.name}")
            _run(conn, migration, migration.down, (
                "DELETE FROM schema_migrations WHERE version = %s", (migration.version,),
            ), report)
        return len(undone)


@contextlib.contextmanager
def _migration_lock(url):
    """Hold the migration lock: only one process migrates at a time.

    The lock belongs to a transaction, on a separate connection, because a pooler may change the
    server session between transactions. CREATE INDEX CONCURRENTLY waits for every snapshot, so
    that transaction must hold none. A second process therefore polls instead of waiting inside a
    statement, with a ClientCursor, because a statement with parameters keeps its snapshot.
    """
    with connect(url) as conn:
        asking = psycopg.ClientCursor(conn)
        while True:
            with conn.transaction():
                asking.execute("SELECT pg_try_advisory_xact_lock(%s)", [LOCK])
                if asking.fetchone() == (True,):
                    yield
                    return
            time.sleep(0.05)


def _run(conn, migration, text, record, report):
    apply = _in_one_piece if migration.in_transaction else _step_by_step
    try:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                apply(conn, text, record)
                return
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                if attempt == ATTEMPTS:
                    raise
                report(f"  what it changes is in use; attempt {attempt + 1} of {ATTEMPTS} follows")
                time.sleep(PAUSE_SECONDS)
    except psycopg.Error as error:
        raise MigrationError(
            f"Migration {migration.version:04d}_{migration.name}.sql failed: {error}"
        ) from error


def _in_one_piece(conn, text, record):
    with conn.transaction():
        psycopg.Cursor(conn).execute(text)
        conn.execute(*record)


def _step_by_step(conn, text, record):
    for statement in re.split(r";[ \t]*\n", text):
        if not re.sub(r"^--.*$", "", statement, flags=re.M).strip():
            continue
        if index := _INDEX.search(statement):
            half_built = conn.execute("SELECT FROM pg_index WHERE indexrelid = to_regclass(%s) "
                                      "AND NOT indisvalid", [index[1]]).fetchone() is not None
            if half_built:
                drop = sql.SQL("DROP INDEX CONCURRENTLY {}").format(sql.Identifier(index[1]))
                psycopg.Cursor(conn).execute(drop)
        psycopg.Cursor(conn).execute(statement)
    conn.execute(*record)


def grant(url: str, role: str) -> None:
    """Let a role read and write rows, in future tables as well, and nothing else.

    It is the role that the API runs as; ``url`` connects as the schema's owner. Raises
    MigrationError if the role doesn't exist.
    """
    with connect(url) as conn, conn.transaction():
        if not conn.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).rowcount:
            raise MigrationError(f"There is no role {role}. CREATE ROLE makes one.")
        for statement in GRANTS.split(";"):
            psycopg.Cursor(conn).execute(sql.SQL(statement).format(
                role=sql.Identifier(role), database=sql.Identifier(conn.info.dbname)))


GRANTS = """
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT CONNECT, TEMPORARY ON DATABASE {database} TO {role};
GRANT USAGE ON SCHEMA public TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role};
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role};
REVOKE INSERT, UPDATE, DELETE ON schema_migrations FROM {role};
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role};
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT USAGE ON SEQUENCES TO {role}
"""


def reset(url: str) -> None:
    """Drop what is there, then build the schema anew."""
    with connect(url) as conn:
        conn.execute("DROP SCHEMA public CASCADE")
        conn.execute("CREATE SCHEMA public")
    upgrade(url)
