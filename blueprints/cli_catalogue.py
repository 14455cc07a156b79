"""``flask products`` and ``flask reports``: files in and out, without the API."""
import csv
import functools
import os
import sys
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import click
from flask import Flask, json
from flask.cli import AppGroup
from marshmallow import ValidationError

import db
from blueprints.cli_db import url
from blueprints.v1.reports import stream, sums
from db import migrations
from db.pool import completion_callbacks
from extensions import cache
from schemas.moments import Moment

files = db.load("products_import", patient=True)
products = AppGroup("products", help="The catalogue as files.",
                    epilog="Example: flask products export > products.csv")
reports = AppGroup("reports", help="Reports without the API.",
                   epilog="Example: flask reports sales --from 2026-01-01 --to 2027-01-01")

COLUMNS = ["sku", "name", "description", "price", "stock", "category"]
NEEDED = {"sku", "name", "price"}
SHOWN = 1000


def init_app(app: Flask) -> None:
    app.cli.add_command(products)
    app.cli.add_command(reports)


@products.command("import", epilog="Example: flask products import products.csv --dry-run")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Check everything, change nothing.")
def import_(file: str, dry_run: bool) -> None:
    """Create or change products from a CSV file, by SKU: all of them or none.

    The file has a header line with sku, name and price, and may have description, stock and
    category (by name). Every row that is wrong is reported with its line.
    """
    with completion_callbacks() as callbacks, migrations.connect(url()) as conn, \
            conn.transaction(force_rollback=dry_run):
        conn.on_complete = callbacks
        files.stage(conn)
        columns = copy_in(conn, file)
        files.analyze(conn)
        mistakes = files.mistakes(conn)
        for mistake in mistakes[:SHOWN]:
            click.echo(f"line {mistake['line']}: {mistake['reason']}", err=True)
        if mistakes:
            raise click.ClickException(f"{len(mistakes):,} mistakes. Nothing was changed.")
        files.lock(conn)
        done = files.merge(conn, **{
            f"has_{name}": name in columns for name in ("description", "stock", "category")
        })
        lists = [f"{group}:{row['id']}" for row in files.categories(conn)
                 for group in ("products", "catalogue", "category")]
        if not dry_run:
            # Every list, every count, and what every single product depends on.
            cache.change(conn, "products", "catalogue", "categories", "category_names", *lists)
    click.echo(f"{done['created']:,} created, {done['updated']:,} changed"
               f"{', had this not been a dry run' if dry_run else ''}.")


@products.command("export", epilog="Example: flask products export > products.csv")
def export() -> None:
    """Write the products that have a SKU as CSV to standard output, in the form that import reads.
    """
    with db.reports().snapshot() as conn:
        with files.export(conn) as copy:
            for block in copy:
                sys.stdout.buffer.write(block)
        nameless = files.nameless(conn)
    sys.stdout.buffer.flush()
    if nameless:
        click.echo(f"{nameless:,} without a SKU left out.", err=True)


def copy_in(conn: db.Connection, file: str) -> list[str]:
    """COPY a CSV file into the staging table. Returns its columns."""
    size = os.path.getsize(file)
    with open(file, newline="", encoding="utf-8-sig") as text, \
            click.progressbar(length=size, label="reading", hidden=not sys.stderr.isatty(),
                              file=sys.stderr) as bar:
        rows = csv.reader(text, strict=True)
        raw: Any = text.buffer  # a file's, which can tell where it is
        try:
            columns = [name.strip().lower() for name in next(rows, [])]
            check_columns(columns)
            with conn.cursor().copy(
                "COPY staged_products (line, sku, name, description, price, stock, category, wrong)"
                " FROM STDIN"
            ) as copy:
                line = rows.line_num + 1
                for number, row in enumerate(rows):
                    if row:
                        copy.write_row([line, *cells(columns, row)])
                    line = rows.line_num + 1
                    if number % 1000 == 0:
                        bar.update(raw.tell() - bar.pos)
        except (csv.Error, UnicodeDecodeError) as error:
            raise click.ClickException(f"line {rows.line_num}: {error}") from None
        bar.update(size - bar.pos)
    return columns


def check_columns(columns: list[str]) -> None:
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise click.ClickException(f"Unknown columns: {', '.join(unknown)}.")
    if missing := NEEDED - set(columns):
        raise click.ClickException(f"Missing columns: {', '.join(sorted(missing))}.")
    if len(set(columns)) < len(columns):
        raise click.ClickException("A column stands in the header twice.")


def cells(columns: list[str], row: list[str]) -> list[str | None]:
    """A row's cells in the order of COLUMNS, without white space around, and what is wrong."""
    wrong = None
    if len(row) != len(columns):
        wrong = f"{len(row)} cells, where the header has {len(columns)}"
    elif any("\0" in cell for cell in row):
        wrong = "U+0000 is not allowed in text"
    if wrong:
        return [None] * len(COLUMNS) + [wrong]
    found = {name: cell.strip() for name, cell in zip(columns, row, strict=True)}
    return [found.get(name) for name in COLUMNS] + [None]


class When(click.ParamType):
    """A date, or a time."""

    name = "date"

    def convert(self, value: str, param: click.Parameter | None,
                ctx: click.Context | None) -> datetime:
        try:
            return Moment().deserialize(value)
        except ValidationError as error:
            self.fail(error.messages[0])


def window(command: Callable) -> Callable:
    """``--from`` and ``--to``, which has to come later."""
    @functools.wraps(command)
    def checked(start_date, end_date, **kwargs):
        if end_date <= start_date:
            raise click.UsageError("--to must be after --from.")
        return command(start_date=start_date, end_date=end_date, **kwargs)

    to = click.option("--to", "end_date", type=When(), required=True, help="Up to, without.")
    from_ = click.option("--from", "start_date", type=When(), required=True, help="From then on.")
    return from_(to(checked))


@reports.command(epilog="Example: flask reports transactions --from 2026-01-01 --to 2027-01-01")
@window
@click.option("--format", "kind", type=click.Choice(["csv", "json", "ndjson"]), default="csv",
              show_default=True)
def transactions(kind: str, **dates: datetime) -> None:
    """Write every item sold to standard output."""
    with db.reports().snapshot() as conn:
        for block in stream(conn, kind, dates):
            sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


@reports.command(epilog="Example: flask reports sales --from 2026-01-01 --to 2027-01-01")
@window
@click.option("--group-by", type=click.Choice(["day", "week", "month", "category", "product"]),
              default="month", show_default=True)
@click.option("--plot", type=click.Path(dir_okay=False, writable=True),
              help="Also draw it, as PNG or SVG. Needs matplotlib.")
def sales(group_by: str, plot: str | None, **dates: datetime) -> None:
    """Print sums as a table."""
    with db.reports().reading() as conn:
        report = json.loads(sums(conn, group_by, **dates))
    groups, total = report["data"], report["total"]
    rows = [(g["label"] or "none", g["orders"], g["items"], g["amount"]) for g in groups]
    rows.append(("total", total["orders"], total["items"], total["amount"]))
    wide = max(len(row[0]) for row in rows)
    click.echo(f"{group_by:{wide}}  {'orders':>10}  {'items':>10}  {'amount':>16}")
    for label, orders, items, amount in rows:
        click.echo(f"{label:{wide}}  {orders:>10,}  {items:>10,}  {Decimal(amount):>16,}")
    if plot:
        try:
            draw(groups, group_by, plot)
        except (OSError, ValueError) as error:  # no such folder, no such format
            raise click.ClickException(str(error)) from None
        click.echo(f"Drawn: {plot}")


def draw(groups: list[dict], group_by: str, path: str) -> None:
    """A chart of amounts: a line over time, bars for the 30 largest groups otherwise."""
    try:
        import matplotlib
    except ImportError:
        raise click.ClickException("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    matplotlib.rcParams["text.parse_math"] = False  # a name may have dollars in it
    by_time = group_by in ("day", "week", "month")
    shown = groups if by_time else groups[:30][::-1]
    labels = [group["label"] or "none" for group in shown]
    amounts = [float(group["amount"]) for group in shown]
    figure, axes = pyplot.subplots(figsize=(11, 6 if by_time else 2 + 0.28 * len(shown)))
    if by_time:
        axes.plot(labels, amounts, marker="o" if len(shown) < 60 else None, color="#17324d")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("Amount sold")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(12, integer=True))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        figure.autofmt_xdate()
    else:
        # By position: two products may have one name.
        axes.barh(range(len(shown)), amounts, color="#17324d",
                  tick_label=[f"{x[:39]}…" if len(x) > 40 else x for x in labels])
        axes.margins(y=0.01)
        axes.set_xlabel("Amount sold")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"Sales by {group_by}")
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis="both" if by_time else "x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
