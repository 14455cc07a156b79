"""The API's documentation, for programs and for people, and the links to it."""
import hashlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flask import (
    Blueprint,
    Flask,
    Response,
    current_app,
    json,
    redirect,
    request,
    send_from_directory,
    url_for,
)
from werkzeug.wrappers import Response as BaseResponse

from extensions import openapi
from extensions.http.answers import PUBLIC, etag_of, tagged
from extensions.http.errors import Problem
from extensions.jwt import public
from schemas.problems import PROBLEMS

blp = Blueprint("docs", __name__)
OWN = Path(__file__).with_name("docs_page")
_swagger: Any = find_spec("flask_swagger_ui")  # a dependency, so never None
SWAGGER = Path(_swagger.origin).parent / "dist"
ASSETS = {"swagger-ui.css": SWAGGER, "swagger-ui-bundle.js": SWAGGER, "favicon-32x32.png": SWAGGER,
          "page.js": OWN, "page.css": OWN}
# A part of each file's URL, so that no page gets another release's file from a cache.
HASHES = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16]
          for name, folder in ASSETS.items()}
PAGE = re.sub('(?<="/docs/)[^"]+', lambda name: f"{name[0]}?v={HASHES[name[0]]}",
              (OWN / "page.html").read_text())
# What Swagger UI needs and no more: its own files, and its icons, which are data: URLs.
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
          "img-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")


@blp.get("/")
@public
def home() -> BaseResponse:
    """Leads a browser to the docs, and gives a program the links."""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        response = redirect(url_for("docs.page", version="v1"))
        response.headers["Vary"] = "Accept"
        return response
    links = {"name": openapi.TITLE, "health": "/health", "versions": {
        version: {"base": f"/api/{version}", "docs": f"/api/{version}/docs",
                  "openapi": f"/api/{version}/openapi.json"}
        for version in current_app.extensions["apis"]
    }}
    return Response(json.dumps(links), content_type="application/json", headers={"Vary": "Accept"})


@blp.get("/api/<any(v1, v2):version>/openapi.json")
@public
def document(version: str) -> Response:
    """Read the OpenAPI 3.1 document of a version."""
    body = current_app.extensions["documents"][version]
    return tagged(body, etag_of(body), PUBLIC)


@blp.get("/api/<any(v1, v2):version>/docs")
@public
def page(version: str) -> Response:
    """Open a version's document as a page for people."""
    return Response(PAGE.replace("{version}", version), content_type="text/html; charset=utf-8",
                    headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})


@blp.get("/docs/<any({}):name>".format(", ".join(f'"{name}"' for name in ASSETS)))
@public
def asset(name: str) -> Response:
    """A file of the docs page, to be kept only under the URL that is of its content."""
    kept = request.args.get("v") == HASHES[name]
    return send_from_directory(ASSETS[name], name, max_age=3600 if kept else None)


@blp.get("/problems/<code>")
@public
def problem(code: str) -> Response:
    """Say what an error's code means, and what to do."""
    if code not in PROBLEMS:
        raise Problem("not_found")
    status, title, meaning = PROBLEMS[code]
    text = json.dumps({"code": code, "status": status, "title": title, "meaning": meaning})
    return Response(text, content_type="application/json",
                    headers={"Cache-Control": "public, max-age=3600"})


def init_app(app: Flask) -> None:
    """Make every version's document once."""
    app.extensions["documents"] = {
        version: json.dumps(openapi.document(app, version)).encode()
        for version in app.extensions["apis"]
    }
