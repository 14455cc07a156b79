"""Periodic work: one thread per process that sends mails, deletes expired rows and sums sales.

Any number of processes may do it at once; it may also run late, or not at all for a while.
"""
import logging
import random
import threading
import time

import psycopg
import psycopg_pool
from flask import Flask

import db
from extensions.behind import mail

log = logging.getLogger("shopfront.upkeep")
queries = db.load("upkeep")
SECONDS = 60


class Upkeep:
    """``wake`` has the mail queue checked soon; ``start`` also runs ``tidy`` every minute."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._chores = False

    def start(self) -> None:
        self._chores = True
        self.wake(now=False)

    def wake(self, now: bool = True) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # threads don't survive a fork
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        if now:
            self._wake.set()

    def _run(self):
        next_chores = time.monotonic() + SECONDS * random.uniform(0.5, 1.5)  # nosec B311 # no secret
        while True:
            self._wake.wait(timeout=SECONDS / 2)
            self._wake.clear()
            try:
                mail.send_due(self._app)
                if self._chores and time.monotonic() > next_chores:
                    next_chores = time.monotonic() + SECONDS
                    tidy(self._app)
            except psycopg_pool.PoolClosed:
                return
            except (psycopg.Error, psycopg_pool.PoolTimeout) as error:
                log.warning("upkeep waits for the database: %s", type(error).__name__)
            except Exception:
                log.exception("upkeep failed")  # and goes on next time


def tidy(app: Flask) -> None:
    """Remove what has expired, fold counts, and seal the sums of days that are over."""
    for query in (queries.expire_keys, queries.expire_sessions, queries.expire_failures,
                  queries.expire_mail, queries.fold_counts):
        with app.extensions["db"].reading() as conn:
            query(conn)
    # The first summing of a whole year outlasts the statement time-out of requests.
    with app.extensions["db_upkeep"].connection() as conn:
        queries.seal_sales(conn)


def init_app(app: Flask) -> None:
    app.extensions["upkeep"] = Upkeep(app)
    app.extensions["db_upkeep"] = app.extensions["db"].without_timeout()
