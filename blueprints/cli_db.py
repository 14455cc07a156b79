"""``flask db``: the schema, and what is in it."""
import pathlib
import sys
from typing import Any

import click
import psycopg
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext

import db
from db import backup, migrations
from db.seed import DEMO, PASSWORD, NotEmpty, seed
from extensions import cache
from extensions.http.errors import Problem, problem_of
from schemas.problems import PROBLEMS


class Commands(AppGroup):
    """A command group that reports database errors and invalid input as one clear line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (migrations.MigrationError, backup.BackupError, OSError,
                psycopg.OperationalError) as error:
            raise click.ClickException(str(error)) from None
        except (Problem, psycopg.IntegrityError) as error:
            problem = problem_of(error)
            raise click.ClickException(
                "; ".join(f"{field}: {message}" for field, _, message in problem.details)
                or problem.detail or f"{PROBLEMS[problem.code][1]}.") from None
        except psycopg.errors.UndefinedTable:
            raise click.ClickException(
                "There is no schema yet. `flask db upgrade` makes it."
            ) from None


group = Commands("db", help="Set the database up.", epilog="Example: flask db upgrade")


def init_app(app: Flask) -> None:
    app.cli.add_command(group)


def url() -> str:
    """The database URL, after the pooler check; without one, starts the embedded server."""
    try:
        db.check_pooler(current_app.config)
    except db.PoolerError as error:
        raise click.ClickException(str(error)) from None
    return current_app.config["DATABASE_URL"] or db.embedded_urls(current_app)[0]


@group.command(epilog="Example: flask db upgrade --dry-run")
@click.option("--dry-run", is_flag=True, help="Show what would be run, and run nothing.")
@with_appcontext
def upgrade(dry_run: bool) -> None:
    """Apply the migrations that are new."""
    if dry_run:
        with migrations.connect(url()) as conn:
            todo = migrations.pending(conn)
        for migration in todo:
            click.echo(f"-- {migration.version:04d}_{migration.name}\n{migration.up.strip()}\n")
        click.echo(f"-- {len(todo)} to be applied." if todo else "-- Nothing to do.")
        return
    count = migrations.upgrade(url(), click.echo)
    click.echo(f"{count} applied." if count else "Nothing to do.")


@group.command(epilog="Example: flask db downgrade --steps 1")
@click.option("--steps", default=1, show_default=True, type=click.IntRange(1))
@with_appcontext
def downgrade(steps: int) -> None:
    """Take the last migrations back."""
    count = migrations.downgrade(url(), steps, click.echo)
    click.echo(f"{count} undone." if count else "Nothing to do.")


@group.command(epilog="Example: flask db status")
@with_appcontext
def status() -> None:
    """Say which migrations are applied. Exit 1 if any is missing or doesn't fit."""
    with migrations.connect(url()) as conn:
        seen = migrations.applied(conn)
    known = migrations.files()
    for migration in known:
        mark = "applied" if migration.version in seen else "new"
        click.echo(f"{migration.version:04d}_{migration.name}: {mark}")
    migrations.check(known, seen)
    sys.exit(len(seen) < len(known))


@group.command("check", epilog="Example: flask db check")
@with_appcontext
def check_command() -> None:
    """Hold what is kept against the rows it comes from. Exit 1 if anything differs.

    Reads one snapshot, beside whatever else is going on.
    """
    sys.exit(check_books() > 0)


def check_books() -> int:
    """Print what differs from the rows it is derived from. Returns the number of differences."""
    queries, wrong = db.load("check", patient=True), 0
    checks = {
        "products of a category": queries.counts, "products that were sold": queries.stock,
        "sales and their lines": queries.sales, "sums of sealed days": queries.days,
        "sums of sealed months by product": queries.months,
    }
    with migrations.connect(url()) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        conn.read_only = True
        with conn.transaction():
            for meaning, query in checks.items():
                rows = query(conn)
                wrong += len(rows)
                click.echo(f"{meaning}: {f'{len(rows)} differ' if rows else 'ok'}")
                for row in rows:
                    click.echo("  " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return wrong


@group.command(epilog="Example: flask db grant shop_api")
@click.argument("role")
@with_appcontext
def grant(role: str) -> None:
    """Let ROLE, as which the API is to run, read and write rows and nothing else.

    Call it once, as the role that owns the schema and upgrades it.
    """
    migrations.grant(url(), role)
    click.echo(f"{role} may read and write rows.")


@group.command("backup", epilog="Example: flask db backup shop.dump")
@click.argument("file", type=click.Path(dir_okay=False, path_type=pathlib.Path))
@with_appcontext
def backup_command(file: pathlib.Path) -> None:
    """Write the whole database into FILE, in pg_dump's custom format."""
    backup.backup(url(), file)
    click.echo(f"{file}: {file.stat().st_size:,} bytes.")


@group.command("restore", epilog="Example: flask db restore shop.dump")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@with_appcontext
def restore_command(file: str) -> None:
    """Fill an empty database from FILE, and check it."""
    backup.restore(url(), file)
    cache.invalidate(cache.EVERYTHING)
    click.echo("Restored. `flask db grant` lets the API's role in.")
    with migrations.connect(url()) as conn:
        todo = migrations.pending(conn)
    if todo:
        click.echo("It is of an older release: `flask db upgrade`, then `flask db check`.")
    else:
        sys.exit(check_books() > 0)


@group.command("seed", epilog="Example: flask db seed --products 5000")
@click.option("--users", default=DEMO["users"], show_default=True, type=click.IntRange(0))
@click.option("--products", default=DEMO["products"], show_default=True, type=click.IntRange(0))
@click.option("--transactions", default=DEMO["transactions"], show_default=True,
              type=click.IntRange(0))
@click.option("--force", is_flag=True, help="Also in production.")
@click.option("--yes", is_flag=True, help="Don't ask before the schema is upgraded.")
@with_appcontext
def seed_command(force: bool, yes: bool, **sizes: int) -> None:
    """Fill an empty shop with made-up data, whose passwords everybody knows."""
    if current_app.config["APP_ENV"] == "production" and not force:
        raise click.ClickException(
            f"This is production, and every password would be {PASSWORD}. Say --force to do it."
        )
    offer_upgrade(yes)
    with Progress() as progress:
        try:
            seed(url(), sizes, progress)
        except NotEmpty:
            raise click.ClickException(
                "The shop is not empty. `flask db reset` empties it."
            ) from None
    cache.invalidate(cache.EVERYTHING)


def offer_upgrade(yes: bool) -> None:
    """Apply the migrations that are new, if there are any and the operator agrees."""
    with migrations.connect(url()) as conn:
        if not migrations.pending(conn):
            return
    if not yes:
        if not sys.stdin.isatty():
            raise click.ClickException("The schema is not up to date: run `flask db upgrade`.")
        click.confirm("The schema is not up to date. Upgrade it?", default=True, abort=True)
    migrations.upgrade(url(), click.echo)


@group.command(epilog="Example: flask db reset")
@click.option("--yes", is_flag=True, help="Don't ask.")
@with_appcontext
def reset(yes: bool) -> None:
    """Drop everything and build the schema anew, empty."""
    if current_app.config["APP_ENV"] == "production":
        raise click.ClickException("Not in production.")
    if not yes:
        click.confirm("Drop every table, with all that is in it?", abort=True)
    migrations.reset(url())
    cache.invalidate(cache.EVERYTHING)
    click.echo("The shop is empty.")


class Progress:
    """Seeding progress: on a terminal one bar per table, elsewhere one line per block."""

    def __init__(self) -> None:
        self._bar: Any = None  # of click's
        self._name: str | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.__exit__(None, None, None)

    def __call__(self, name: str, done: int, size: int) -> None:
        if not sys.stdout.isatty():
            click.echo(f"{name}: {done:,} of {size:,}")
            return
        if name != self._name:
            self.__exit__()
            self._name, self._bar = name, click.progressbar(length=size, label=f"{name:12}")
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)
