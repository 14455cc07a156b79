"""The application: settings in, extensions bound, versions mounted."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Flask
from flask.typing import ResponseReturnValue

import blueprints
import db
from blueprints import cli, cli_catalogue, cli_db, health
from blueprints.v1 import reports
from extensions import cache, jwt, limits, redis_client, settings
from extensions.behind import upkeep
from extensions.front import door
from extensions.http import arguments, compression, errors, logs, metrics

ROOT = Path(__file__).resolve().parent


class Shop(Flask):
    """Flask for synchronous views, which may run again after a database error."""

    def ensure_sync(self, func: Callable) -> Callable:
        return func

    def dispatch_request(self) -> ResponseReturnValue:
        return db.again_if_lost(super().dispatch_request)


def create_app(**overrides: Any) -> Flask:
    """The WSGI application. ``overrides`` replace settings, by their names."""
    folder = overrides.pop("instance_path", ROOT / "instance")
    app = Shop("shopfront", root_path=str(ROOT), instance_path=str(folder), static_folder=None)
    app.config.update(settings.read(**overrides))
    app.json.sort_keys = False  # type: ignore[attr-defined] # an attribute of Flask's own provider
    for part in (logs, errors, redis_client, limits, arguments, compression, cache, door, db,
                 jwt, upkeep, metrics, reports, health, blueprints, cli_db, cli,
                 cli_catalogue):
        part.init_app(app)
    return app
