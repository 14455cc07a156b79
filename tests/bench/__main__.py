"""Figures, measured through HTTP against a real server on this machine. Not tests: nothing fails.

    python -m tests.bench catalogue [--products 1000000]   pages, searches, counts, misses
    python -m tests.bench sales [--sales 2500000]          reports, sums, sales a second, memory
    python -m tests.bench storage [--copies 9]             the same shop, with ten years of sales
    python -m tests.bench accounts                         a login's parts, what a token check costs
    python -m tests.bench growth [--quick] [--out docs]    by products, connections, workers: charts
    python -m tests.bench faults [--hold 10]               what each fault costs, as a table
    python -m tests.bench dashboard [--seconds 120]        a picture of deploy/grafana.json

Everything runs in a folder of its own under the temporary directory, with servers of its own, and
goes with it; --keep FOLDER keeps the database for the next run.
"""
import argparse
import http.client
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import timedelta

import psycopg

from db.seed import PASSWORD
from extensions import passwords
from tests.bench.dashboard import dashboard
from tests.bench.growth import growth
from tests.bench.shop import ENV, login, shop, show, timed
from tests.conftest import ROOT, Server
from tests.faults import FAULTS, Rig, strike


def catalogue(args):
    sizes = {"users": 100, "products": args.products, "transactions": 1000}
    with shop(args.keep, sizes) as (start, url):
        server = start(CACHE_TYPE="NullCache")

        def get(path):
            return server.call("GET", path)
        show("page 1 by cursor", f"{timed(lambda: get('products?count=none'))[0]:.1f} ms")
        far = far_cursor(server, args.products)
        show("page 50,000 by cursor", f"{timed(lambda: get(f'products?cursor={far}'))[0]:.1f} ms")
        for term in ("e", "qz", "ool", "every+day", "zzzz", "COF-00A"):
            for sort in ("created_at", "price", "relevance"):
                path = f"products?count=none&sort={sort}&search={term}"
                show(f"search '{term}' by {sort}", f"{timed(lambda p=path: get(p), 5)[0]:.1f} ms")
        show("exact count of everything, cold",
             f"{timed(lambda: get('products?limit=1'), 5)[0]:.1f} ms")
        show("exact count of 'every day', cold",
             f"{timed(lambda: get('products?limit=1&search=every+day'), 3)[0]:.1f} ms")
        server = start()
        get("products?limit=1&search=every+day")
        show("exact count of 'every day', warm, another page",
             f"{timed(lambda: get('products?limit=2&search=every+day'), 1)[0]:.1f} ms")
        parallel_misses(server, url)


def far_cursor(server, products):
    """The cursor of page 50,000, by walking from a page found by number."""
    page = min(50_000, products // 20 - 1) - 1
    answer = server.call("GET", f"products?count=none&page={page}").json()
    return answer["pagination"]["next_cursor"]


def parallel_misses(server, url):
    """Database calls for 50 parallel misses of one key."""
    def scans():
        with psycopg.connect(url) as conn:
            return conn.execute(
                "SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE indexrelname = "
                "'products_created_idx'").fetchone()[0]
    time.sleep(1.5)
    before = scans()
    path = f"products?count=none&min_price=0.{os.getpid() % 90 + 10}&limit=33"
    threads = [threading.Thread(target=server.call, args=("GET", path)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(1.5)
    show("index scans of the list's query for 50 parallel misses", scans() - before)


def sales(args):
    sizes = {"users": 1000, "products": 10_000, "transactions": args.sales}
    with shop(args.keep, sizes) as (start, url):
        server = start()
        token = login(server, "admin@example.com")
        year = "start_date=2000-01-01&end_date=2100-01-01"
        for group in ("day", "week", "month", "category", "product"):
            ms, _ = timed(lambda g=group: server.call(
                "GET", f"reports/sales?{year}&group_by={g}", token=token), 5)
            show(f"sums of everything by {group}", f"{ms:.0f} ms")
        for kind in ("csv", "ndjson", "json"):
            download(server, token, f"reports/transactions?{year}&format={kind}", kind)
        plain_copy(url)
        for name, products in (("one hot product", [1]), ("many products", range(1, 10_000))):
            show(f"sales a second, {name}, 16 buyers", f"{buy(server, url, products):.0f}")


def download(server, token, path, kind):
    request = urllib.request.Request(f"{server.base}/api/v1/{path}",
                                     headers={"Authorization": f"Bearer {token}"})
    before, start, size, peak = memory(server), time.perf_counter(), 0, 0
    with urllib.request.urlopen(request) as response:
        first = None
        while chunk := response.read(1 << 20):
            first = first or time.perf_counter() - start
            size += len(chunk)
            if size % (64 << 20) < (1 << 20):
                peak = max(peak, memory(server))
        rows = response.headers["Report-Rows"]
    seconds = time.perf_counter() - start
    show(f"{kind}: {int(rows):,} lines, {size / 1e6:.0f} MB",
         f"{size / 1e6 / seconds:.0f} MB/s, first MB after {first * 1000:.0f} ms, "
         f"memory +{max(0, peak - before):.0f} MB")


def memory(server):
    """Megabytes of the workers."""
    return sum(int(re.search(r"Rss:\s+(\d+)", pathlib.Path(
        f"/proc/{pid}/smaps_rollup").read_text())[1]) for pid in server.worker_pids) / 1024


def plain_copy(url):
    """psql's own COPY of the same lines, as the measure."""
    start = time.perf_counter()
    done = subprocess.run(
        ["psql", url, "-c", "COPY (SELECT transaction_id, created_at, refunded, user_id, "
         "product_id, product_name, quantity, unit_price, amount FROM transaction_items "
         "ORDER BY created_at, transaction_id, line) TO STDOUT (FORMAT csv)"],
        stdout=subprocess.PIPE,
    )
    seconds = time.perf_counter() - start
    show(f"psql COPY csv: {len(done.stdout) / 1e6:.0f} MB",
         f"{len(done.stdout) / 1e6 / seconds:.0f} MB/s")


def buy(server, url, products, seconds=6):
    products = list(products)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("UPDATE products SET stock = 2000000000 WHERE id = ANY(%s)", [products])
    tokens = [login(server, f"user{i}@example.com") for i in range(1, 17)]
    counts, end = [0] * 16, time.monotonic() + seconds

    def run(n):
        number, connection = n, http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Authorization": f"Bearer {tokens[n]}", "Content-Type": "application/json"}
        while time.monotonic() < end:
            number = (number * 7919 + 13) % len(products)
            body = {"items": [{"product_id": products[number], "quantity": 1}]}
            connection.request("POST", "/api/v1/transactions", json.dumps(body), headers)
            answer = connection.getresponse()
            answer.read()
            counts[n] += answer.status == 201
    threads = [threading.Thread(target=run, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / seconds


def storage(args):
    """What a shop does with a year of sales, and with that year copied into the years before it."""
    with shop(args.keep, {"users": 1000, "products": 10_000, "transactions": args.sales}) as (
            start, url):
        server = start()
        probe(server, url)
        began = time.monotonic()
        for year in range(1, args.copies + 1):
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute("SET session_replication_role = replica")  # sealed days take no sale
                shift = {"ids": year * 100_000_000, "years": f"{year} years"}
                conn.execute("""
                    INSERT INTO transactions (id, user_id, total, created_at)
                    SELECT id + %(ids)s, user_id, total, created_at - %(years)s::interval
                    FROM transactions
                    WHERE id < 100000000
                """, shift)
                conn.execute("""
                    INSERT INTO transaction_items
                    SELECT transaction_id + %(ids)s, line, quantity, product_id, user_id,
                           category_id, created_at - %(years)s::interval, unit_price, amount,
                           refunded, first_in_category, product_name, category_name
                    FROM transaction_items
                    WHERE transaction_id < 100000000
                """, shift)
            print(f"\rcopied {year} years in {time.monotonic() - began:.0f} s", end="", flush=True)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE transactions, transaction_items")
            conn.execute("TRUNCATE sales_days, sales_product_months")
            conn.execute("UPDATE sales_sealed SET until = '1970-01-01'")
            began = time.monotonic()
            conn.execute("SELECT seal_sales()")
        show("\nsealing all of it at once", f"{time.monotonic() - began:.0f} s")
        probe(server, url)


def probe(server, url):
    with psycopg.connect(url) as conn:
        for table in ("transactions", "transaction_items"):
            size, rows, first, last = conn.execute(
                f"SELECT pg_total_relation_size('{table}'), count(*), min(created_at), "
                f"max(created_at) FROM {table}").fetchone()
            show(f"{table}: {rows:,}", f"{size / rows:.0f} MB a million, with indexes")
    token = login(server, "admin@example.com")
    everything = f"start_date={first.date()}&end_date={last.date()}"
    for name, path in (
        ("page 1 of all sales", "transactions?count=none"),
        ("page 1 of one user's", "transactions?count=none&user_id=7"),
        ("sums of everything by month", f"reports/sales?{everything}&group_by=month"),
        ("sums of everything by product", f"reports/sales?{everything}&group_by=product"),
        ("sums from noon to noon, a week",
         f"reports/sales?start_date={first.date()}T12:00:00&end_date="
         f"{(first + timedelta(days=7)).date()}T12:00:00&group_by=day"),
    ):
        ms, _ = timed(lambda p=path: server.call("GET", p, token=token, timeout=120), 5)
        show(name, f"{ms:.0f} ms")
    for name, day in (("oldest", first), ("newest", last - timedelta(days=31))):
        window = f"start_date={day.date()}&end_date={(day + timedelta(days=30)).date()}"
        download(server, token, f"reports/transactions?{window}&format=csv", f"{name} 30 days")
    show("sales a second, many products, 16 buyers", f"{buy(server, url, range(1, 10_000)):.0f}")


def accounts(args):
    with shop(args.keep, {"users": 20, "products": 100, "transactions": 10}) as (start, _):
        server = start()
        token = login(server, "admin@example.com")
        stored = passwords.hashed(PASSWORD)
        hash_ms, _ = timed(lambda: passwords.matches(PASSWORD, stored))
        login_ms, _ = timed(lambda: login(server, "user1@example.com"))
        show("a login", f"{login_ms:.1f} ms, of which the hash {hash_ms:.1f} ms")
        fails = {}
        for number, email in enumerate(("user2@example.com", "nobody@example.com")):
            found = []
            for i in range(40):
                start = time.perf_counter()
                server.call("POST", "auth/login",
                            json={"email": email if i % 4 == 0 else f"u{i}{number}@example.com",
                                  "password": "wrong password"})
                if i % 4 == 0 and i < 16:
                    found.append((time.perf_counter() - start) * 1000)
            fails[email] = statistics.median(found)
        show("a failed login: known address, unknown address",
             ", ".join(f"{ms:.1f} ms" for ms in fails.values()))
        for name, who in (("without a token (404)", None), ("with a token (404)", token)):
            show(f"CPU a request {name}", f"{cpu(server, who):.0f} us")


def cpu(server, token, requests=1500):
    """Microseconds of the workers' CPU for a request; signed in or not, to nothing that exists."""
    path = "/api/v1/transactions/1" if token else "/api/v1/nothing"
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def used():
        return sum(sum(map(int, pathlib.Path(f"/proc/{pid}/stat").read_text()
                           .rpartition(")")[2].split()[11:13])) for pid in server.worker_pids)
    before = used()
    for _ in range(requests):
        connection.request("GET", path, headers=headers)
        connection.getresponse().read()
    return (used() - before) / os.sysconf("SC_CLK_TCK") / requests * 1e6


def faults(args):
    """The table of docs/operations.md, measured: each fault for --hold seconds, under load."""
    own = pathlib.Path(tempfile.mkdtemp(prefix="shopfront-bench-"))
    own.chmod(0o755)
    rig = Rig(own / "f", lambda **env: Server(ENV | env).wait())
    print("| fault | slowest answer | its outcome | well again after | refused or broken |\n"
          "| --- | --- | --- | --- | --- |")
    try:
        for fault in FAULTS:
            if not fault.possible(rig):
                continue
            result = strike(rig, fault, args.hold)
            slowest, bad = result.slowest, {}
            for (_, outcome), count in result.outcomes.items():
                bad[outcome] = bad.get(outcome, 0) + count
            good = bad.pop("ok", 0)
            failed = ", ".join(f"{count} {name}" for name, count in bad.items()) or "none"
            print(f"| {fault.name} | {slowest.seconds:.1f} s, {slowest.kind} | {slowest.outcome} | "
                  f"{result.healed:.1f} s | {failed} of {good + sum(bad.values())} |", flush=True)
    finally:
        rig.close()
        shutil.rmtree(own, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[
        "catalogue", "sales", "storage", "accounts", "growth", "faults", "dashboard"])
    parser.add_argument("--products", type=int, default=1_000_000)
    parser.add_argument("--sales", type=int, default=2_500_000)
    parser.add_argument("--copies", type=int, default=9)
    parser.add_argument("--hold", type=float, default=10, help="seconds that a fault lasts")
    parser.add_argument("--seconds", type=float, default=120, help="dashboard: how long to watch")
    parser.add_argument("--keep", help="a folder to keep the database in")
    parser.add_argument("--quick", action="store_true", help="growth: small, to see that it works")
    parser.add_argument("--out", default=ROOT / "docs", help="a folder for pictures and figures")
    args = parser.parse_args()
    {"catalogue": catalogue, "sales": sales, "storage": storage, "accounts": accounts,
     "growth": growth, "faults": faults, "dashboard": dashboard}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
