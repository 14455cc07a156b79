"""The application: settings in, extensions bound, versions mounted."""
from pathlib import Path

from flask import Flask

import blueprints
import db
from blueprints import cli, cli_catalogue, health
from blueprints.v1 import reports
from db import cli as db_cli
from extensions import (
    arguments,
    cache,
    compression,
    errors,
    headers,
    jwt,
    limits,
    logs,
    mail,
    metrics,
    redis_client,
    settings,
    upkeep,
)

ROOT = Path(__file__).resolve().parent


def create_app(**overrides):
    """The WSGI application. ``overrides`` replace settings, by their names."""
    folder = overrides.pop("instance_path", ROOT / "instance")
    app = Flask("shopfront", root_path=str(ROOT), instance_path=str(folder), static_folder=None)
    app.config.update(settings.read(**overrides))
    app.json.sort_keys = False
    app.ensure_sync = lambda function: function  # every view is; Flask would ask for each call
    for part in (logs, errors, headers, redis_client, limits, arguments, compression, cache, db,
                 jwt, mail, upkeep, metrics, reports, health, blueprints, db_cli, cli,
                 cli_catalogue):
        part.init_app(app)
    return app
