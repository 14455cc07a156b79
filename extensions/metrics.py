"""Prometheus metrics over all worker processes, for whoever has METRICS_TOKEN."""
import hmac
import logging
import time
from datetime import UTC, datetime

from flask import Response, current_app, request
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)

from extensions.errors import Problem
from extensions.jwt import public

log = logging.getLogger("shopfront.deprecation")

# Which of the processes that count together this is. A worker goes on in the files of a dead one,
# whose number it gets; by their pids the files, and the work of reading them, would only grow.
process = "alone"
if values.ValueClass.__name__ == "MmapedValue":
    values.ValueClass = values.MultiProcessValue(lambda: process)

REQUESTS = Counter("shopfront_requests_total", "Requests answered",
                   ["method", "route", "status"])
SECONDS = Histogram("shopfront_request_seconds", "Time until the response began", ["route"],
                    buckets=(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10))
CACHE = Counter("shopfront_cache_total", "Reads of the response cache", ["result"])
DEPRECATED = Counter("shopfront_deprecated_requests_total", "Uses of deprecated routes",
                     ["route", "method"])
# A series lives as long as the process: a client must not be able to make up new ones.
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_told = {}


def init_app(app):
    if not app.config["METRICS_TOKEN"]:
        return

    @app.get("/metrics")
    @public
    def metrics():
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode(), current_app.config["METRICS_TOKEN"].encode()
        ):
            raise Problem("authentication_required", "Send METRICS_TOKEN as a bearer token.")
        registry = REGISTRY
        if values.ValueClass.__name__ == "MmapedValue":
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


def count(visit, status, headers):
    """Count an answer, as its headers leave."""
    route = visit.route or "none"
    method = visit.method if visit.method in METHODS else "other"
    REQUESTS.labels(method, route, status[:3]).inc()
    SECONDS.labels(route).observe(time.perf_counter() - visit.started)
    for name, value in headers:
        if name == "X-Cache":
            CACHE.labels(value).inc()
            break


def count_deprecated(visit):
    """Count a use of a deprecated route; log it once for each client and day."""
    route = visit.route or visit.path
    DEPRECATED.labels(route, visit.method).inc()
    client = visit.caller_id or visit.address
    today = datetime.now(UTC).date()
    if _told.get(client) != today:
        if len(_told) > 10000:
            _told.clear()
        _told[client] = today
        log.warning("deprecated route used", extra={"route": route, "client": client})
