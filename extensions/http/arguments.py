"""Request parsing: strict JSON, forms and query strings, validated by a schema.

``Blueprint`` is flask-smorest's, with this parser in place of webargs': it refuses unknown fields,
repeated ones, and what isn't valid text.
"""
import functools
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qsl

import flask_smorest
from flask import Flask, request
from marshmallow import RAISE, Schema, ValidationError, fields
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.routing import BaseConverter
from werkzeug.routing import ValidationError as NoMatch

from extensions.http.errors import Problem

MAX_BODY = 10 * 1024 * 1024
MAX_FIELDS = 200
MAX_QUERY = 8192


class Id(BaseConverter):
    """A positive 64-bit integer; no other text matches the route."""

    regex = "[1-9][0-9]{0,18}"
    schema = {"type": "integer", "format": "int64", "minimum": 1, "maximum": 2**63 - 1}

    def to_python(self, value: str) -> int:
        number = int(value)
        if number > 2**63 - 1:
            raise NoMatch
        return number


class UserId(Id):
    """An id, or ``me``."""

    regex = "me|[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> Any:
        return value if value == "me" else super().to_python(value)


def init_app(app: Flask) -> None:
    app.url_map.converters.update(id=Id, user_id=UserId)
    app.url_map.merge_slashes = False  # a wrong path is a 404, not a redirect
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY  # the door refuses a larger body unread


class Arguments:
    """flask-smorest's parser interface: ``use_args`` and the status of a refusal."""

    DEFAULT_VALIDATION_STATUS = 422

    def use_args(self, schema: Schema | type[Schema], *, location: str, **_: object) -> Callable:
        schema = schema() if isinstance(schema, type) else schema

        # The same few query strings recur, and always parse to the same arguments.
        @functools.lru_cache(maxsize=1024)
        def parsed(raw):
            return load(schema, query(schema), "query")

        def read():
            if location == "query":
                return dict(parsed(request.query_string))
            return load(schema, body(schema))

        def decorate(view):
            @functools.wraps(view)
            def wrapper(*args, **kwargs):
                return view(*args, read(), **kwargs)
            return wrapper
        return decorate


class Blueprint(flask_smorest.Blueprint):
    ARGUMENTS_PARSER = Arguments()


def load(schema: Schema, data: Any, where: str = "body") -> dict:
    """``schema.load`` that raises a Problem naming every field that is not valid."""
    try:
        return schema.load(data, unknown=RAISE)
    except ValidationError as error:
        details = list(_flatten(error.normalized_messages(), where))
        count = "1 field is" if len(details) == 1 else f"{len(details)} fields are"
        raise Problem("validation_failed", f"{count} not valid.", details) from None


def query(schema: Schema | None = None) -> dict:
    """The query string as a dict; only fields of a List type may repeat."""
    raw = request.query_string
    if not raw:
        return {}
    if len(raw) > MAX_QUERY:
        raise Problem("bad_request", "The query string is too long.")
    return _pairs(raw, schema, "query")


def takes_no_query(view: Callable) -> bool:
    """Whether an API view declares no query parameters, so that any must be refused."""
    declared = getattr(view, "_apidoc", None)
    return declared is not None and not any(
        part["in"] == "query" for part in declared.get("arguments", {}).get("parameters", ())
    )


def refuse_query() -> None:
    """For an operation without query parameters: a 422 that names each one that was sent."""
    load(Schema(), query(), "query")


def body(schema: Schema) -> Any:
    """The request body: parsed JSON, which should be a dict, or a form as a dict."""
    try:
        raw = request.get_data()
        # werkzeug stops reading a chunked body at the limit, and doesn't say if there is more.
        if len(raw) == MAX_BODY and request.environ["wsgi.input"].read(1):
            raise RequestEntityTooLarge
    except HTTPException:
        raise
    except Exception:  # the server's own errors, for a body whose framing is broken
        raise Problem("bad_request", "The body could not be read to its end.") from None
    kind = request.mimetype
    if kind == "application/json" or (not raw and not kind):
        return parse_json(raw) if raw.strip() else {}
    if kind == "application/x-www-form-urlencoded" and not getattr(schema, "json_only", False):
        return _pairs(raw, schema, "body")
    raise Problem("unsupported_media_type", headers={"Accept": "application/json"})


def parse_json(raw: bytes) -> Any:
    """JSON text as Python data, with Decimal for floats. Raises malformed_json.

    RFC 8259 leaves repeated names, NaN and lone surrogates to the parser; this one refuses them.
    """
    try:
        data = json.loads(
            raw.decode(), object_pairs_hook=_unique, parse_float=Decimal, parse_constant=_refuse
        )
        if b"\\u" in raw:
            _check_text(json.dumps(data, ensure_ascii=False, default=str))
        return data
    except RecursionError:
        raise Problem("malformed_json", "The body is nested too deeply.") from None
    except (ValueError, ArithmeticError) as why:  # UnicodeError and JSONDecodeError are ValueErrors
        detail = str(why) if isinstance(why, _Refused) else "The body is not valid JSON in UTF-8."
        raise Problem("malformed_json", detail) from None


class _Refused(ValueError):
    pass


def _unique(pairs):
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("A name stands twice in one JSON object.")
    return found


def _refuse(constant):
    raise _Refused(f"{constant} is not JSON.")


def _check_text(text):
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):  # as json.dumps writes it
        raise _Refused("U+0000 is not allowed in text.")
    text.encode()  # raises for a lone surrogate


def _pairs(raw, schema, where):
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
        if b"%00" in raw:
            raise Problem("bad_request", "U+0000 is not allowed in text.")
    except (ValueError, UnicodeError):
        raise Problem("bad_request", f"The {where} is not valid form encoding in UTF-8.") from None
    known = schema.fields if schema is not None else {}
    found: dict[str, Any] = {}
    twice = []
    for name, value in pairs:
        field = known.get(name)
        if isinstance(field, fields.List):
            found.setdefault(name, []).append(value)
        elif name in found:
            twice.append((name, where, "Given more than once."))
        else:
            found[name] = _typed(field, value) if where == "body" else value
    if twice:
        raise Problem("validation_failed", f"{len(twice)} fields are given twice.", twice)
    return found


def _typed(field, value):
    """A form field's text, converted to the type that JSON would have."""
    if isinstance(field, fields.Integer) and re.fullmatch("-?[0-9]{1,19}", value):
        return int(value)
    return None if field is not None and field.allow_none and value == "" else value


def _flatten(messages, where, prefix=""):
    for name, inner in messages.items():
        path = f"{prefix}{name}"
        if isinstance(inner, dict):
            yield from _flatten(inner, where, f"{path}.")
        else:
            for message in inner if isinstance(inner, list) else [inner]:
                yield path.removesuffix("._schema").replace("_schema", where), where, str(message)
