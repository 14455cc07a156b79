"""A picture of deploy/grafana.json: a shop in use, asked by a real Prometheus, drawn by matplotlib.

Redis stands still for a while, and then a table is locked for a while, so that there is something
to see. Each panel's queries go through Prometheus's HTTP API, as Grafana sends them.
"""
import contextlib
import http.client
import itertools
import json
import pathlib
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request

import matplotlib
import psycopg
import redis

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tests.bench.shop import fill, login, stack
from tests.conftest import ROOT

TOKEN = "metrics-token-of-the-bench"
STEP = 2  # seconds between two looks
VARIABLES = {"$__rate_interval": f"{5 * STEP}s", "$job": "shopfront", "$instance": ".+"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222", "#56B4E9", "#E69F00")
COLUMNS = 24  # Grafana's


class Prometheus:
    """A Prometheus of its own, that asks a server and goes by the shop's rules."""

    def __init__(self, folder, target):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        config = folder / "prometheus.yml"
        config.write_text(json.dumps({
            "global": {"scrape_interval": f"{STEP}s", "evaluation_interval": f"{STEP}s"},
            "rule_files": [str(ROOT / "deploy/alerts.yml")],
            "scrape_configs": [{"job_name": "shopfront", "authorization": {"credentials": TOKEN},
                                "static_configs": [{"targets": [target]}]}],
        }))
        self.process = subprocess.Popen(
            [shutil.which("prometheus"), f"--config.file={config}", "--log.level=error",
             f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={self.address}"])

    def ask(self, what, **parameters):
        """The data of an answer of its API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{what}?{query}") as answer:
            return json.loads(answer.read())["data"]

    def wait(self):
        for _ in range(200):
            with contextlib.suppress(OSError):
                return self.ask("query", query="up")
            time.sleep(0.1)
        raise SystemExit("Prometheus does not answer.")

    def stop(self):
        self.process.terminate()
        self.process.wait()


class Crowd:
    """Clients that do what clients do, until they are told to go."""

    def __init__(self, server):
        self.server, self.over = server, threading.Event()
        self.admin, self.user = (login(server, f"{name}@example.com") for name in
                                 ("admin", "user1"))
        work = [self.browse, self.browse, self.buy, self.identify, self.edit, self.guess,
                self.report, self.manage]
        self.threads = [threading.Thread(target=self._run, args=(each,)) for each in work]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def _run(self, work):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        for turn in itertools.count():
            pause, method, path, token, body = work(turn)
            if self.over.wait(pause):
                return
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            if body:
                headers["Content-Type"] = "application/json"
            connection.request(method, f"/api/{path}", body and json.dumps(body), headers)
            connection.getresponse().read()

    # What each does next: a pause, then a request.

    def browse(self, turn):
        path = f"products?page={turn % 20 + 1}" if turn % 3 else f"products/{turn % 97 + 1}"
        return 0.02, "GET", f"v1/{path}", None, None

    def buy(self, turn):
        items = [{"product_id": turn % 50 + 1, "quantity": 1}]
        return 0.1, "POST", "v1/transactions", self.user, {"items": items}

    def identify(self, turn):
        return 0.05, "GET", "v2/users/me", self.user, None

    def edit(self, turn):
        return 1, "PATCH", f"v1/products/{turn % 97 + 1}", self.admin, {"price": turn % 50 + 1}

    def guess(self, turn):
        body = {"email": f"user{turn % 3 + 2}@example.com", "password": "no idea at all"}
        return 0.5, "POST", "v1/auth/login", None, body

    def report(self, turn):
        path = "v1/reports/transactions?start_date=2000-01-01&end_date=2100-01-01"
        return 2, "GET", path, self.admin, None

    def manage(self, turn):
        if turn % 4 == 3:
            body = {"email": f"new{turn}@example.com", "password": "a long walk home",
                    "name": "Ada"}
            return 3, "POST", "v1/auth/register", None, body
        return 3, "GET", "v1/users", self.admin, None


def incidents(url, redis_url, seconds):
    """Let time pass, and things happen in it."""
    time.sleep(seconds * 0.3)
    with redis.Redis.from_url(redis_url) as memory:
        memory.client_pause(int(seconds * 100))
    time.sleep(seconds * 0.3)
    for _ in range(2):
        with psycopg.connect(url) as conn:
            conn.execute("LOCK TABLE products")
            time.sleep(4)
        time.sleep(seconds * 0.1)
    time.sleep(seconds * 0.1)


def evaluate(prometheus, panel, begin, end):
    """[(label, [(time, value)])] of a panel, as Grafana would have them."""
    lines = []
    for target in panel["targets"]:
        query = target["expr"]
        for name, value in VARIABLES.items():
            query = query.replace(name, value)
        found = prometheus.ask("query_range", query=query, start=begin, end=end, step=STEP)
        for series in found["result"]:
            label = re.sub(r"\{\{(\w+)\}\}", lambda m, s=series: s["metric"].get(m[1], ""),
                           target.get("legendFormat", ""))
            lines.append((label, [(at, float(value)) for at, value in series["values"]]))
    return lines


def shown(unit):
    """How an axis shows a value."""
    if unit == "percentunit":
        return lambda value, _=None: f"{value:.1%}"
    if unit == "s":
        return lambda value, _=None: f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"
    return lambda value, _=None: f"{value:,.3g}"


def draw(panels, lines, begin, file):
    """Draw the panels where Grafana has them. ``lines`` are those of each panel's id."""
    places = [panel["gridPos"] for panel in panels]
    height = max(place["y"] + place["h"] for place in places)
    figure = pyplot.figure(figsize=(13, height * 0.3), dpi=75)
    for panel, place in zip(panels, places, strict=True):
        left, top = place["x"] / COLUMNS, 1 - place["y"] / height
        is_stat = panel["type"] == "stat"
        axes = figure.add_axes((left + 0.045, top - (place["h"] - 1.3) / height,
                                place["w"] / COLUMNS - 0.06, (place["h"] - 2.6) / height))
        axes.set_title(panel["title"], fontsize=9, loc="left", color="#333333")
        if is_stat:
            stat(axes, lines[panel["id"]])
            continue
        found = sorted(lines[panel["id"]], key=lambda line: -highest([line]))
        for (label, points), colour in zip(found, itertools.cycle(COLOURS), strict=False):
            axes.plot([at - begin for at, _ in points], [value for _, value in points],
                      color=colour, linewidth=1.2, label=label)
        unit = panel["fieldConfig"]["defaults"]["unit"]
        axes.yaxis.set_major_formatter(FuncFormatter(shown(unit)))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylim(0, 1.5 * highest(found) or 1)
        axes.tick_params(labelsize=7)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(*(named[:6] for named in axes.get_legend_handles_labels()), fontsize=6,
                    frameon=False, ncols=2, loc="upper left", borderaxespad=0)
    figure.savefig(file)
    pyplot.close(figure)


def highest(lines):
    return max((value for _, points in lines for _, value in points if value == value), default=0)


def stat(axes, lines):
    """A panel that is one figure, or a few."""
    axes.axis("off")
    text = "\n".join(f"{points[-1][1]:g} {label.replace(', ', chr(10))}".strip()
                     for label, points in lines)
    axes.text(0, 0.4, text, fontsize=16 if len(text) < 8 else 8, va="center", color="#0072B2")


def dashboard(args):
    if not shutil.which("prometheus"):
        raise SystemExit("prometheus is not here: it is in Debian's package of that name.")
    panels = json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as running:
        start, url, redis_url = running.enter_context(stack(None))
        fill(url, {"users": 100, "products": 5000, "transactions": 20_000})
        with psycopg.connect(url) as conn:
            conn.execute("UPDATE products SET stock = 1000000")
        server = start(METRICS_TOKEN=TOKEN, LOGIN_RATE_LIMIT="20 per minute",
                       SMTP_URL="smtp://127.0.0.1:1", POOL_MAX_SIZE="2")
        folder = pathlib.Path(running.enter_context(tempfile.TemporaryDirectory()))
        prometheus = Prometheus(folder, server.base.removeprefix("http://"))
        running.callback(prometheus.stop)
        prometheus.wait()
        begin = time.time()
        with Crowd(server):
            incidents(url, redis_url, args.seconds)
        lines = {panel["id"]: evaluate(prometheus, panel, begin, time.time()) for panel in panels}
        alerts = {alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]}
    draw(panels, lines, begin, out / "dashboard.png")
    for panel in panels:
        if not lines[panel["id"]]:
            print(f"Nothing was seen of: {panel['title']}")
    print(f"{out / 'dashboard.png'} shows {args.seconds:.0f} s. "
          f"Alerts at the end: {', '.join(sorted(alerts)) or 'none'}")
