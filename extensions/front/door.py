"""The door: what every request passes before Flask, and every answer on its way out.

On the way in a request gets its id and its client's address. One below /api is counted against the
rate limit and, if its URL tells which cache entry it asks for, looked up in the same call to Redis.
If it is over the limit or a cache hit, it is answered here; everything else goes on to Flask, with
the result of the lookup. On the way out every answer gets its headers, its metrics and its line in
the access log, whatever made it.

To a WSGI server the door is the application. The worker (extensions/front/worker.py) hands it
requests in batches: those that arrived together cost one call to Redis and one write to the log.
"""
import json
from collections.abc import Callable, Iterable
from typing import Any

from flask import Flask, has_request_context, request
from werkzeug.middleware.proxy_fix import ProxyFix

import db
from extensions import cache, limits
from extensions.http import compression, errors, headers, metrics
from extensions.http.errors import Problem
from extensions.http.visit import Answer, Pairs, Visit
from extensions.redis_client import RedisClient


class Door:
    """The WSGI application around Flask's.

    ``ready`` maps a path to a function that makes its JSON without any input. ``direct`` maps a
    path to its route and a function that makes (status, headers, body) from the Visit alone.
    ``notices`` maps a path to a function that adds headers to every answer at or below it.
    """

    def __init__(self, app: Flask) -> None:
        config = app.config
        self._app, self._flask = app, app.wsgi_app
        self._limit, self._learned = app.extensions["limits"]["api"], cache.learned(app)
        self._cache = app.extensions["cache"][cache.cache]
        self._security = headers.security(config)
        self._secured = {name for name, _ in self._security}
        self._cors = headers.Cors(app) if config["ALLOWED_ORIGINS"] else None
        self._measured = bool(config["METRICS_TOKEN"])
        self._largest = config["MAX_CONTENT_LENGTH"]
        self.log = app.extensions["access_log"]
        self.ready: dict[str, Callable[[], dict]] = {}
        self.direct: dict[str, tuple[str, Callable[[Visit], Answer]]] = {}
        self.notices: dict[str, Callable[[Visit, Pairs], None]] = {}
        self._proxies: Any = None
        if proxies := config["TRUSTED_PROXIES"]:  # called for what it does to the environ
            self._proxies = ProxyFix(lambda environ, start_response: (),
                                     x_for=proxies, x_proto=proxies, x_host=proxies)

    def __call__(self, environ: dict, start_response: Callable) -> Iterable[bytes]:
        visit = self.visit(environ)
        answer, = self.answers([visit])
        if answer is None:
            try:
                return self.ask(visit, start_response)
            finally:
                self.log.flush()
        status, sent, body = answer
        start_response(status, sent)
        return [body]

    def visit(self, environ: dict, started: float | None = None) -> Visit:
        """The Visit of a request that comes in; ``started`` on time.perf_counter's clock."""
        if self._proxies:
            self._proxies(environ, None)
        return Visit(environ, started)

    def answers(self, visits: list[Visit]) -> list[Answer | None]:
        """For each Visit its (status, headers, body), or None where Flask has to be asked."""
        asking = [visit for visit in visits
                  if visit.path.startswith("/api/") and visit.method != "OPTIONS"]
        if asking:
            for visit in asking:
                visit.known = self._learned.of(visit)
            try:
                counted = self._cache.enter(self._limit, asking)
            except RedisClient.Away:
                counted = [(self._limit.count_here(visit), None) for visit in asking]
            for visit, (count, found) in zip(asking, counted, strict=True):
                visit.counted, visit.found = count, found
        return self._answered(visits, self._make)

    def answers_again(self, visits: list[Visit]) -> list[Answer | None]:
        """Like ``answers``, for visits whose answer another request is computing.

        If that is no longer so, the first visit computes the answer and the others wait for it.
        """
        seen: dict[tuple, cache.Found] = {}
        for visit in visits:
            place = visit.known.key, compression.choose(visit.accepts)
            visit.found = seen.get(place) or cache.look_again(
                visit.known, place[1], visit.started)
            seen[place] = visit.found if visit.found.settled else visit.found._replace(busy=True)
        return self._answered(visits, self._kept)

    def _answered(self, visits, make):
        answers = [self._answer(visit, make) for visit in visits]
        self.log.flush()
        return answers

    def refuse(self, visit: Visit, problem: Problem) -> Answer:
        """The answer of a problem."""
        return self._finished(visit, *errors.render(problem, visit.shown_path, visit.id))

    def ask(self, visit: Visit, start_response: Callable) -> Iterable[bytes]:
        """The answer as a WSGI iterable, from Flask or a function that bypasses it. May be slow.

        The access-log line is buffered until the caller's ``log.flush()``.
        """
        find = self._way(visit)
        if find:
            answer = self._finished(visit, *self._computed(visit, find))
            start_response(*answer[:2])
            return [answer[2]]

        def start(status, sent, exc_info=None):
            if has_request_context() and request.url_rule:
                visit.route = request.url_rule.rule
            self._finish(visit, status, sent)
            return start_response(status, sent, exc_info)
        return self._flask(visit.environ, start)

    def _way(self, visit):
        """The function that makes a visit's answer without Flask, or None."""
        if visit.known:
            visit.route = visit.known.route
            return lambda visit: cache.answer(visit, visit.known)
        if visit.path in self.direct and visit.method in ("GET", "HEAD") and not visit.url[1]:
            visit.route, find = self.direct[visit.path]
            return find
        return None

    def _computed(self, visit, find):
        with self._app.app_context():
            try:
                return db.again_if_lost(lambda: find(visit))
            except Exception as error:
                return errors.render(errors.problem_of(error), visit.shown_path, visit.id)

    def _answer(self, visit, make):
        try:
            made = make(visit)
        except Exception as error:
            return self.refuse(visit, errors.problem_of(error))
        return made and self._finished(visit, *made)

    def _make(self, visit):
        if visit.counted:
            self._limit.note(visit, *visit.counted)
        if visit.problem:
            raise visit.problem
        if len(length := visit.environ.get("CONTENT_LENGTH", "")) > 7 and length.isdecimal() \
                and int(length) > self._largest:
            raise Problem("payload_too_large")
        if visit.path in self.ready and visit.method in ("GET", "HEAD"):
            body = json.dumps(self.ready[visit.path]()).encode()
            return "200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store"),
                              ("Content-Length", str(len(body)))], body
        return self._kept(visit)

    def _kept(self, visit):
        found = visit.found
        if found and found.entry is not None:
            visit.route = visit.known.route
            encoding = compression.choose(visit.accepts)
            if found.encoded or encoding is None or len(found.entry) < compression.MIN_SIZE:
                return cache.render(visit, found.entry, found.encoded and encoding, True)
        return None

    def _finished(self, visit, status, sent, body):
        self._finish(visit, status, sent)
        return status, sent, b"" if visit.method == "HEAD" else body

    def _finish(self, visit, status, sent):
        """What every answer gets: its other headers, its metrics, its line in the log."""
        own = {name for name, _ in sent} & self._secured
        sent += [pair for pair in self._security if pair[0] not in own] if own else self._security
        sent.append(("X-Request-ID", visit.id))
        if visit.limits:
            sent += limits.headers(visit.limits)
        for path, notice in self.notices.items():
            if visit.path == path or visit.path.startswith(f"{path}/"):
                notice(visit, sent)
        if self._cors:
            self._cors.add(visit.environ, sent)
        if self._measured:
            metrics.count(visit, status, sent)
        self.log.note(visit, status[:3])


def init_app(app: Flask) -> None:
    app.extensions["door"] = app.wsgi_app = Door(app)  # type: ignore[method-assign] # Flask's way
