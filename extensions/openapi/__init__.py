"""The OpenAPI 3.1 documents: flask-smorest's, finished with what holds for every operation.

Error responses, headers and operation ids are derived from what a view's decorators already say
(who may call, what comes in, which id is in the path). ``@raises`` names the other errors.
"""
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flask import Flask
from flask_smorest import Api
from marshmallow import fields

from extensions.http.arguments import Id, UserId
from extensions.openapi.examples import EXAMPLES, PARAMETERS
from extensions.openapi.headers import HEADERS, LIMITS, REFUSAL, SUNSET
from schemas import fields as own
from schemas.health import Health, Liveness, Readiness
from schemas.moments import Moment
from schemas.problems import PROBLEMS, Meaning, Problem

TITLE = "Shopfront"
JSON, PROBLEM = "application/json", "application/problem+json"
FORM = "application/x-www-form-urlencoded"
INTRODUCTION = Path(__file__).parents[2] / "blueprints" / "docs_page" / "introduction.md"
DEMO = """
## Demo accounts

In development the shop starts full of demo data, or `flask db seed` fills it. Log in as
`admin@example.com`, who is an administrator, or as `user1@example.com`, `user2@example.com`, … The
password of each is `password123`.
"""

# Answers without an ETag: secrets and momentary states aren't stored, a stream isn't known ahead.
UNTAGGED = {"Session", "Tokens", "Accepted", "TransactionsReport", "Health", "Liveness",
            "Readiness", "Meaning"}


# The patterns of a Moment, from 1970 to 2199.
DATE = "(19[7-9]|20[0-9]|21[0-9])[0-9]-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
TIME = (r"T([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{1,6})?)?"
        "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])?")

def spec_kwargs(version: str) -> dict[str, str]:
    return {"title": TITLE, "version": f"{version[1:]}.0.0", "openapi_version": "3.1.0"}


# What a version's document lists beside its blueprints: path -> what GET answers.
SERVICE = {
    "/api/{version}/openapi.json": {JSON: {"schema": {
        "type": "object", "required": ["openapi", "info", "paths"]}}},
    "/api/{version}/docs": {"text/html": {"schema": {"type": "string", "maxLength": 100000}}},
    "/health": Health, "/health/live": Liveness, "/health/ready": Readiness,
    "/problems/{code}": Meaning,
}


def prepare(api: Api) -> None:
    """Teach a flask-smorest Api the shop's own types. Call it before registering blueprints."""
    api.DEFAULT_ERROR_RESPONSE_NAME = None
    api.register_field(own.Money, "string", None)
    api.register_field(Moment, "string", None)
    api.register_converter(Id, lambda converter: dict(Id.schema))
    api.register_converter(UserId, lambda converter: {
        "anyOf": [dict(Id.schema), {"type": "string", "const": "me"}]})
    api.ma_plugin.converter.add_attribute_function(_describe)
    for schema in (Problem, Meaning, Health, Liveness, Readiness):
        api.spec.components.schema(schema.__name__, schema=schema)


def _describe(converter, field, ret, **_):
    """What the shop's own field types accept, in JSON Schema's words."""
    if isinstance(field, own.Money):
        types = ["string", "number"] + (["null"] if field.allow_none else [])
        return {"type": types, "pattern": r"^[0-9]{1,10}(\.[0-9]{1,2})?$", "maxLength": 13,
                "minimum": 0, "maximum": 9999999999.99, "examples": ["119.23"]}
    if isinstance(field, Moment):
        return {"type": "string", "maxLength": 40, "pattern": f"^{DATE}({TIME})?$"}
    if isinstance(field, own.Email):
        return {"maxLength": 254, "minLength": 3}
    if isinstance(field, own.Line | own.Search):
        return {"pattern": _line_pattern(field, ret.get("minLength", 0))}
    if isinstance(field, fields.String) and not field.dump_only and "enum" not in ret:
        return {"pattern": r"^[^\u0000]*$"}
    return {}


def _line_pattern(field, low):
    """A regular expression for text of ``low`` characters or more, white space around it aside."""
    refused = getattr(field, "forbidden", own.CONTROL).pattern[1:-1]
    black = rf"[^{refused}\s][^{refused}]*"
    return rf"^[^{refused}]*" + (black * low if isinstance(field, own.Line) else "") + "$"


def document(app: Flask, version: str) -> dict:
    """The finished document of a version."""
    spec = copy.deepcopy(app.extensions["apis"][version].spec.to_dict())
    spec["info"] |= _info(app, version)
    spec["servers"] = [{"url": "/", "description": "This server, local or in production",
                        "x-internal": False}]
    spec["tags"] = [tag | {"name": tag["name"].removeprefix(f"{version}_")}
                    for tag in spec["tags"]]
    spec["tags"].append({"name": "service", "description": "The service itself"})
    components = spec["components"]
    components |= _components()
    spec["paths"] = {_readable(path): item for path, item in spec["paths"].items()}
    for item in spec["paths"].values():
        for parameter in item.get("parameters", ()):
            parameter["name"] = parameter["name"].removesuffix("_id")
            _finish_parameter(parameter)
    for path, answer in SERVICE.items():
        spec["paths"][path.replace("{version}", version)] = {"get": _service(path, answer)}
    for path, method, view in operations(app, version):
        Operation(components, version, path, method, view, spec["paths"][path][method]).finish()
    _finish_schemas(spec)
    _drop_unused(spec)
    return spec


def _components():
    """What operations refer to: headers, parameters, the way to sign in."""
    components = {
        "headers": copy.deepcopy(HEADERS),
        "parameters": {name: {"name": name, "in": "header"} | PARAMETERS[name]
                       for name in ("If-Match", "If-None-Match", "Idempotency-Key",
                                    "X-Request-ID")},
        "responses": {},
        "securitySchemes": {"bearer": {
            "type": "http", "scheme": "bearer", "bearerFormat": "JWT",
            "description": "The `token` of `POST /auth/login`, checked as RFC8725 asks.",
        }},
    }
    for parameter in components["parameters"].values():
        _finish_parameter(parameter)
    return components


def _info(app, version):
    text = INTRODUCTION.read_text().replace("{version}", version)
    if app.config["APP_ENV"] == "development":
        text += DEMO
    return {"description": text, "license": {"name": "MIT", "identifier": "MIT"},
            "contact": {"name": TITLE, "url": "https://shopfront.example"}}


def operations(app: Flask, version: str) -> Iterator[tuple[str, str, Callable]]:
    """(path in the document, method, view function) of every operation of a version."""
    paths = app.extensions["apis"][version].spec.to_dict()["paths"]
    paths = paths | {path: {"get"} for path in SERVICE}
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:[^:<>]+:)?([^<>]+)>", r"{\1}", rule.rule)
        function = app.view_functions[rule.endpoint]
        for method in paths.get(path, ()):
            if method.upper() in (rule.methods or ()):
                view = getattr(getattr(function, "view_class", None), method, function)
                yield _readable(path).replace("{version}", version), method, view


def _readable(path):
    """A path with ``{product}`` where the route has ``{product_id}``."""
    return path.replace("_id}", "}")


def _service(path, answer):
    """The beginnings of a service route's operation."""
    content = answer if isinstance(answer, dict) else {JSON: {
        "schema": _reference("schemas", answer.__name__)}}
    named = [{"name": "code", "in": "path", "required": True}] if "{code}" in path else []
    return {"tags": ["service"], "parameters": named,
            "responses": {200: {"description": "OK", "content": copy.deepcopy(content)}}}


class Operation:
    """One operation: its place, the view behind it, and what the document says of it so far."""

    def __init__(self, components: dict, version: str, path: str, method: str, view: Any,
                 operation: dict) -> None:
        self.components, self.version, self.path = components, version, path
        self.method, self.view, self.operation = method, view, operation
        self.resource = operation["tags"][0].removeprefix(f"{version}_")
        self.public = view.access == "public"
        self.limited = path.startswith("/api/")
        self.deprecated = self.resource == "users" and version == "v1"
        self.idempotent = getattr(view, "idempotent", False)
        self.conditional = method in ("patch", "delete") and self.resource in (
            "users", "categories", "products")
        names = ["X-Request-ID", "Access-Control-Allow-Origin", *(LIMITS if self.limited else []),
                 *(SUNSET if self.deprecated else [])]
        self.headers = _headers(names)  # of every response
        if not self.limited:
            self.headers["RateLimit"] = _reference("headers", "Unlimited")

    def finish(self) -> None:
        operation = self.operation
        operation["tags"] = [self.resource]
        operation["operationId"] = _operation_id(self.method, self.view)
        operation["summary"] = (operation.get("summary") or self.view.__doc__.strip()).rstrip(".")
        operation["description"] = operation.get("description") or f"{operation['summary']}."
        operation["summary"] = operation["summary"].replace("`", "")  # plain text
        if self.view.access == "admin":
            operation["description"] += " For administrators."
        # An empty security requirement means no authentication; here it is the only alternative.
        operation["security"] = [{}] if self.public else [{"bearer": []}]
        if self.deprecated:
            operation["deprecated"] = True
        if "requestBody" in operation:
            self.finish_body()
        operation["responses"] = dict(sorted([*self.answers(), *self.problems()]))
        self.finish_parameters()

    def finish_body(self) -> None:
        body = self.operation["requestBody"]
        body["required"] = True
        json_body = body["content"][JSON]
        schema = self.components["schemas"][_shape(json_body)]
        json_body["example"] = EXAMPLES[_shape(json_body)]
        if self.method == "patch" and "required" not in schema:
            schema["minProperties"] = 1
        fields_ = schema["properties"]
        if all(field.get("type") not in (None, "object", "array") for field in fields_.values()):
            # Spelt out, so that a generated client can tell a form from a JSON body.
            form = schema | {"additionalProperties": False, "properties": {
                name: _in_form(field) for name, field in fields_.items()}}
            body["content"][FORM] = {"schema": form, "example": EXAMPLES[_shape(json_body)]}

    def finish_parameters(self) -> None:
        parameters = self.operation.setdefault("parameters", [])
        for parameter in parameters:
            _finish_parameter(parameter)
        sent = {"If-Match": self.conditional, "Idempotency-Key": self.idempotent,
                "If-None-Match": "304" in self.operation["responses"], "X-Request-ID": True}
        parameters += [_reference("parameters", name) for name, wanted in sent.items() if wanted]

    def answers(self) -> Iterator[tuple[str, dict]]:
        """(status, response) below 400."""
        for status, response in self.operation["responses"].items():
            if not str(status).startswith("2"):
                continue  # flask-smorest's own error responses
            content = response.get("content", {})
            shape = _shape(content.get(JSON, {}))
            if shape:
                content[JSON]["example"] = EXAMPLES[shape]
            if shape == "TransactionsReport":
                content |= _streams(content[JSON]["example"]["data"])
            headers = self.headers | _headers(self.answer_headers(int(status), content, shape))
            yield str(status), response | {"headers": headers}
            if "ETag" in headers and self.method == "get":
                yield "304", {"description": "Not Modified: you have it", "headers": headers}

    def answer_headers(self, status: int, content: dict, shape: str) -> Iterator[str]:
        """The names of the headers that only this answer has."""
        if content:
            yield "Cache-Control"
        if JSON in content and shape not in UNTAGGED:
            yield "ETag"
            if self.method == "get" and self.public and shape:
                yield "X-Cache"
        if shape.endswith("Page"):
            yield "Link"
        if shape == "TransactionsReport":
            yield from ("Content-Disposition", "Report-Rows", "Report-Amount")
        if status == 201:
            yield "Location"
            if self.idempotent:
                yield "Idempotent-Replayed"

    def problems(self) -> Iterator[tuple[str, dict]]:
        """(status, response) from 400 on: one for all codes that share a status."""
        by_status: dict[int, list[str]] = {}
        for code in sorted(self.codes()):
            by_status.setdefault(PROBLEMS[code][0], []).append(code)
        kind = ("" if self.limited else "Unlimited") + ("V1Users" if self.deprecated else "")
        for status, codes in by_status.items():
            key = "".join(word.title().replace("_", "") for word in codes) + kind
            headers = self.headers | _headers(["Cache-Control", *REFUSAL.get(status, [])])
            if "request_in_progress" in codes:
                headers["Retry-After"] = _reference("headers", "Retry-Twin")
            self.components["responses"].setdefault(key, {
                "description": " ".join(f"`{code}`: {PROBLEMS[code][2]}" for code in codes),
                "headers": headers,
                "content": {PROBLEM: {
                    "schema": _reference("schemas", "Problem"),
                    "examples": {code: {"value": problem_example(code)} for code in codes},
                }},
            })
            yield str(status), _reference("responses", key)

    def codes(self) -> set[str]:
        """Every problem that the operation can answer."""
        codes = set(getattr(self.view, "problems", ()))
        if self.limited:
            codes.add("rate_limited")
        if "{" in self.path:
            codes.add("not_found")
        if self.resource == "service":
            return codes
        codes |= {"bad_request", "validation_failed", "internal_error", "unavailable", "timeout"}
        if not self.public:
            codes |= {"authentication_required", "token_expired", "token_revoked"}
        if self.view.access == "admin":
            codes.add("forbidden")
        if "requestBody" in self.operation:
            codes |= {"malformed_json", "unsupported_media_type", "payload_too_large",
                      "request_timeout"}
        if self.conditional:
            codes |= {"precondition_failed", "precondition_required"}
        if self.idempotent:
            codes |= {"request_in_progress", "idempotency_key_reused"}
        if self.deprecated:
            codes.add("gone")
        return codes


PLURALS = {"Users": "User", "Categories": "Category", "Products": "Product",
           "Transactions": "Transaction", "Sessions": "Session"}
OPERATION_IDS = {
    "Password": "changePassword", "Forgot": "forgotPassword", "Verify": "verifyEmail",
    "Refund": "refundTransaction", "health": "getHealth", "live": "getLiveness",
    "ready": "getReadiness", "document": "getDocument", "page": "getDocsPage",
    "problem": "explainProblem",
}


def _operation_id(method, view):
    name = view.__qualname__.partition(".")[0]
    if view.__module__.endswith("reports"):
        return f"report{name}"
    if name in OPERATION_IDS:
        return OPERATION_IDS[name]
    if name.endswith("ById"):
        verb = {"get": "get", "patch": "update", "delete": "delete"}[method]
        return verb + name.removesuffix("ById")
    if name in PLURALS:
        return f"list{name}" if method == "get" else f"create{PLURALS[name]}"
    return name[0].lower() + name[1:]


def _streams(records):
    """A report's other media types."""
    csv = [",".join(records[0]), *(",".join(map(str, record.values())) for record in records), ""]
    return {
        kind: {"schema": {"type": "string", "maxLength": 2**53 - 1, "description": text},
               "example": example}
        for kind, text, example in (
            ("application/x-ndjson", "A Record a line.", json.dumps(records[0]) + "\n"),
            ("text/csv", "A line of names, then a Record a line (RFC 4180).", "\r\n".join(csv)),
        )
    }


def problem_example(code: str) -> dict:
    status, title, meaning = PROBLEMS[code]
    return {"type": f"/problems/{code}", "title": title, "status": status, "detail": meaning,
            "instance": "/api/v1/products", "code": code, "request_id": "0f9c2b7e", "error": title}


def _finish_schemas(spec):
    schemas = spec["components"]["schemas"]
    answers = [operation["responses"] for item in spec["paths"].values()
               for method, operation in item.items() if method != "parameters"]
    outputs, found = set(), _refers_to(answers) | {"Problem"}
    while found:
        outputs |= found
        found = {inner for name in found for inner in _refers_to(schemas[name])} - outputs
    for name, schema in schemas.items():
        schema["additionalProperties"] = False
        if name in EXAMPLES:
            schema["examples"] = [EXAMPLES[name]]
        if name in outputs:
            schema.setdefault("required", list(schema["properties"]))
    for node in _nodes(spec):
        if "integer" in (node.get("type") or ()) and "maximum" in node:
            node["format"] = "int32" if node["maximum"] < 2**31 else "int64"


def _refers_to(node):
    return set(re.findall(r"#/components/schemas/(\w+)", json.dumps(node)))


def _nodes(node):
    """Every object of a document."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node:
        if isinstance(inner, dict | list):
            yield from _nodes(inner)


def _drop_unused(spec):
    components = spec["components"]
    for kind in ("responses", "parameters", "headers", "schemas"):
        text = json.dumps(spec)
        components[kind] = {name: part for name, part in components[kind].items()
                            if f'"#/components/{kind}/{name}"' in text}


def _finish_parameter(parameter):
    place = "{%s}" if parameter["in"] == "path" else "%s"
    for word, value in PARAMETERS.get(place % parameter["name"], {}).items():
        parameter.setdefault(word, value)
    schema = parameter["schema"] = _as_text(parameter["schema"])
    if not parameter.get("required") and "example" in parameter:
        # The docs page pre-fills a parameter from its own example: good for required ones only.
        schema["examples"] = [parameter.pop("example")]


def _in_form(schema):
    """A field's schema in a form, where an empty value stands for null."""
    if "null" not in schema["type"]:
        return _as_text(schema)
    kinds = {"type": ["integer", "string"]} if "integer" in schema["type"] else {}
    empty = {"pattern": f"^$|{schema['pattern']}"} if "pattern" in schema else {"maxLength": 0}
    return _as_text(schema) | kinds | empty | {"minLength": 0, "description": "Empty: none."}


def _as_text(schema):
    """A schema for a value in a query string or a form: text, and never null."""
    schema = dict(schema)
    if isinstance(schema.get("type"), list):
        numeric = {"null", "number"} if "string" in schema["type"] else {"null"}
        kinds = [kind for kind in schema["type"] if kind not in numeric]
        # An integer stays in a list: OWASP's ruleset flags a plain "integer" for a `user_id`.
        schema["type"] = kinds if kinds == ["integer"] else kinds[0]
    if schema.get("default", ...) is None:
        del schema["default"]
    if None in schema.get("enum", ()):
        schema["enum"] = [value for value in schema["enum"] if value is not None]
    return schema


def _shape(media):
    """The name of the schema of a media type; empty if it has none."""
    return media.get("schema", {}).get("$ref", "").rpartition("/")[2]


def _headers(names):
    return {name: _reference("headers", name) for name in names}


def _reference(kind, name):
    return {"$ref": f"#/components/{kind}/{name}"}
