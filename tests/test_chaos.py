"""Workers and database connections die under load, and the books balance all the same."""
import http.client
import json
import os
import random
import signal
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Client, execute, register, unique

SEED, BUYERS, PRODUCTS, STOCK = 20261122, 6, 12, 100_000
PATIENCE = 30  # seconds for which a client tries one purchase


class Chaos(threading.Thread):
    """Kills a random worker or a random connection of the shop's every now and then."""

    def __init__(self, server, url):
        super().__init__()
        self.server, self.url, self.dice = server, url, random.Random(SEED)
        self.over, self.workers, self.connections = threading.Event(), 0, 0

    def run(self):
        while not self.over.wait(self.dice.uniform(0.05, 0.25)):
            if self.dice.random() < 0.3:
                self.kill_a_worker()
            else:
                self.end_a_connection()

    def kill_a_worker(self):
        try:
            pids = self.server.worker_pids
        except OSError:  # one ended while they were counted
            return
        if pids:
            os.kill(self.dice.choice(pids), signal.SIGKILL)
            self.workers += 1

    def end_a_connection(self):
        ended = execute(self.url, """
            SELECT pg_terminate_backend(pid)
            FROM (SELECT pid FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name = 'shopfront'
                  ORDER BY state = 'idle', random() LIMIT 2) victims""")
        self.connections += len(ended)


def buy(server, token, key, body):
    """Send a keyed purchase until there is an answer to it: the sale."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            answer = server.call("POST", "transactions", token=token, json=body,
                                 headers={"Idempotency-Key": key}, timeout=10)
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            continue  # the worker is gone, and with it what it would have said
        if answer.status == 201:
            return answer.json()
        code = answer.json()["code"]
        assert (answer.status, code) in {(503, "unavailable"), (409, "request_in_progress")}, code
        time.sleep(0.05)
    raise AssertionError(f"no answer within {PATIENCE} s")


def baskets(buyers, count):
    """[(buyer, key, body)] of so many purchases."""
    dice = random.Random(SEED)
    made = []
    for n in range(count):
        products = dice.sample(range(1, PRODUCTS + 1), dice.randint(1, 4))
        items = [{"product_id": i, "quantity": dice.randint(1, 9)} for i in products]
        made.append((buyers[n % BUYERS], unique("key"), {"items": items}))
    return made


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_whatever_dies_each_key_has_one_sale_and_the_stock_adds_up(make_database, make_app, serve,
                                                                   count):
    url = make_database()
    # What was killed leaves marks, which keep lists out of the cache for a while.
    server = serve(DATABASE_URL=url, LOG_LEVEL="ERROR", REDIS_PREFIX="chaos")
    shop = Client(make_app(DATABASE_URL=url, REDIS_PREFIX="chaos"))
    purchases = baskets([register(shop) for _ in range(BUYERS)], count)
    execute(url, "INSERT INTO products (name, price, stock) SELECT 'Product ' || n, "
                 f"n * 1.01, {STOCK} FROM generate_series(1, {PRODUCTS}) n")
    chaos = Chaos(server, url)
    chaos.start()
    try:
        with ThreadPoolExecutor(BUYERS) as pool:
            sales = list(pool.map(lambda p: buy(server, p[0].token, *p[1:]), purchases))
    finally:
        chaos.over.set()
        chaos.join()
    assert chaos.connections > 5
    assert chaos.workers > 0
    each_key_has_the_sale_that_was_answered(url, purchases, sales)
    the_books_balance(url, sales)


def each_key_has_the_sale_that_was_answered(url, purchases, sales):
    assert len({sale["id"] for sale in sales}) == len(purchases)
    stored = dict(execute(url, "SELECT key, body FROM idempotency_keys"))
    assert {key: json.loads(body) for key, body in stored.items()} == {
        key: sale for (_, key, _), sale in zip(purchases, sales, strict=True)}
    for (buyer, _, body), sale in zip(purchases, sales, strict=True):
        assert sale["user_id"] == buyer.id
        assert [{name: item[name] for name in ("product_id", "quantity")}
                for item in sale["items"]] == body["items"]


def the_books_balance(url, sales):
    """There are no other sales, no half ones, and what was sold and is left is what there was."""
    assert execute(url, "SELECT count(*) FROM transactions") == [(len(sales),)]
    assert execute(url, "SELECT count(*) FROM transaction_items") == [
        (sum(len(sale["items"]) for sale in sales),)]
    assert execute(url, """
        SELECT t.id
        FROM transactions t
        LEFT JOIN transaction_items i ON i.transaction_id = t.id
        GROUP BY t.id
        HAVING t.total IS DISTINCT FROM sum(i.amount) OR max(i.line) <> count(*)""") == []
    assert execute(url, f"""
        SELECT p.id
        FROM products p
        LEFT JOIN (SELECT product_id, sum(quantity) AS sold FROM transaction_items GROUP BY 1) i
             ON i.product_id = p.id
        WHERE p.stock + coalesce(i.sold, 0) <> {STOCK}""") == []
    assert execute(url, "SELECT count(*) FROM products") == [(PRODUCTS,)]
