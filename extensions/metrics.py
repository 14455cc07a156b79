"""Prometheus metrics over all worker processes, for whoever has METRICS_TOKEN."""
import hmac
import logging
import time
from datetime import UTC, datetime

from flask import Response, current_app, g, request
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

REQUESTS = Counter("shopfront_requests_total", "Requests answered",
                   ["method", "route", "status"])
SECONDS = Histogram("shopfront_request_seconds", "Time until the response began", ["route"],
                    buckets=(.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10))
CACHE = Counter("shopfront_cache_total", "Reads of the response cache", ["result"])
DEPRECATED = Counter("shopfront_deprecated_requests_total", "Uses of deprecated routes",
                     ["route", "method"])
_told = {}


def init_app(app):
    if not app.config["METRICS_TOKEN"]:
        return

    @app.after_request
    def count(response):
        route = request.url_rule.rule if request.url_rule else "none"
        REQUESTS.labels(request.method, route, response.status_code).inc()
        SECONDS.labels(route).observe(time.perf_counter() - g.started)
        if result := response.headers.get("X-Cache"):
            CACHE.labels(result).inc()
        return response

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


def deprecated_requests(method, caller):
    """Count a use of a deprecated route; log it once for each client and day."""
    route = request.url_rule.rule if request.url_rule else request.path
    if current_app.config["METRICS_TOKEN"]:
        DEPRECATED.labels(route, method).inc()
    client = caller["id"] if caller else request.remote_addr
    today = datetime.now(UTC).date()
    if _told.get(client) != today:
        if len(_told) > 10000:
            _told.clear()
        _told[client] = today
        log.warning("deprecated route used", extra={"route": route, "client": client})
