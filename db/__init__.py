"""The shop's database, for every other room: connection(), reading(), reports(), load()."""
import atexit
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import psycopg
import psycopg_pool
from flask import Flask, current_app, g

from db.embedded import Servers
from db.pool import Connection, Database, PoolerError, lost, refuse_pooler
from db.queries import load

__all__ = ["Connection", "PoolerError", "again_if_lost", "check_pooler", "connection", "init_app",
           "load", "reading", "reports"]


def connection() -> AbstractContextManager[Connection]:
    """``with connection() as conn``: one database transaction, stored at the end of the block."""
    return current_app.extensions["db"].connection()


def reading() -> AbstractContextManager[Connection]:
    """``with reading() as conn``: for a single statement that stands alone."""
    return current_app.extensions["db"].reading()


def reports() -> Database:
    """The Database of long reads: connections of their own, no statement time-out, a replica."""
    return current_app.extensions["db_reports"]


def init_app(app: Flask) -> None:
    """Bind the pools."""
    config = app.config
    url = config["DATABASE_URL"] or (lambda: embedded_urls(app)[0])
    timeout = config["STATEMENT_TIMEOUT_MS"]
    sessionless = config["DATABASE_POOLER"] == "transaction"
    app.extensions["db"] = Database(url, config["POOL_MAX_SIZE"], timeout, sessionless)
    app.extensions["db_reports"] = Database(
        config["DATABASE_READ_URL"] or url, config["REPORT_CONCURRENCY"] + 1, 0, sessionless
    )


def check_pooler(config: dict) -> None:
    """Raise PoolerError if a pooler shares our sessions and DATABASE_POOLER doesn't say so."""
    for name in ("DATABASE_URL", "DATABASE_READ_URL"):
        if config[name] and config["DATABASE_POOLER"] == "none":
            refuse_pooler(name, config[name])


def again_if_lost(dispatch: Callable[[], Any]) -> Any:
    """Call ``dispatch()``; retry once after a lost connection or a deadlock if nothing was written.

    A migration that locks several tables in turn can deadlock with a request. PostgreSQL then
    aborts the request, because it has waited longer.
    """
    try:
        return dispatch()
    except psycopg.Error as error:
        if isinstance(error, psycopg_pool.PoolTimeout):
            raise
        if lost(error):
            for pool in ("db", "db_reports"):  # either may be where the next statement goes
                current_app.extensions[pool].drain()
        elif not isinstance(error, psycopg.errors.DeadlockDetected):
            raise
        if g.get("may_have_written"):
            raise
        return dispatch()


@functools.cache
def _servers(folder):
    servers = Servers(folder)
    atexit.register(servers.stop)  # the last user stops them
    return servers.start()


def embedded_urls(app: Flask) -> tuple[str, str]:
    """(database URL, Redis URL) of the servers under instance/, started if they don't run."""
    return _servers(app.instance_path)
