"""Prometheus metrics over all worker processes. blueprints/health.py shows them."""
import logging
import time
from datetime import UTC, date, datetime

from flask import Flask
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)
from prometheus_client.core import GaugeMetricFamily

from extensions.http.visit import Pairs, Visit

log = logging.getLogger("shopfront.deprecation")

# This process's name in the shared metrics files. A new worker takes over the number of a dead one,
# and so its files; named by pid, the files and the time to read them would only grow.
process = "alone"
if values.ValueClass.__name__ == "MmapedValue":
    values.ValueClass = values.MultiProcessValue(lambda: process)


def _now(name, help, *labels):
    """A gauge of the current state, summed over all live processes."""
    return Gauge(f"shopfront_{name}", help, labels, multiprocess_mode="livesum")


BUCKETS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
REQUESTS = Counter("shopfront_requests_total", "Requests answered",
                   ["method", "route", "status"])
SECONDS = Histogram("shopfront_request_seconds", "Time until the response began", ["route"],
                    buckets=BUCKETS)
CACHE = Counter("shopfront_cache_total", "Reads of the response cache", ["result"])
DEPRECATED = Counter("shopfront_deprecated_requests_total", "Uses of deprecated routes",
                     ["route", "method"])
LIMITED = Counter("shopfront_limited_total", "Requests beyond a limit", ["limit"])
EVENTS = Counter("shopfront_security_events_total", "Security events, such as failed logins",
                 ["event"])
THREAD_WAIT = Histogram("shopfront_thread_wait_seconds", "Time that requests waited for a thread",
                        buckets=BUCKETS)
CONNECTIONS = _now("connections", "Clients' connections")
IN_FLIGHT = _now("in_flight", "Requests that have arrived and are not yet answered")
POOL = _now("pool_connections", "Connections to PostgreSQL", "pool", "state")
POOL_WAITING = _now("pool_waiting", "Threads that wait for a connection to PostgreSQL", "pool")
POOL_WAITS = Counter("shopfront_pool_waits_total", "Waits for a connection to PostgreSQL", ["pool"])
POOL_WAIT = Counter("shopfront_pool_wait_seconds_total", "Time in such waits", ["pool"])
POOL_ERRORS = Counter("shopfront_pool_errors_total", "Such waits in vain", ["pool"])
REDIS_AWAY = _now("redis_away", "Processes that do without Redis")
REDIS_CALLS = Counter("shopfront_redis_calls_total", "Round trips to Redis")
REDIS_SECONDS = Counter("shopfront_redis_seconds_total", "Time in them")
REPORTS = _now("reports_running", "Downloads that run")
REPORT_SLOTS = _now("report_slots", "Downloads that may run")
# A series lives as long as the process: a client must not be able to make up new ones.
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_told: dict[int | str, date] = {}


class Sampler:
    """Samples a process's pools, Redis client and report slots, outside of any request."""

    def __init__(self, app: Flask) -> None:
        self._parts, self._slots = app.extensions, app.config["REPORT_CONCURRENCY"]
        self._seen: dict[Counter, float] = {}

    def sample(self) -> None:
        for pool, part in (("requests", "db"), ("reports", "db_reports")):
            stats = self._parts[part].stats()
            idle = stats.get("pool_available", 0)
            POOL.labels(pool, "idle").set(idle)
            POOL.labels(pool, "busy").set(stats.get("pool_size", 0) - idle)
            POOL_WAITING.labels(pool).set(stats.get("requests_waiting", 0))
            self._add(POOL_WAITS.labels(pool), stats.get("requests_queued", 0))
            self._add(POOL_WAIT.labels(pool), stats.get("requests_wait_ms", 0) / 1000)
            self._add(POOL_ERRORS.labels(pool), stats.get("requests_errors", 0))
        redis = self._parts["redis_client"]
        REDIS_AWAY.set(redis.away)
        self._add(REDIS_CALLS, redis.calls)
        self._add(REDIS_SECONDS, redis.seconds)
        REPORT_SLOTS.set(self._slots)
        REPORTS.set(self._slots - self._parts["report_slots"]._value)

    def _add(self, counter, total):
        """Add to a counter what a total has grown by since the last sample."""
        counter.inc(max(0, total - self._seen.get(counter, 0)))
        self._seen[counter] = total


def init_app(app: Flask) -> None:
    if app.config["METRICS_TOKEN"]:
        app.extensions["sampler"] = Sampler(app)


def text(**figures: float | dict[str, str]) -> bytes:
    """The metrics of all processes, plus ``figures`` as gauges, in Prometheus's text format.

    A figure is a number, or a dict of labels for a gauge of 1.
    """
    registry = REGISTRY
    if values.ValueClass.__name__ == "MmapedValue":
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return generate_latest(registry) + generate_latest(_Once(figures))


class _Once:
    """A registry of gauges that are set for a single scrape."""

    def __init__(self, figures):
        self._figures = figures

    def collect(self):
        for name, value in self._figures.items():
            labels = value if isinstance(value, dict) else {}
            family = GaugeMetricFamily(f"shopfront_{name}", name.replace("_", " ").capitalize(),
                                       labels=list(labels))
            family.add_metric(list(labels.values()), 1 if labels else value)
            yield family


def forget(number: str) -> None:
    """Drop the gauges of a process that has ended; its counters and histograms stay."""
    multiprocess.mark_process_dead(number)


def count(visit: Visit, status: str, headers: Pairs) -> None:
    """Count an answer, as its headers leave."""
    route = visit.route or "none"
    method = visit.method if visit.method in METHODS else "other"
    REQUESTS.labels(method, route, status[:3]).inc()
    SECONDS.labels(route).observe(time.perf_counter() - visit.started)
    for name, value in headers:
        if name == "X-Cache":
            CACHE.labels(value).inc()
            break


def count_deprecated(visit: Visit) -> None:
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
