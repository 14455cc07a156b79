"""The API on one screen: which blueprints each version serves, in the order of its document."""
import flask_smorest
from flask import Flask

from blueprints import docs, health
from blueprints.v1 import auth, categories, products, reports, transactions, users
from blueprints.v2 import users as users_v2
from extensions import openapi

V1 = [auth.blp, users.blp, categories.blp, products.blp, transactions.blp, reports.blp]

VERSIONS = {
    "v1": V1,
    "v2": [users_v2.blp if blp is users.blp else blp for blp in V1],
}


class Api(flask_smorest.Api):
    """flask-smorest's, which leaves errors to http/errors.py and documents to docs.py."""

    def _register_error_handlers(self):
        pass


def init_app(app: Flask) -> None:
    """Mount every version under /api, and what has no version at the root."""
    for version, blueprints in VERSIONS.items():
        api = Api(app, config_prefix=version, spec_kwargs=openapi.spec_kwargs(version))
        openapi.prepare(api)
        for blp in blueprints:
            api.register_blueprint(
                blp, name=f"{version}_{blp.name}", url_prefix=f"/api/{version}{blp.url_prefix}"
            )
        for single in (products.single, categories.single):
            single.mount(app, f"/api/{version}")
        app.extensions.setdefault("apis", {})[version] = api
    app.register_blueprint(health.blp)
    app.register_blueprint(docs.blp)
    docs.init_app(app)
    users.init_app(app)
    users_v2.init_app(app)
