"""Holds every answer that a test receives to the OpenAPI document of its version.

What was seen is kept in SEEN. A run of all tests fails for a documented response that none of them
received: each process of the run hands its SEEN to the first one, which compares and tells.
"""
import functools
import json
import re
from pathlib import Path

import pytest
from openapi_schema_validator import OAS31Validator

from extensions.http.headers import SECURITY

SEEN = set()  # (version, operationId, status, problem code or "")
GOLDEN = Path(__file__).with_name("golden")

# Headers that an answer may have without its document saying so: HTTP's own, and CORS's.
COMMON = {name.lower() for name in SECURITY} | {
    "content-type", "content-length", "content-encoding", "vary", "allow", "date", "connection",
    "server", "transfer-encoding", "strict-transport-security", "access-control-allow-credentials",
    "access-control-expose-headers",
}


class Contract:
    """The finished documents of an app, asked for each response."""

    def __init__(self, app):
        self.documents = {
            version: json.loads(text) for version, text in app.extensions["documents"].items()
        }
        self.paths = {
            version: [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path)
                      for path in sorted(document["paths"], key=lambda path: path.count("{"))]
            for version, document in self.documents.items()
        }

    def check(self, method, path, status, headers, body):
        """Raise AssertionError unless the documents have this answer: status, headers, body."""
        if status >= 400:
            check_problem(status, headers, body, method)
        for version in self.documents:
            if operation := self.operation(version, method, path):
                self.check_answer(version, operation, f"{method} {path} -> {status}", method,
                                  status, headers, body)

    def operation(self, version, method, path):
        """What a version's document says of a request, or None."""
        paths = self.documents[version]["paths"]
        name = "get" if method == "HEAD" else method.lower()
        return next((paths[template].get(name) for pattern, template in self.paths[version]
                     if pattern.fullmatch(path)), None)

    def check_answer(self, version, operation, where, method, status, headers, body):
        assert str(status) in operation["responses"], f"{where} is not documented: {body[:300]}"
        response = self.resolve(version, operation["responses"][str(status)])
        self.check_headers(version, response.get("headers", {}), where, headers)
        content, code = response.get("content"), ""
        kind = headers.get("Content-Type", "").partition(";")[0]
        assert kind in (content or [""]), f"{where} is '{kind}', not {list(content or ())}"
        if not content or method == "HEAD":
            assert not body, f"{where} has a body"
        elif "Content-Encoding" not in headers:
            self.check_body(version, kind, content[kind]["schema"], where, body)
        if status >= 400 and body:
            code = json.loads(body)["code"]
            assert code in content[kind]["examples"], f"{where}: {code} is not documented"
        SEEN.add((version, operation["operationId"], str(status), code))

    def check_body(self, version, kind, schema, where, body):
        if kind == "text/csv":
            names = body.decode().partition("\r\n")[0].split(",")
            assert names == list(self.documents[version]["components"]["schemas"]["Record"][
                "properties"]), f"{where} has the columns {names}"
        lines = [body] if kind in ("application/json", "application/problem+json") else []
        if kind == "application/x-ndjson":
            schema, lines = {"$ref": "#/components/schemas/Record"}, body.splitlines()
        for line in lines:
            for error in self.validator(version, json.dumps(schema)).iter_errors(json.loads(line)):
                raise AssertionError(f"{where}: {error.message} at {list(error.absolute_path)}")

    def check_headers(self, version, documented, where, headers):
        for name, header in documented.items():
            header = self.resolve(version, header)
            value = headers.get(name)
            if value is None:
                assert not header.get("required"), f"{where} lacks {name}"
                continue
            if header["schema"]["type"] == "integer":
                value = int(value)
            self.validator(version, json.dumps(header["schema"])).validate(value)
        strange = {name.lower() for name, _ in headers.items()} - COMMON
        strange -= {name.lower() for name in documented}
        assert not strange, f"{where} has headers that aren't documented: {strange}"

    @functools.lru_cache(maxsize=2000)  # noqa: B019 - one Contract a process
    def validator(self, version, schema):
        document = self.documents[version]
        return OAS31Validator(json.loads(schema) | {"components": document["components"]},
                              format_checker=OAS31Validator.FORMAT_CHECKER)

    def resolve(self, version, node):
        while "$ref" in node:
            found = self.documents[version]
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node


def check_problem(status, headers, body, method="GET"):
    """Raise AssertionError unless an error has the one shape."""
    assert headers["Content-Type"].startswith("application/problem+json"), headers["Content-Type"]
    assert headers["X-Request-ID"]
    if method == "HEAD" or "Content-Encoding" in headers:
        return
    problem = json.loads(body)
    assert problem["status"] == status
    assert problem["type"] == f"/problems/{problem['code']}"
    assert problem["request_id"] == headers["X-Request-ID"]
    assert problem["title"] == problem["error"]
    assert problem["detail"]
    assert problem["instance"].startswith("/")
    for detail in problem.get("details", ()):
        assert set(detail) == {"field", "in", "message"}


def documented(version):
    """(version, operationId, status, problem code or "") of every response of a document."""
    document = json.loads((GOLDEN / f"{version}.json").read_text())
    for item in document["paths"].values():
        for method, operation in item.items():
            if method == "parameters":
                continue
            for status, response in operation["responses"].items():
                if "$ref" in response:
                    response = document["components"]["responses"][response["$ref"].split("/")[-1]]
                problem = response.get("content", {}).get("application/problem+json")
                for code in problem["examples"] if problem else [""]:
                    yield version, operation["operationId"], status, code


def never_seen():
    """What the stored documents promise and no test has received, sorted."""
    versions = sorted(file.stem for file in GOLDEN.glob("*.json"))
    return sorted({answer for version in versions for answer in documented(version)} - SEEN)


class Guard:
    """A pytest plugin: fails a run of all tests that has not seen all documented answers."""

    def __init__(self):
        self.missing = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A worker of pytest-xdist has ended: take over what it saw."""
        SEEN.update(map(tuple, getattr(node, "workeroutput", {}).get("seen", ())))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workeroutput"):  # this is such a worker
            session.config.workeroutput["seen"] = sorted(SEEN)
        elif session.exitstatus == pytest.ExitCode.OK and is_whole(session.config):
            self.missing = never_seen()
            if self.missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.missing:
            terminalreporter.section("documented, but seen by no test", red=True)
        for version, operation, status, code in self.missing:
            terminalreporter.line(f"{version} {operation} {status} {code}")


def is_whole(config):
    """Whether a run has all the tests that run by default."""
    chosen, root = config.option, config.rootpath
    here = config.invocation_params.dir
    return all((here / arg).resolve() in (root, root / "tests") for arg in config.args) and not (
        chosen.keyword or chosen.deselect or chosen.ignore or chosen.collectonly
        or getattr(chosen, "lf", False) or chosen.markexpr not in ("", "not long")
    )
