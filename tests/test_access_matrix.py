"""Every operation of every version, by everybody: the door, the objects behind it, their fields.

The table comes from the documents, so an operation that is added is tested from its first day. What
has to happen follows from what its view declares: `public`, `user` or `admin`.
"""
import copy
import re
import socket
import time
from types import SimpleNamespace

import pytest

from extensions import openapi
from tests.conftest import PASSWORD, execute, register, unique
from tests.test_operations import VERSIONS, read, send
from tests.test_tokens import altered, claims_of, signed

DATA = ("users", "sessions", "categories", "products", "transactions", "transaction_items")


@pytest.fixture(scope="module")
def documents(app):
    return {version: app.json.loads(app.extensions["documents"][version]) for version in VERSIONS}


@pytest.fixture(scope="module")
def table(app):
    """Every operation, with ``access``."""
    access = {(version, path, method.upper()): view.access for version in VERSIONS
              for path, method, view in openapi.operations(app, version)}
    found = [o for version in VERSIONS for o in read(app, version)]
    for operation in found:
        operation.access = access[operation.version, operation.path, operation.method]
    assert {o.access for o in found} == {"public", "user", "admin"}
    return found


@pytest.fixture(scope="module")
def protected(table):
    return [o for o in table if o.access != "public"]


@pytest.fixture(scope="module")
def admins(table):
    return [o for o in table if o.access == "admin"]


@pytest.fixture(scope="module")
def person(client):
    return register(client)


@pytest.fixture(scope="module")
def things(client, admin):
    """Things that are there, by the names of path parameters; the buyer is somebody else."""
    def make(path, token=admin.token, **body):
        return client.post(path, token=token, json=body).json["id"]
    owner = register(client)
    product = make("products", name=unique("Product "), price="10.00", stock=100)
    session, = client.get("auth/sessions", token=owner.token).json["data"]
    items = [{"product_id": product, "quantity": 1}]
    return {
        "product": product, "category": make("categories", name=unique("Category ")),
        "user": owner.id, "session": session["id"], "code": "gone",
        "transaction": make("transactions", token=owner.token, items=items),
    }


@pytest.fixture(scope="module")
def tokens(client, admin):
    """Tokens that open nothing, of an administrator: by what is wrong with them."""
    login = {"email": admin.email, "password": PASSWORD}
    ended = client.post("auth/login", json=login).json["token"]
    client.post("auth/logout", token=ended)
    claims = claims_of(admin.token)
    head, body, tail = admin.token.split(".")
    return {
        "nobody": None, "expired": altered(claims, exp=int(time.time()) - 1), "revoked": ended,
        "refresh": admin.refresh_token,
        "other key": signed({"alg": "HS256", "typ": "JWT"}, claims, key=b"x" * 40),
        "no signature": f"{head}.{body}.", "alg none": signed({"alg": "none"}, claims, digest=None),
        "other claims": f"{head}.{claims_part(claims, sub='1')}.{tail}",
    }


def claims_part(claims, **changes):
    return altered(claims, **changes).split(".")[1]


@pytest.fixture
def unchanged(database_url):
    """Holds a test to it that the shop's data is the same behind it as before it.

    But for when a session was used last, which is noted once a minute.
    """
    def state():
        return {name: execute(
            database_url, "SELECT count(*), md5(string_agg(row::text, '|' ORDER BY row::text)) "
                          f"FROM (SELECT to_jsonb(t) - 'last_used_at' AS row FROM {name} t) r"
        ) for name in DATA}
    before = state()
    yield
    assert state() == before


def wrong(answers, right):
    """Those of {operation: response} that are not as they should be, as text."""
    assert answers
    return {f"{o.version} {o.method} {o.path}": f"{r.status_code} {r.text[:200]}"
            for o, r in answers if not right(r)}


# Who gets past the door (API5: broken function level authorization)


@pytest.mark.parametrize(("token", "code"), [
    ("nobody", "authentication_required"), ("expired", "token_expired"),
    ("revoked", "token_revoked"), ("refresh", "authentication_required"),
    ("other key", "authentication_required"), ("no signature", "authentication_required"),
    ("alg none", "authentication_required"), ("other claims", "authentication_required"),
])
def test_what_is_not_public_is_401(client, protected, things, tokens, unchanged, token, code):
    answers = [(o, send(client, o, things, token=tokens[token])) for o in protected]
    assert not wrong(answers, lambda r: r.status_code == 401 and r.json["code"] == code)


@pytest.mark.parametrize("token", ["nobody", "expired", "revoked", "refresh", "other key"])
def test_head_asks_as_get_does(client, protected, things, tokens, token):
    reads = [SimpleNamespace(**vars(o) | {"method": "HEAD"}) for o in protected
             if o.method == "GET"]
    answers = [(o, send(client, o, things, token=tokens[token])) for o in reads]
    assert not wrong(answers, lambda r: r.status_code == 401 and not r.data)


def test_what_is_an_admin_s_is_403_for_a_user(client, admins, things, person, unchanged):
    answers = [(o, send(client, o, things, token=person.token)) for o in admins]
    assert not wrong(answers, lambda r: r.status_code == 403)


@pytest.mark.parametrize("role", ["user", "admin"])
def test_who_may_is_let_in(client, table, admin, role):
    answers = []
    for operation in table:
        if operation.access == "user" or (operation.access == "admin" and role == "admin"):
            who = register(client) if role == "user" else admin
            token = who.token
            if operation.path.endswith("/logout"):
                login = {"email": who.email, "password": PASSWORD}
                token = client.post("auth/login", json=login).json["token"]
            answers.append((operation, send(client, operation, token=token, json={})))
    assert not wrong(answers, lambda r: r.status_code not in (401, 403, 500))


def test_what_is_public_asks_nobody_who_they_are(client, table, tokens):
    answers = []
    for operation in table:
        if operation.access == "public":
            found = [send(client, operation, json={}, token=token) for token in tokens.values()]
            assert len({answer.status_code for answer in found}) == 1, operation.path
            answers.append((operation, found[0]))
    assert not wrong(answers, lambda r: r.status_code not in (401, 403, 500))


# Other spellings of a path, and other ways to name a method

SPELLINGS = {
    "two slashes": lambda path: path.replace("/", "//"),
    "two slashes in front": lambda path: f"/{path}",
    "two slashes inside": lambda path: path.replace("/v", "//v"),
    "a slash behind": lambda path: f"{path}/",
    "two slashes behind": lambda path: f"{path}//",
    "a dot": lambda path: path.replace("/api/", "/api/./"),
    "a dot behind": lambda path: f"{path}/.",
    "dots from nowhere": lambda path: f"/nowhere/..{path}",
    "dots from what is public": lambda path: re.sub("(/v[12])/", r"\1/products/../", path),
    "encoded dots": lambda path: re.sub("(/v[12])/", r"\1/products/%2e%2e/", path),
    "encoded dots and slash": lambda path: re.sub("(/v[12])/", r"\1/products%2f..%2f", path),
    "dots encoded twice": lambda path: re.sub("(/v[12])/", r"\1/products/%252e%252e/", path),
    "dots and a backslash": lambda path: re.sub("(/v[12])/", r"\1/products\..\\", path),
    "encoded slashes": lambda path: path[0] + path[1:].replace("/", "%2F"),
    "an encoded letter": lambda path: path.replace("/api/v", "/%61pi/%76"),
    "a letter encoded twice": lambda path: path.replace("/api/", "/%2561pi/"),
    "upper case": str.upper,
    "capitals": str.title,
    "a parameter": lambda path: f"{path};x=1",
    "a parameter inside": lambda path: re.sub("(/v[12])/", r"\1;x=1/", path),
    "an extension": lambda path: f"{path}.json",
    "a style sheet's name": lambda path: f"{path}/x.css",
    "a blank": lambda path: f"{path}%20",
    "a line break": lambda path: f"{path}%0A",
    "a null byte": lambda path: f"{path}%00",
    "a null byte and a public name": lambda path: f"{path}%00/products",
    "a backslash": lambda path: path.replace("/", "\\"),
    "wide letters": lambda path: path.replace("api", "%EF%BD%81pi"),
    "an encoded question mark": lambda path: f"{path}%3Fx",
    "a fragment": lambda path: f"{path}%23/products",
}
NO_WAY_IN = (400, 401, 403, 404, 405, 422)


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_no_spelling_of_a_path_leads_past_the_door(
    client, protected, things, person, unchanged, spell
):
    answers = []
    for operation in protected:
        spelled = SimpleNamespace(**vars(operation) | {"path": spell(operation.path)})
        answers.append((operation, send(client, spelled, things)))
        if operation.access == "admin":
            answers.append((operation, send(client, spelled, things, token=person.token)))
    assert not wrong(answers, lambda r: r.status_code in NO_WAY_IN)


@pytest.mark.parametrize("target", [
    *(spell("/api/v1/users") for spell in SPELLINGS.values()), "http://shop/api/v1/users",
    "http://shop//api/v1/users", "https://shop/api/v1/users", "/api/v1/users#", "*", "api/v1/users",
    "/health/../api/v1/users", "/health/%2e%2e/api/v1/users", "/api/v1/products?/../users",
], ids=ascii)
def test_nor_one_that_only_a_wire_can_carry(server, target):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(f"GET {target} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert int(answer.split()[1]) in NO_WAY_IN
    assert b"@example.com" not in answer


OVERRIDES = ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "X-Forwarded-Method",
             "X-Original-Method")
REWRITES = ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Uri", "X-Forwarded-Prefix",
            "X-Forwarded-Path", "X-Original-URI")
CLAIMS = {"X-User-ID": "1", "X-User": "admin", "X-Role": "admin", "X-Forwarded-User": "admin",
          "X-Remote-User": "admin", "Remote-User": "admin", "X-Forwarded-For": "127.0.0.1",
          "X-Real-IP": "127.0.0.1", "X-Internal": "1", "X-Admin": "true", "X-Debug": "1"}


def test_no_header_opens_what_is_not_public(client, protected, things, unchanged):
    for headers in (dict.fromkeys(OVERRIDES, "GET"), dict.fromkeys(OVERRIDES, "OPTIONS"),
                    dict.fromkeys(REWRITES, "/api/v1/products"), CLAIMS):
        answers = [(o, send(client, o, things, headers=headers)) for o in protected]
        assert not wrong(answers, lambda r: r.status_code == 401)


def test_no_header_or_field_makes_another_method_or_path(client, table, things, admin, unchanged):
    """An administrator's read stays a read, whatever else it says of itself."""
    for operation in table:
        if operation.method == "GET" and operation.access != "public":
            plain = send(client, operation, things, token=admin.token)
            for method in ("DELETE", "PATCH", "POST"):
                headers = dict.fromkeys(OVERRIDES, method) | dict.fromkeys(REWRITES, "/health")
                again = send(client, operation, things, token=admin.token, headers=headers)
                assert (again.status_code, again.data) == (plain.status_code, plain.data)
    for path in ("products/{product}", "categories/{category}", "users/{user}"):
        path = path.format(**things)
        for name in ("_method", "_METHOD", "method"):
            assert client.get(f"{path}?{name}=DELETE", token=admin.token).status_code == 422
            assert client.post(path, data={name: "DELETE"}, token=admin.token).status_code == 405


# Whose objects one sees (API1: broken object level authorization)


def test_someone_else_s_objects_are_404(client, table, things, person, unchanged):
    """Exactly as those that nobody has: nothing is told of what is there."""
    theirs = [o for o in table if o.access == "user" and "{" in o.path]
    answers = [(o, send(client, o, things, token=person.token)) for o in theirs]
    assert not wrong(answers, lambda r: r.status_code == 404)
    for operation, found in answers:
        nothing = send(client, operation, token=person.token)
        for name in ("code", "title", "detail", "status"):
            assert found.json[name] == nothing.json[name]


def test_a_list_holds_nobody_else_s_objects(client, table, things, person):
    own = {o.path: send(client, o, token=person.token).json["data"] for o in table
           if o.access == "user" and o.method == "GET" and "{" not in o.path}
    assert len(own) == 4  # sales and sessions, twice
    for path, rows in own.items():
        seen = {row["id"] for row in rows}
        assert not seen & {things["session"], things["transaction"]}, path


# Which fields one reads and writes (API3: broken object property level authorization)

SECRETS = {"password", "password_hash", "hash", "token_hash", "generation", "secret",
           "failures", "blocked_until"}
GUESSES = {"id", "role", "is_admin", "admin", "email_verified", "verified", "user_id", "owner_id",
           "password_hash", "created_at", "updated_at", "last_login", "status", "total", "price",
           "unit_price", "amount", "currency", "discount", "product_count", "retired_at",
           "refunded_at", "session_id", "expires_at", "__proto__", "constructor", "$where"}


def shapes(document):
    """{name: property names} of every schema of a document."""
    return {name: set(schema.get("properties", ()))
            for name, schema in document["components"]["schemas"].items()}


def parts(document, schema, body, prefix=""):
    """(prefix, object, names that it may have) of a body and of all that it holds."""
    known = document["components"]["schemas"][schema["$ref"].split("/")[-1]]["properties"]
    yield prefix, body, set(known)
    for name, value in body.items():
        if isinstance(value, dict):
            yield from parts(document, known[name], value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for at, part in enumerate(value):
                yield from parts(document, known[name]["items"], part, f"{prefix}{name}.{at}.")


def with_strangers(document, operation, names):
    """The operation's body with each of its objects in turn enlarged: (body, the new places)."""
    said = document["paths"][operation.path][operation.method.lower()]["requestBody"]
    schema = said["content"]["application/json"]["schema"]
    for at in range(len(list(parts(document, schema, operation.body)))):
        body = copy.deepcopy(operation.body)
        prefix, part, known = list(parts(document, schema, body))[at]
        part |= dict.fromkeys(names - known, 1)
        yield body, {f"{prefix}{name}" for name in names - known}


def test_every_field_that_a_body_does_not_declare_is_refused_by_name(
    client, documents, table, things, admin, unchanged
):
    """Of all names that any answer has, and of those that a stranger would try."""
    names = GUESSES.union(*(found for document in documents.values()
                            for found in shapes(document).values()))
    for operation in (o for o in table if o.body):
        for body, strangers in with_strangers(documents[operation.version], operation, names):
            answer = send(client, operation, things, token=admin.token, json=body)
            assert answer.status_code == 422, (operation.path, answer.text)
            refused = {detail["field"] for detail in answer.json["details"]}
            assert strangers <= refused, operation.path


@pytest.mark.parametrize(("method", "path", "body", "field"), [
    ("PATCH", "users/me", {"name": "Eve", "role": "admin"}, "role"),
    ("PATCH", "/api/v2/users/me", {"profile": {"name": "Eve"}, "role": "admin"}, "role"),
    ("POST", "auth/register", {"email": "eve@example.com", "name": "Eve", "password": PASSWORD,
                               "role": "admin"}, "role"),
    ("POST", "transactions", {"items": [{"product_id": 1, "quantity": -1}]}, "items.0.quantity"),
])
def test_a_user_sets_no_field_that_is_not_a_user_s(client, person, unchanged, method, path, body,
                                                   field):
    answer = client.open(method, path, token=person.token, json=body)
    assert answer.status_code == 422
    assert field in [detail["field"] for detail in answer.json["details"]]


def test_a_sale_has_the_shop_s_price_and_the_caller_s_name(client, person, things):
    items = [{"product_id": things["product"], "quantity": 2}]
    for extra in ({"price": "0.01"}, {"unit_price": "0.01"}, {"amount": "0"}):
        body = {"items": [items[0] | extra]}
        assert client.post("transactions", token=person.token, json=body).status_code == 422
    for extra in ({"user_id": things["user"]}, {"total": "0.01"}, {"status": "refunded"}):
        body = {"items": items} | extra
        assert client.post("transactions", token=person.token, json=body).status_code == 422
    sale = client.post("transactions", token=person.token, json={"items": items}).json
    assert (sale["user_id"], sale["total"], sale["status"]) == (person.id, "20.00", "completed")


@pytest.mark.parametrize("version", VERSIONS)
def test_no_answer_has_a_place_for_a_secret(documents, version):
    """A test's every answer is held to these schemas, none of which lets another field stand."""
    document = documents[version]
    sent = {shape["$ref"].split("/")[-1] for item in document["paths"].values()
            for operation in item.values() if "requestBody" in operation
            for shape in [operation["requestBody"]["content"]["application/json"]["schema"]]}
    for name, names in shapes(document).items():
        assert name in sent or not names & SECRETS, name
        schema = document["components"]["schemas"][name]
        assert "properties" not in schema or schema["additionalProperties"] is False, name
