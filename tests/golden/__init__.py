"""The documents as clients know them, and what would break those clients.

``python -m tests.golden`` stores the documents of now, which the tests then hold the API to.
"""
import json
from pathlib import Path

from app import create_app

FOLDER = Path(__file__).parent
LEAST = {"minimum": "less than", "minLength": "shorter than", "minItems": "fewer than",
         "minProperties": "fewer fields than"}
MOST = {"maximum": "more than", "maxLength": "longer than", "maxItems": "more than"}


def documents():
    """Every version's document, as an app in development serves it. Needs no server."""
    app = create_app(APP_ENV="development", DATABASE_URL="postgresql://", REDIS_URL="redis://",
                     JWT_SECRET_KEY="k" * 40, LOG_LEVEL="ERROR")
    return {version: json.loads(text) for version, text in app.extensions["documents"].items()}


def stored(version):
    return json.loads((FOLDER / f"{version}.json").read_text())


def store(version, document):
    text = json.dumps(document, indent=1, ensure_ascii=False)
    (FOLDER / f"{version}.json").write_text(f"{text}\n")


def breaking(old, new):
    """A sentence for everything in which ``new`` fails a client that was made for ``old``."""
    for path, item in old["paths"].items():
        for method in filter("parameters".__ne__, item):
            where = f"{method.upper()} {path}"
            if method not in new["paths"].get(path, {}):
                yield f"{where} is gone."
            else:
                yield from _Change(where, old, new).operation(item, new["paths"][path], method)


class _Change:
    """What became of one operation. ``where`` begins every sentence."""

    def __init__(self, where, old, new):
        self.where, self.old, self.new = where, old, new

    def operation(self, before, after, method):
        yield from self.parameters(self.parameters_of(self.old, before, method),
                                   self.parameters_of(self.new, after, method))
        before, after = before[method], after[method]
        if before["operationId"] != after["operationId"]:
            yield (f"{self.where} is called {after['operationId']} now, "
                   f"not {before['operationId']}.")
        if {} in before["security"] and {} not in after["security"]:
            yield f"{self.where} needs a token now."
        yield from self.body(before.get("requestBody", {}), after.get("requestBody", {}))
        for status, response in before["responses"].items():
            if status not in after["responses"]:
                yield f"{self.where} does not answer {status} any more."
            else:
                yield from self.response(status, _resolve(self.old, response),
                                         _resolve(self.new, after["responses"][status]))

    @staticmethod
    def parameters_of(document, item, method):
        found = [_resolve(document, parameter) for parameter in
                 [*item.get("parameters", []), *item[method].get("parameters", [])]]
        return {(parameter["in"], parameter["name"]): parameter for parameter in found}

    def parameters(self, before, after):
        for (place, name), parameter in before.items():
            if (place, name) not in after:
                yield f"{self.where} does not take the {place} parameter {name} any more."
            else:
                yield from self.schema(f"the {place} parameter {name}", parameter["schema"],
                                       after[place, name]["schema"], sent=True)
        for (place, name), parameter in after.items():
            if parameter.get("required") and not before.get((place, name), {}).get("required"):
                yield f"{self.where} requires the {place} parameter {name} now."

    def body(self, before, after):
        if after.get("required") and not before.get("required"):
            yield f"{self.where} requires a body now."
        for kind, media in before.get("content", {}).items():
            if kind not in after.get("content", {}):
                yield f"{self.where} does not take {kind} any more."
            else:
                yield from self.schema("the body", media["schema"],
                                       after["content"][kind]["schema"], sent=True)

    def response(self, status, before, after):
        for kind, media in before.get("content", {}).items():
            if kind not in after.get("content", {}):
                yield f"{self.where} does not give {kind} with {status} any more."
            else:
                yield from self.schema(f"the answer {status}", media["schema"],
                                       after["content"][kind]["schema"], sent=False)
        for name, header in before.get("headers", {}).items():
            header = _resolve(self.old, header)
            kept = _resolve(self.new, after.get("headers", {}).get(name, {}))
            if header.get("required") and not kept.get("required"):
                yield f"{self.where} does not always send {name} with {status} any more."

    def schema(self, what, before, after, sent):
        """What a client that sends (or is sent) ``before`` can't do with ``after``."""
        before, after = _resolve(self.old, before), _resolve(self.new, after)
        where = f"{self.where}: {what}"
        old, new = _types(before), _types(after)
        if sent and old - new:
            yield f"{where} can not be {_or(old - new)} any more."
        if not sent and new - old:
            yield f"{where} can be {_or(new - old)} now."
        if sent:
            yield from self.bounds(where, before, after)
        yield from self.fields(what, before, after, sent)
        if "items" in before and "items" in after:
            yield from self.schema(f"an item of {what}", before["items"], after["items"], sent)

    @staticmethod
    def bounds(where, before, after):
        for word, text in LEAST.items():
            if after.get(word, 0) > before.get(word, 0):
                yield f"{where} can not be {text} {after[word]} any more."
        for word, text in MOST.items():
            if after.get(word, float("inf")) < before.get(word, float("inf")):
                yield f"{where} can not be {text} {after[word]} any more."
        if "pattern" in after and after["pattern"] != before.get("pattern"):
            yield f"{where} has to match {after['pattern']} now."
        allowed = after.get("enum", before.get("enum", []))
        if lost := [value for value in before.get("enum", allowed) if value not in allowed]:
            yield f"{where} can not be {_or(map(str, lost))} any more."
        if "enum" in after and "enum" not in before:
            yield f"{where} has to be one of {_or(map(str, allowed))} now."

    def fields(self, what, before, after, sent):
        old, new = before.get("properties", {}), after.get("properties", {})
        for name, field in old.items():
            if name not in new:
                yield f"{self.where}: {what} has no field {name} any more."
            else:
                yield from self.schema(f"{name} of {what}", field, new[name], sent)
        needed, need = before.get("required", []), after.get("required", [])
        if sent and (more := [name for name in need if name not in needed]):
            yield f"{self.where}: {what} requires {_or(more, 'and')} now."
        if not sent and (less := [name for name in needed if name in new and name not in need]):
            yield f"{self.where}: {what} does not always have {_or(less, 'and')} any more."


def _types(schema):
    kinds = schema.get("type", [])
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    return kinds | {"integer"} if "number" in kinds else kinds


def _or(words, last="or"):
    return f" {last} ".join(sorted(words))


def _resolve(document, node):
    while "$ref" in node:
        found = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node
