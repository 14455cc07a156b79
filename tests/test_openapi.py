"""The OpenAPI documents: that they are valid, whole and bounded, and break no client unawares."""
import copy
import json
import re
import subprocess
from types import SimpleNamespace

import pytest
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests import clients, contract, golden
from tests.golden import breaking

VERSIONS = ["v1", "v2"]


@pytest.fixture(scope="module")
def documents():
    return golden.documents()


@pytest.fixture(params=VERSIONS)
def document(request, documents):
    return documents[request.param]


def operations(document):
    """(where, operation) of everything in a document."""
    return [(f"{method.upper()} {path}", operation) for path, item in document["paths"].items()
            for method, operation in item.items() if method != "parameters"]


def nodes(node, where="#"):
    """(where, object) of every object in a document, but for those in examples."""
    if isinstance(node, dict):
        yield where, node
        node = {word: inner for word, inner in node.items() if not word.startswith("example")}
    for word, inner in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(inner, dict | list):
            yield from nodes(inner, f"{where}/{word}")


def test_it_is_valid_openapi_3_1(document):
    assert document["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(document).validate()


def test_every_operation_says_what_it_is_and_who_may_call_it(document):
    for where, operation in operations(document):
        for word in ("operationId", "summary", "description", "tags", "security", "responses"):
            assert operation[word], f"{where} has no {word}"


def test_operation_ids_are_unique(document):
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def test_both_versions_call_the_same_operations_the_same(documents):
    first, second = ([operation["operationId"] for _, operation in operations(document)]
                     for document in documents.values())
    assert first == second


def test_every_route_is_listed(app, documents):
    routes = {
        (method, re.sub(r"<(?:[^:<>]+:)?([^<>]+?)(_id)?>", r"{\1}", rule.rule).replace(
            "{version}", version))
        for rule in app.url_map.iter_rules() for version in VERSIONS
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if rule.rule.startswith(("/api/", "/health", "/problems"))
    }
    listed = {tuple(where.split(" ")) for document in documents.values()
              for where, _ in operations(document)}
    assert routes == listed


def test_every_error_is_a_problem(document):
    for where, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                content = golden._resolve(document, response)["content"]
                assert list(content) == ["application/problem+json"], where
                assert content["application/problem+json"]["schema"] == {
                    "$ref": "#/components/schemas/Problem"}


def test_everything_has_bounds(document):
    for where, node in nodes(document):
        kinds = node.get("type", ())
        kinds = {kinds} if isinstance(kinds, str) else set(kinds) if isinstance(
            kinds, list) else set()
        if "string" in kinds:
            assert node.keys() & {"maxLength", "enum", "const"}, where
        if kinds & {"integer", "number"}:
            assert {"minimum", "maximum"} <= node.keys(), where
        if "array" in kinds:
            assert "maxItems" in node, where
        if "object" in kinds and where.startswith("#/components/schemas"):
            assert node["additionalProperties"] is False, where


def test_every_example_fits_its_schema(document):
    count = 0
    for where, node in nodes(document):
        schema = node.get("schema", node)
        examples = [node["example"]] if "example" in node else []
        examples += node.get("examples", []) if isinstance(node.get("examples"), list) else [
            example["value"] for example in node.get("examples", {}).values()]
        validator = OAS31Validator(schema | {"components": document["components"]},
                                   format_checker=OAS31Validator.FORMAT_CHECKER)
        for example in examples:
            assert not [error.message for error in validator.iter_errors(example)], where
            count += 1
    assert count > 100


def test_every_body_and_every_json_answer_has_an_example(document):
    for where, node in nodes(document):
        if "application/json" in node and "$ref" in node["application/json"]["schema"]:
            assert "example" in node["application/json"], where


def test_parameters_say_what_they_are(document):
    for where, node in nodes(document):
        if "in" in node and "name" in node:
            assert node.get("description") or node["schema"].get("description"), where


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_the_document_that_clients_know(version, documents):
    before, after = golden.stored(version), documents[version]
    broken = list(breaking(before, after))
    accept = "`python -m tests.golden` accepts it."
    assert not broken, "\n".join([f"This breaks clients of {version}:", *broken, accept])
    assert before == after, f"The document of {version} has changed. {accept}"


def changed(documents, change):
    """What the change of a copy of version 1's document breaks."""
    after = copy.deepcopy(documents["v1"])
    change(after["paths"], after["components"]["schemas"])
    return list(breaking(documents["v1"], after))


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda paths, _: paths.pop("/api/v1/reports/sales"), "GET /api/v1/reports/sales is gone."),
    (lambda paths, _: paths["/api/v1/products"].pop("post"), "POST /api/v1/products is gone."),
    (lambda paths, _: paths["/api/v1/products"]["get"].update(operationId="products"),
     "GET /api/v1/products is called products now, not listProducts."),
    (lambda paths, _: paths["/api/v1/products"]["get"].update(security=[{"bearer": []}]),
     "GET /api/v1/products needs a token now."),
    (lambda paths, _: paths["/api/v1/users"]["post"]["responses"].pop("201"),
     "POST /api/v1/users does not answer 201 any more."),
    (lambda paths, _: paths["/api/v1/users"]["get"]["parameters"].pop(0),
     "GET /api/v1/users does not take the query parameter limit any more."),
    (lambda paths, _: paths["/api/v1/users"]["get"]["parameters"][0].update(required=True),
     "GET /api/v1/users requires the query parameter limit now."),
    (lambda paths, _: paths["/api/v1/users"]["get"]["parameters"][0]["schema"].update(maximum=50),
     "GET /api/v1/users: the query parameter limit can not be more than 50 any more."),
    (lambda paths, _: paths["/api/v1/users"]["get"]["responses"]["200"]["headers"].pop("ETag"),
     "GET /api/v1/users does not always send ETag with 200 any more."),
    (lambda _, schemas: schemas["NewUser"]["properties"].pop("role"),
     "POST /api/v1/users: the body has no field role any more."),
    (lambda _, schemas: schemas["NewUser"]["required"].append("role"),
     "POST /api/v1/users: the body requires role now."),
    (lambda _, schemas: schemas["NewUser"]["properties"]["role"].update(enum=["user"]),
     "POST /api/v1/users: role of the body can not be admin any more."),
    (lambda _, schemas: schemas["NewUser"]["properties"]["name"].update(type="integer"),
     "POST /api/v1/users: name of the body can not be string any more."),
    (lambda _, schemas: schemas["User"]["properties"].pop("name"),
     "POST /api/v1/users: the answer 201 has no field name any more."),
    (lambda _, schemas: schemas["User"]["required"].remove("name"),
     "POST /api/v1/users: the answer 201 does not always have name any more."),
    (lambda _, schemas: schemas["User"]["properties"]["name"].update(type=["string", "null"]),
     "POST /api/v1/users: name of the answer 201 can be null now."),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_breaks_a_client_is_named(documents, change, sentence):
    assert sentence in changed(documents, change)


@pytest.mark.parametrize("change", [
    lambda paths, _: paths.update({"/api/v1/more": paths["/health"]}),
    lambda _, schemas: schemas["User"]["properties"].update(more={"type": "string"}),
    lambda _, schemas: schemas["NewUser"]["properties"].update(more={"type": "string"}),
    lambda _, schemas: schemas["NewUser"]["properties"]["name"].update(maxLength=200),
    lambda _, schemas: schemas["NewProduct"]["required"].remove("price"),
])
def test_what_only_adds_breaks_nobody(documents, change):
    assert changed(documents, change) == []


def finished(monkeypatch, seen):
    """The guard and the run's exit status, behind a whole run in whose worker this was seen."""
    monkeypatch.setattr(contract, "SEEN", set())
    monkeypatch.setattr(contract, "is_whole", lambda config: True)
    guard, session = contract.Guard(), SimpleNamespace(config=None, exitstatus=0)
    guard.pytest_testnodedown(SimpleNamespace(workeroutput={"seen": seen}))
    guard.pytest_sessionfinish(session)
    return guard, session.exitstatus


def test_a_whole_run_fails_for_an_answer_that_no_test_received(monkeypatch):
    *most, last = sorted({answer for v in VERSIONS for answer in contract.documented(v)})
    guard, status = finished(monkeypatch, most)
    assert (guard.missing, status) == ([last], 1)
    assert finished(monkeypatch, [*most, last])[1] == 0


@pytest.mark.long
@pytest.mark.parametrize("command", [
    ["redocly", "lint"],
    ["spectral", "lint", "--fail-severity=error", "--ruleset=.spectral.yaml"],
], ids=lambda command: command[0])
def test_linters_find_no_error(command, document, tmp_path):
    folder = clients.installed(golden.FOLDER.parent / "clients" / "linters.json")
    (folder / ".spectral.yaml").write_text(
        'extends: ["spectral:oas", "@stoplight/spectral-owasp-ruleset"]')
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    done = subprocess.run(["npx", *command, tmp_path / "openapi.json"], cwd=folder, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
