"""Health checks and metrics, for load balancers, for Prometheus and for people."""
import contextlib
import hashlib
import hmac
import pathlib
import platform
import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime

import psycopg
import psycopg_pool
from flask import Blueprint, Flask, Response, current_app, json, request
from prometheus_client import CONTENT_TYPE_LATEST

import db
from db import migrations
from extensions.http import metrics
from extensions.http.errors import Problem, raises
from extensions.jwt import public
from extensions.redis_client import RedisClient, client

blp = Blueprint("health", __name__)
STARTED = time.time()
READY_SECONDS = 0.8
NO_DATABASE, BEHIND = "No database.", "Schema behind."
queries = db.load("health")


@blp.get("/health")
@public
def health() -> Response:
    """Say that the process serves, and since when."""
    return _json(status())


def status() -> dict:
    return {"status": "OK", "timestamp": datetime.now(UTC).isoformat(),
            "uptime": round(time.time() - STARTED, 3)}


@blp.get("/health/live")
@public
def live() -> Response:
    """Say that the process serves; touches nothing else."""
    return _json(alive())


def alive() -> dict:
    return {"status": "ok"}


@blp.get("/health/ready")
@public
@raises("unavailable")
def ready() -> Response:
    """Say whether to send traffic here: ok, degraded without Redis, 503 without the database."""
    if current_app.extensions["draining"].is_set():
        raise Problem("unavailable", "Draining.", headers={"Retry-After": "5"})
    state = current_app.extensions["readiness"].ask()
    if state != "ok":
        raise Problem("unavailable", state, headers={"Retry-After": "1"})
    try:
        client().ask(lambda redis: redis.ping())
    except RedisClient.Away:
        return _json({"status": "degraded", "redis": "away"})
    return _json({"status": "ok"})


@public
def show_metrics() -> Response:
    """What all of this node's processes have counted, and how the database is."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(
        token.strip().encode(), current_app.config["METRICS_TOKEN"].encode()
    ):
        raise Problem("authentication_required", "Send METRICS_TOKEN as a bearer token.")
    state = None
    if current_app.extensions["readiness"].ask() != NO_DATABASE:
        with contextlib.suppress(psycopg.Error, psycopg_pool.PoolTimeout), db.reading() as conn:
            state = queries.state(conn)
    return Response(
        metrics.text(build_info=current_app.extensions["build"],
                     database_up=state is not None, **state or {}),
        content_type=CONTENT_TYPE_LATEST,
    )


def _build(app):
    """Identifies the running code: nodes with the same code report the same."""
    code = hashlib.sha256()
    for room in ("blueprints", "db", "extensions", "schemas", "sql"):
        for path in sorted((pathlib.Path(app.root_path) / room).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                code.update(path.read_bytes())
    return {"build": code.hexdigest()[:12], "python": platform.python_version(),
            "schema": str(app.extensions["readiness"].known)}


class Readiness:
    """Checks the database in its own thread, so that a hung one costs no more than 0.8 s."""

    def __init__(self, app: Flask) -> None:
        self._database, self._lock = app.extensions["db"], threading.Lock()
        self.known = len(migrations.files())
        self._running: Future[str] | None = None

    def ask(self) -> str:
        """``ok``, or what is wrong. Callers share the result of a check that is running."""
        with self._lock:
            running = self._running
            if running is None or running.done():
                running = Future()
                try:
                    threading.Thread(target=self._answer, args=[running], daemon=True).start()
                except RuntimeError:  # there are too many
                    return "No thread."
                self._running = running
        try:
            return running.result(READY_SECONDS)
        except TimeoutError:
            return NO_DATABASE

    def _answer(self, running):
        state = NO_DATABASE
        try:
            with self._database.reading() as conn:
                applied = queries.version(conn)
            # A newer schema belongs to a release that is being rolled out.
            state = "ok" if (applied or 0) >= self.known else BEHIND
        except psycopg.errors.UndefinedTable:
            state = BEHIND
        except (psycopg.Error, psycopg_pool.PoolTimeout):
            self._database.drain()
        finally:
            running.set_result(state)


def init_app(app: Flask) -> None:
    app.extensions["readiness"] = Readiness(app)
    app.extensions["draining"] = threading.Event()
    if app.config["METRICS_TOKEN"]:
        app.extensions["build"] = _build(app)
        app.add_url_rule("/metrics", "metrics", show_metrics)
    app.extensions["door"].ready |= {"/health": status, "/health/live": alive}


def _json(data):
    return Response(json.dumps(data), headers={"Cache-Control": "no-store"},
                    content_type="application/json")
