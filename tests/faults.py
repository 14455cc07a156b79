"""Faults, a load that runs meanwhile, and what it saw: for test_faults, test_soak and the bench.

A Rig is a shop of real processes: gunicorn, PostgreSQL, Valkey, a mail server. FAULTS is the table
of what may happen to it. ``strike`` has one of them happen under load and tells what clients saw.
"""
import contextlib
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import psycopg
import redis
from aiosmtpd.controller import Controller

from db import migrations
from tests.conftest import PASSWORD, Answer, execute, free_port, unique
from tests.test_limits import Valkey
from tests.test_outages import Postgres

STOCK, PRODUCTS = 10_000_000, 20
EDITED, UNTOUCHED = 1, 2  # the product whose price changes, and the one that nobody changes
HANG = 15  # seconds after which a client gives a request up for lost
PAUSE = 0.02  # between a client's requests
QUIET = 0.5  # for so long nothing fails once a fault is over
DISK = "96m"
HOUR = 3600
ENV = {"STATEMENT_TIMEOUT_MS": "500", "LOG_LEVEL": "ERROR", "POOL_MAX_SIZE": "8",
       "CACHE_TTL": "3600", "ACCESS_TOKEN_MINUTES": "1440"}


class Lasting(Postgres):
    """A PostgreSQL that keeps what it said it has: with fsync, and the usual 200 connections."""

    durable = True


class Disk:
    """A small file system for the shop's tables, if one may be mounted here."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=777", "tmpfs",
                               folder], capture_output=True)
        self.mounted = done.returncode == 0
        self.filler = folder / "filler"

    def fill(self):
        with contextlib.suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass

    def empty(self):
        self.filler.unlink()

    def close(self):
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)


class Clock:
    """The time of day that gunicorn's workers see; everybody else's goes on, as the seconds do."""

    STEPS = """
import datetime, os, pathlib, threading, time, time_machine

def follow():
    travel, last = None, 0
    while True:
        ahead = int(pathlib.Path(__file__).with_name("ahead").read_text() or 0)
        if ahead != last:
            if travel:
                travel.stop()
            there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
            travel, last = time_machine.travel(there), ahead
            travel.start()
        time.sleep(0.05)

def begin():
    threading.Thread(target=follow, daemon=True).start()

os.register_at_fork(after_in_child=begin)
"""

    def __init__(self, folder):
        self.folder = folder / "clock"
        self.folder.mkdir()
        (self.folder / "sitecustomize.py").write_text(self.STEPS)
        self.step(0)

    @property
    def env(self):
        return {"PYTHONPATH": str(self.folder)}

    def step(self, seconds):
        (self.folder / "ahead").write_text(str(seconds))


class Post:
    """A mail server at one port, there or not."""

    def __init__(self):
        self.port = free_port()
        self.arrived, self._controller = 0, None
        self.start()

    async def handle_DATA(self, server, session, envelope):
        self.arrived += 1
        return "250 OK"

    def start(self):
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)
        self._controller.start()

    def stop(self):
        self._controller.stop()


class Shop:
    """What a load deals with: ``server`` answers HTTP, and ``url`` leads to the books."""

    def __init__(self):
        self.sales, self.prices = {}, itertools.count(1)
        self.old = 0  # the last sale that was there before

    def let_in(self):
        """People to buy, the first of whom is an admin."""
        self.people = [self._register() for _ in range(3)]
        execute(self.url, f"UPDATE users SET role = 'admin' WHERE id = {self.people[0]['id']}")

    def _register(self):
        email = f"{unique('u')}@example.com"
        answer = self.server.call("POST", "auth/register", json={
            "email": email, "password": PASSWORD, "name": "Ada"}).json()
        return {"id": answer["user"]["id"], "email": email, "token": answer["token"]}

    def books(self):
        """What differs between the sales that were answered and those that are stored."""
        stored = dict(execute(self.url, "SELECT key, body FROM idempotency_keys"))
        answered = Counter(sale["id"] for sale in self.sales.values())
        made = Counter(row[0] for row in execute(
            self.url, f"SELECT id FROM transactions WHERE id > {self.old}"))
        found = {
            "answered, but missing": list(answered - made),
            "made, but not answered": list(made - answered),
            "answered otherwise than kept": [
                key for key, sale in self.sales.items()
                if json.loads(stored.get(key, "null")) != sale],
            "totals": execute(self.url, """
                SELECT t.id FROM transactions t
                LEFT JOIN transaction_items i ON i.transaction_id = t.id
                GROUP BY t.id HAVING t.total IS DISTINCT FROM sum(i.amount)"""),
            "stock": execute(self.url, f"""
                SELECT p.id FROM products p
                LEFT JOIN (SELECT product_id, sum(quantity) AS sold FROM transaction_items
                           GROUP BY 1) i ON i.product_id = p.id
                WHERE p.stock + coalesce(i.sold, 0) <> {STOCK}"""),
        }
        return {what: wrong for what, wrong in found.items() if wrong}


class Rig(Shop):
    """The shop and its servers. ``serve(**env)`` starts gunicorn."""

    def __init__(self, folder, serve, **env):
        super().__init__()
        folder.mkdir(mode=0o755)
        self.folder = folder
        self.postgres, self.disk, self.post = Lasting(folder), Disk(folder / "disk"), Post()
        self.clock = Clock(folder)
        (folder / "v").mkdir()
        self.valkey = Valkey(folder / "v")
        self.memory = redis.Redis.from_url(self.valkey.url)
        self.url = self.postgres.url
        self._set_up()
        self.server = serve(**ENV | {
            "DATABASE_URL": self.url, "REDIS_URL": self.valkey.url,
            "SMTP_URL": f"smtp://127.0.0.1:{self.post.port}"} | self.clock.env | env)
        self.let_in()

    def _set_up(self):
        if self.disk.mounted:
            execute(self.url, f"CREATE TABLESPACE small LOCATION '{self._tables()}'")
            execute(self.url, "ALTER DATABASE shopfront SET default_tablespace = small")
        migrations.upgrade(self.url)
        execute(self.url, "INSERT INTO products (name, price, stock) SELECT 'Tea ' || n, 0, "
                          f"{STOCK} FROM generate_series(1, {PRODUCTS}) n")

    def _tables(self):
        folder = self.disk.folder / "tables"
        folder.mkdir()
        owner = (self.postgres.leases[0].home / "data").stat()
        os.chown(folder, owner.st_uid, owner.st_gid)
        return folder

    def well(self):
        """Whether everything is there again: database, Redis, cache, every worker."""
        try:
            answers = [self.server.call("GET", path, timeout=HANG) for path in
                       ["/health/ready"] * 4 + [f"products/{UNTOUCHED}"] * 4]
        except (OSError, http.client.HTTPException):
            return False
        return [a.status for a in answers] == [200] * 8 and all(
            a.json() == {"status": "ok"} for a in answers[:4]
        ) and answers[-1].headers["X-Cache"] == "hit" and len(self.server.worker_pids) == 2

    def close(self):
        self.server.stop()
        self.memory.close()
        self.valkey.kill()
        self.post.stop()
        for lease in self.postgres.leases:
            lease.stop()
        self.disk.close()
        shutil.rmtree(self.folder, ignore_errors=True)


Seen = namedtuple("Seen", "kind outcome began seconds")


class Load:
    """A few clients: they browse, ask who they are, buy by key until answered, edit a price."""

    def __init__(self, rig):
        self.rig, self.over = rig, threading.Event()
        self.seen, self.stale, self.crashed, self.settled = [], [], [], 0
        self.counts, self.kept = Counter(), []  # a few answers of each kind and outcome
        self.threads = [threading.Thread(target=self._run, args=(each, n))
                        for n, each in enumerate(self.work())]

    def work(self):
        """What each of the clients does."""
        return [self.browse, self.browse, self.identify, self.forget, self.edit, self.buy, self.buy]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _run(self, work, number):
        client = Client(self, number)
        try:
            for turn in itertools.count():
                if self.over.wait(PAUSE):
                    return
                work(client, turn)
        except Exception as error:  # a thread's end is the test's
            self.crashed.append(error)
        finally:
            client.close()

    def browse(self, client, turn):
        """No answer shows a price older than the last one whose change was answered before."""
        if turn % 4 == 3:
            client.call("a kept product", "GET", f"products/{UNTOUCHED}")
            return
        floor, single = self.settled, turn % 4
        path = f"products/{EDITED}" if single else f"products?limit={5 + turn // 4 % 2}&sort=name"
        answer = client.call("a product" if single else "a list", "GET", path)
        if answer is None or answer.status != 200:
            return
        found = [answer.json()] if single else answer.json()["data"]
        self.stale += [(floor, product["price"]) for product in found
                       if product["id"] == EDITED and float(product["price"]) < floor]

    def identify(self, client, turn):
        client.call("who am I", "GET", "users/me", token=self.rig.people[1]["token"])

    def forget(self, client, turn):
        if turn % 8 == 0:
            client.call("a mail", "POST", "auth/password/forgot",
                        json={"email": self.rig.people[2]["email"]})

    def edit(self, client, turn):
        price = next(self.rig.prices)
        answer = client.call("an edit", "PATCH", f"products/{EDITED}", json={"price": price},
                             token=self.rig.people[0]["token"])
        if answer is not None and answer.status == 200:
            self.settled = price

    def buy(self, client, turn):
        """A purchase is sent with its key until it is answered, beyond the load's end, too."""
        key, buyer = unique("key"), self.rig.people[1 + client.number % 2]
        items = [{"product_id": 3 + (turn * 7 + n) % (PRODUCTS - 2), "quantity": 1 + n}
                 for n in range(2)]
        end = time.monotonic() + 120
        while time.monotonic() < end:
            answer = client.call("a purchase", "POST", "transactions", token=buyer["token"],
                                 json={"items": items}, headers={"Idempotency-Key": key})
            if answer is not None and answer.status == 201:
                self.rig.sales[key] = answer.json()
                return
            time.sleep(PAUSE)
        raise AssertionError("a purchase was never answered")


class Client:
    """A kept-alive connection, whose every request is noted with its outcome and its time.

    The first one comes in anew for each request.
    """

    def __init__(self, load, number):
        self.load, self.number = load, number
        self.connection = http.client.HTTPConnection(
            "127.0.0.1", load.rig.server.port, timeout=HANG)

    def call(self, kind, method, path, token=None, json=None, headers=None):
        """The Answer, or None where the connection breaks."""
        headers = dict(headers or {}, **{"Content-Type": "application/json"} if json else {})
        if token:
            headers["Authorization"] = f"Bearer {token}"
        began, answer, path = time.monotonic(), None, f"/api/v1/{path}"
        try:
            self.connection.request(method, path, json and dump(json), headers)
            response = self.connection.getresponse()
            answer = Answer(response.status, response.headers, response.read())
            outcome = outcome_of(answer)
        except TimeoutError:
            outcome = "hung"
        except (OSError, http.client.HTTPException):
            outcome = "broken"
        if answer is None or self.number == 0:
            self.connection.close()
        self.load.seen.append(Seen(kind, outcome, began, time.monotonic() - began))
        self.load.counts[kind, outcome] += 1
        if answer is not None and self.load.counts[kind, outcome] < 5:
            self.load.kept.append((method, path.partition("?")[0], answer.status, answer.headers,
                                   answer.body))
        return answer

    def close(self):
        self.connection.close()


dump = json.dumps


def outcome_of(answer):
    """"ok", or the problem's code, which says if it lacks the header that it has to have.

    Of an answer that a proxy made up by itself it is the status.
    """
    if answer.status < 400:
        return "ok"
    if answer.headers.get_content_type() != "application/problem+json":
        return str(answer.status)
    code = json.loads(answer.body)["code"]
    if answer.status == 503 and int(answer.headers.get("Retry-After", 0)) < 1:
        return f"{code} without Retry-After"
    return code


def not_ready(rig, load):
    answer = rig.server.call("GET", "/health/ready", timeout=HANG)
    return answer.json() != {"status": "ok"}


def refusing(rig, load):
    return any(one.outcome == "unavailable" for one in load.seen)


@dataclass(frozen=True)
class Fault:
    """What happens and how it ends; what clients may see beside "ok"; within how many seconds a
    request is answered, and all is well again. It lasts for ``hold`` seconds in the short form,
    and goes on until it is ``felt``."""

    name: str
    inject: Callable
    heal: Callable = lambda rig: None
    seen: tuple = ()
    answer: float = 2.5
    healed: float = 3.0
    hold: float = 0.6
    felt: Callable = not_ready
    possible: Callable = lambda rig: True


def freeze_postgres(rig):
    rig.frozen = contextlib.ExitStack()
    rig.frozen.enter_context(rig.postgres.frozen())


def take_connections(rig):
    """Another client takes every connection there is, the shop's own among them.

    The shop wants back what it loses, so this asks all the while for what is about to be free.
    """
    rig.taken = [psycopg.connect(rig.url, autocommit=True)]
    quiet = 0
    while quiet < 3:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            with contextlib.suppress(psycopg.OperationalError):
                rig.taken.append(psycopg.connect(rig.url))
        ended = rig.taken[0].execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'shopfront'").fetchall()
        quiet = 0 if ended else quiet + 1


def give_connections(rig):
    for conn in rig.taken:
        conn.close()


def read_only(rig, how="on"):
    execute(rig.url, f"ALTER SYSTEM SET default_transaction_read_only = {how}")
    execute(rig.url, "SELECT pg_reload_conf()")


def crowd_redis(rig):
    """Another client has the one connection that Redis gives."""
    rig.memory.config_set("maxclients", 1)
    rig.memory.execute_command("CLIENT KILL TYPE normal SKIPME yes")


def replicate(rig, whom="127.0.0.1 1"):
    rig.memory.execute_command(f"REPLICAOF {whom}")


def crowd(rig):
    """Each worker may open a few more files, and hundreds of silent clients want to be let in.

    One of the workers is new, with no connection of its own yet.
    """
    kill_a_worker(rig)
    until(lambda: len(rig.server.worker_pids) == 2, 10)
    for pid in rig.server.worker_pids:
        count = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (count + 30, files()[1]))
    rig.crowd = [socket.create_connection(("127.0.0.1", rig.server.port)) for _ in range(300)]


def disperse(rig):
    for one in rig.crowd:
        one.close()
    for pid in rig.server.worker_pids:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, files())


def files():
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def kill_a_worker(rig):
    """The youngest: of a soak's workers one lives from its beginning to its end."""
    os.kill(rig.server.worker_pids[-1], signal.SIGKILL)


def deliver(rig):
    """The mail server is back; what waits is not left to wait for its next half minute."""
    rig.post.start()
    execute(rig.url, "UPDATE mails SET due_at = now()")


def others_in(rig, load):
    """Whether silent clients had to go, which are never told why."""
    gone = 0
    for one in rig.crowd:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            gone += one.recv(1) == b""
    return gone > 0


def off(rig, load):
    """Whether the server's clock is far from ours."""
    date = rig.server.call("GET", "/health").headers["Date"]
    return abs(parsedate_to_datetime(date).timestamp() - time.time()) > HOUR / 2


def mails_wait(rig, load):
    return execute(rig.url, "SELECT count(*) FROM mails WHERE attempts > 0") > [(0,)]


def at_once(rig, load):
    """It is over as soon as it happens, and may pass unnoticed."""
    return True


GONE = ("unavailable", "request_in_progress")
FAULTS = [
    Fault("PostgreSQL stopped", lambda rig: rig.postgres.stop(), lambda rig: rig.postgres.start(),
          GONE, answer=6, hold=2.2),
    Fault("PostgreSQL restarted", lambda rig: rig.postgres.restart(), seen=GONE, answer=6,
          felt=at_once),
    Fault("PostgreSQL crashed", lambda rig: rig.postgres.stop(signal.SIGQUIT),
          lambda rig: rig.postgres.start(), GONE, answer=6),
    Fault("PostgreSQL frozen", freeze_postgres, lambda rig: rig.frozen.close(),
          (*GONE, "timeout"), answer=8, hold=2.2),
    Fault("PostgreSQL out of connections", take_connections, give_connections, GONE, answer=6),
    Fault("PostgreSQL's disk full", lambda rig: rig.disk.fill(), lambda rig: rig.disk.empty(),
          GONE, felt=refusing, possible=lambda rig: rig.disk.mounted),
    Fault("PostgreSQL read-only", read_only, lambda rig: read_only(rig, "off"), GONE,
          felt=refusing),
    Fault("Redis stopped", lambda rig: rig.valkey.kill(), lambda rig: rig.valkey.start()),
    Fault("Redis frozen", lambda rig: rig.valkey.freeze(), lambda rig: rig.valkey.thaw()),
    Fault("Redis emptied", lambda rig: rig.memory.flushall(), lambda rig: rig.memory.flushall(),
          felt=at_once),
    Fault("Redis full", lambda rig: rig.memory.config_set("maxmemory", 1),
          lambda rig: rig.memory.config_set("maxmemory", 0)),
    Fault("Redis read-only", replicate, lambda rig: replicate(rig, "no one")),
    Fault("Redis out of connections", crowd_redis,
          lambda rig: rig.memory.config_set("maxclients", 10000)),
    Fault("mail server dead", lambda rig: rig.post.stop(), deliver, felt=mails_wait),
    Fault("a worker killed", kill_a_worker, seen=("broken", "request_in_progress"), felt=at_once),
    Fault("the clock stepped", lambda rig: rig.clock.step(HOUR), lambda rig: rig.clock.step(0),
          felt=off),
    Fault("file descriptors used up", crowd, disperse, ("broken", "unavailable"),
          answer=5, felt=others_in),
]


@dataclass
class Result:
    """What a fault did: outcomes by kind, the slowest answer, seconds until all was well."""

    outcomes: Counter
    slowest: Seen
    healed: float
    load: Load


def strike(rig, fault, hold=None):
    """Have a fault happen under load, and end it. Returns when all has been well for a while."""
    with Load(rig) as load:
        until(lambda: rig.well() and load.settled, 20)
        begun = time.monotonic()
        fault.inject(rig)
        try:
            time.sleep(hold or fault.hold)
            until(lambda: fault.felt(rig, load), 30, fault.name)
        finally:
            last = over = time.monotonic()
            fault.heal(rig)
        while time.monotonic() < last + QUIET and last - over < 20:
            if not rig.well():
                last = time.monotonic()
            last = max([last, *(s.began + s.seconds for s in load.seen[-200:]
                                if s.outcome != "ok")])
    struck = [one for one in load.seen if one.began + one.seconds >= begun]
    return Result(Counter((one.kind, one.outcome) for one in struck),
                  max(struck, key=lambda one: one.seconds), last - over, load)


def until(condition, seconds, what="it"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.05)
