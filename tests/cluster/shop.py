"""A shop of several nodes, and what is done to it from all sides at once."""
import contextlib
import http.client
import itertools
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta

from db import migrations
from db.seed import seed
from tests.cluster.parts import NODES, Nginx, Node, program
from tests.conftest import execute
from tests.faults import PRODUCTS, STOCK, Load, Shop, until

SALES = 40_000  # that were made before: their download takes a slow client seconds
YEARS = "start_date=2020-01-01&end_date=2100-01-01"
DAYS = f"start_date={date.today() - timedelta(days=20)}&end_date=2100-01-01"
SUMS = f"reports/sales?{YEARS}&group_by=month"
RATE = 4 << 20  # bytes a second that a slow client takes


class Cluster(Shop):
    """Nodes on one database and one Redis, behind nginx. ``direct`` is the books' way around."""

    def __init__(self, folder, redis_url, database_url, direct=None, sales=2_000, **env):
        super().__init__()
        program("nginx")  # before all the rest is there in vain
        self.url, self.folder = direct or database_url, folder
        self._fill(sales)
        self.nodes = [Node({"DATABASE_URL": database_url, "REDIS_URL": redis_url} | env)
                      for _ in range(NODES)]
        self.server = None
        try:
            for node in self.nodes:
                node.start()
            for node in self.nodes:
                node.wait()
            self.server = Nginx(folder / "nginx", self.nodes)
            self.let_in()
        except BaseException:
            self.close()
            raise

    def _fill(self, sales):
        """A demo shop in which what a Load looks at is as it expects."""
        migrations.upgrade(self.url)
        seed(self.url, {"users": 20, "products": 2 * PRODUCTS, "transactions": sales})
        execute(self.url, "UPDATE products SET name = 'A tea', price = 0 WHERE id = 1")
        execute(self.url, f"""
            UPDATE products p
            SET stock = {STOCK} - coalesce((SELECT sum(quantity) FROM transaction_items i
                                            WHERE i.product_id = p.id), 0)""")
        self.old = sales

    @property
    def admin(self):
        return self.people[0]["token"]

    def others(self, node):
        return [other for other in self.nodes if other is not node]

    def replace(self, node, folder=None, **env):
        """Have a node come back, which has gone by itself."""
        until(node.gone, 60)
        node.start(**({"folder": folder} if folder else {}), **env)
        node.wait()

    def close(self):
        if self.server:
            self.server.stop()
        with ThreadPoolExecutor(NODES) as pool:
            list(pool.map(Node.stop, self.nodes))


class Mixed(Load):
    """A Load in which an admin looks at sums and downloads all the while, too."""

    def work(self):
        return [*super().work(), self.report]

    def report(self, client, turn):
        if turn % 10:
            client.call("sums", "GET", SUMS, token=self.rig.admin)
            return
        answer = client.call("a download", "GET", f"reports/transactions?{DAYS}&format=csv",
                             token=self.rig.admin)
        if answer is not None and answer.status == 200:
            assert answer.body.count(b"\r\n") == int(answer.headers["Report-Rows"]) + 1

    def failed(self):
        """How many requests were not answered well, by kind and outcome."""
        return {key: count for key, count in self.counts.items() if key[1] != "ok"}

    def first_sale(self, since):
        """Seconds from a moment to the answer of the first purchase that was sent after it."""
        return min((sale.began + sale.seconds - since for sale in list(self.seen)
                    if sale.kind == "a purchase" and sale.outcome == "ok" and sale.began > since),
                   default=None)

    def first_sale_answered(self, since):
        return self.first_sale(since) is not None


class Download(threading.Thread):
    """A client on a slow line, who takes all sales from one address."""

    def __init__(self, address, token):
        super().__init__()
        self.begun, self.lines, self.rows = threading.Event(), 0, None
        self.ended, self.error = None, None
        self.connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=60)
        self.connection.sock = socket.socket()
        # Little may be on its way: what the kernel has taken in, the node is done with.
        self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.connection.sock.settimeout(60)
        self.connection.sock.connect(("127.0.0.1", address.port))
        self.token = token
        self.start()
        self.begun.wait(30)

    def run(self):
        try:
            self.connection.request(
                "GET", f"/api/v1/reports/transactions?{YEARS}&format=ndjson",
                headers={"Authorization": f"Bearer {self.token}"})
            answer = self.connection.getresponse()
            self.rows = int(answer.headers.get("Report-Rows", -1))
            while part := answer.read(RATE // 20):
                self.lines += part.count(b"\n")
                self.begun.set()
                time.sleep(0.05)
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.begun.set()
            self.connection.close()

    def whole(self):
        self.join(60)
        return self.error is None and self.lines == self.rows


class Pairs:
    """A price is changed through one node, then read through all others, again and again.

    What one of them shows that is older is ``stale``. A few do it at once, each to a product of
    its own.
    """

    PRODUCTS = range(21, 25)
    LIST = "products?limit=100&sort=price&order=desc"

    def __init__(self, cluster, rounds=None):
        self.cluster, self.rounds = cluster, rounds
        self.reads, self.stale, self.failed, self.over = 0, [], [], threading.Event()
        self._lock = threading.Lock()
        self.threads = [threading.Thread(target=self._run, args=(product,))
                        for product in self.PRODUCTS]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        if self.rounds is None:
            self.over.set()
        for thread in self.threads:
            thread.join()

    def _run(self, product):
        try:
            for price in itertools.count(1000):
                if self.over.is_set() or price - 1000 == self.rounds:
                    return
                self._pair(product, f"{price}.00", random.choice(self.cluster.nodes))
        except Exception as error:  # a thread's end is the test's
            self.failed.append(repr(error))

    def _pair(self, product, price, writer):
        paths = f"products/{product}", self.LIST
        readers = self.cluster.others(writer)
        for reader in readers:  # so that there is something to be stale
            for path in paths:
                reader.call("GET", path)
        answer = writer.call("PATCH", f"products/{product}", token=self.cluster.admin,
                             json={"price": price})
        if answer.status != 200:
            self.failed.append(answer.body)
            return
        for reader, path in itertools.product(readers, paths):
            self._look(reader, path, product, price)

    def _look(self, reader, path, product, price):
        answer = reader.call("GET", path)
        if answer.status != 200:
            self.failed.append(answer.body)
            return
        body = answer.json()
        shown = [one["price"] for one in body.get("data", [body]) if one["id"] == product]
        with self._lock:
            self.reads += 1
            if shown != [price]:
                self.stale.append((path, shown, price))


def all_hit(cluster, *paths):
    """Whether every node answers from the cache that they share."""
    with contextlib.suppress(OSError):
        for _ in range(2):
            answers = [node.call("GET", path) for path in paths for node in cluster.nodes]
        return {answer.headers["X-Cache"] for answer in answers} == {"hit"} and all(
            node.ready() for node in cluster.nodes)
    return False
