"""Every operation of both versions, called in every way that its document has an answer for.

The Client of these tests holds each answer to the document; here they only make them happen.
"""
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import psycopg
import pytest
from flask_jwt_extended import create_access_token, create_refresh_token

from db import pool
from extensions.behind.mail import token_hash
from tests.conftest import PASSWORD, execute, register, unique
from tests.contract import documented

LARGEST = 2**63 - 1  # an id that nothing has
VERSIONS = ["v1", "v2"]


@pytest.fixture(scope="module")
def operations(app):
    """Every operation: version, id, method, path, body and query that it takes, its codes."""
    return [operation for version in VERSIONS for operation in read(app, version)]


def read(app, version):
    document = app.json.loads(app.extensions["documents"][version])
    codes = {}
    for _, name, _, code in documented(version):
        codes.setdefault(name, set()).add(code)
    for path, item in document["paths"].items():
        for method in item.keys() - {"parameters"}:
            said = item[method]
            body = said.get("requestBody", {}).get("content", {}).get("application/json", {})
            name = said["operationId"]
            yield SimpleNamespace(
                version=version, id=name, method=method.upper(), path=path,
                body=body.get("example"), codes=codes[name], responses=said["responses"],
                query={p["name"]: p["example"] for p in said["parameters"]
                       if p.get("required") and p["in"] == "query"},
            )


def send(client, operation, ids=None, **kwargs):
    """Call an operation with its example, or with what is given instead."""
    path = re.sub(r"{(\w+)}", lambda name: str((ids or {}).get(name[1], LARGEST)), operation.path)
    if operation.body and not kwargs.keys() & {"json", "data"}:
        kwargs["json"] = operation.body
    kwargs.setdefault("query_string", operation.query)
    return client.open(operation.method, path, **kwargs)


def each(operations, code, call, but=()):
    """Every operation that documents a problem answers ``call(operation)`` with it."""
    found = {
        f"{o.version} {o.id}": call(o) for o in operations if code in o.codes and o.id not in but
    }
    assert found
    wrong = {name: response.text for name, response in found.items()
             if response.json["code"] != code}
    assert not wrong


@pytest.fixture(scope="module")
def ids(client, admin):
    """Ids of things that are there, by the names of path parameters."""
    def make(path, **body):
        return client.post(path, token=admin.token, json=body).json["id"]
    product = make("products", name=unique("Product "), price="10.00", stock=100)
    return {
        "product": product, "category": make("categories", name=unique("Category ")),
        "user": register(client).id, "code": "gone",
        "transaction": make("transactions", items=[{"product_id": product, "quantity": 1}]),
    }


def test_without_a_token_it_is_401(operations, client):
    each(operations, "authentication_required", lambda o: send(client, o), but=["refreshTokens"])


def test_an_expired_token_is_401(operations, app, client, user):
    with app.app_context():
        token = create_access_token(str(user.id), additional_claims={"sid": 1},
                                    expires_delta=timedelta(seconds=-1))
    each(operations, "token_expired", lambda o: send(client, o, token=token),
         but=["refreshTokens"])


def test_a_token_of_an_ended_session_is_401(operations, client, user):
    client.post("auth/logout", token=user.token)
    each(operations, "token_revoked", lambda o: send(client, o, token=user.token),
         but=["refreshTokens"])


def test_what_is_an_admin_s_is_403_for_a_user(operations, client, user):
    each(operations, "forbidden", lambda o: send(client, o, token=user.token),
         but=["logIn", "listTransactions"])


def test_an_id_that_nothing_has_is_404(operations, client, admin):
    each(operations, "not_found", lambda o: send(client, o, token=admin.token))


def test_a_query_that_is_not_utf8_is_400(operations, client, admin):
    each(operations, "bad_request",
         lambda o: send(client, o, token=admin.token, query_string="x=%FF"))


def test_an_unknown_parameter_is_422(operations, client, admin):
    each(operations, "validation_failed",
         lambda o: send(client, o, token=admin.token, query_string={"no_such_parameter": 1}))


def test_broken_json_is_400(operations, client, admin):
    each(operations, "malformed_json", lambda o: send(
        client, o, token=admin.token, data=b"{", content_type="application/json"))


def test_another_media_type_is_415(operations, client, admin):
    each(operations, "unsupported_media_type", lambda o: send(
        client, o, token=admin.token, data=b"{}", content_type="text/plain"))


def test_more_than_10_mb_are_413(operations, client, admin):
    each(operations, "payload_too_large", lambda o: send(
        client, o, token=admin.token, environ_overrides={"CONTENT_LENGTH": str(11 * 2**20)}))


def test_a_stale_tag_is_412(operations, client, admin, ids):
    each(operations, "precondition_failed", lambda o: send(
        client, o, ids, token=admin.token, headers={"If-Match": '"stale"'}))


def test_no_tag_is_428_where_one_is_required(operations, make_app, make_client, admin, ids):
    client = make_client(make_app(REQUIRE_IF_MATCH="1"))
    each(operations, "precondition_required", lambda o: send(client, o, ids, token=admin.token))


def test_v1_s_users_are_410_after_their_sunset(operations, make_app, make_client, admin):
    client = make_client(make_app(V1_USERS_GONE="1", V1_USERS_SUNSET="2026-01-01"))
    each(operations, "gone", lambda o: send(client, o, token=admin.token))


def test_what_is_over_the_limit_is_429(operations, make_app, make_client, admin):
    app = make_app(RATE_LIMIT="1 per hour")

    def twice(operation):
        client = make_client(app, address=f"{operation.version} {operation.id}")
        send(client, operation)
        return send(client, operation)
    each(operations, "rate_limited", twice)


def test_what_has_not_changed_is_304(operations, client, admin, ids):
    for operation in operations:
        if "304" in operation.responses:
            first = send(client, operation, ids, token=admin.token)
            assert first.status_code == 200, first.text
            again = send(client, operation, ids, token=admin.token,
                         headers={"If-None-Match": first.headers["ETag"]})
            assert (again.status_code, again.data) == (304, b""), operation.path


@pytest.fixture
def tokens(app, admin):
    """A body for a refresh whose token is valid: what comes behind the check can be met."""
    with app.app_context():
        claims = {"sid": 1, "gen": 0}
        return {"refresh_token": create_refresh_token(str(admin.id), additional_claims=claims)}


def broken(make_app, make_client, operations, admin, tokens, code, **settings):
    client = make_client(make_app(CACHE_TYPE="NullCache", **settings))
    each(operations, code, lambda o: send(
        client, o, token=admin.token, **({"json": tokens} if o.id == "refreshTokens" else {})))


def test_without_a_database_it_is_503(operations, make_app, make_client, admin, tokens, tmp_path,
                                      monkeypatch):
    monkeypatch.setattr(pool, "CHECKOUT_SECONDS", 0.05)
    broken(make_app, make_client, [o for o in operations if o.id != "getReadiness"], admin, tokens,
           "unavailable", DATABASE_URL=f"postgresql:///shop?host={tmp_path}")


def test_a_fault_of_ours_is_500(operations, make_app, make_client, make_database, admin, tokens):
    broken(make_app, make_client, operations, admin, tokens, "internal_error",
           DATABASE_URL=make_database(empty=True), LOG_LEVEL="ERROR")


def test_a_query_that_takes_too_long_is_504(operations, make_app, make_client, make_database, admin,
                                            tokens):
    url = make_database()
    with psycopg.connect(url) as blocker:
        blocker.execute("LOCK TABLE users, sessions, login_failures, mail_tokens, mails, "
                        "categories, products, product_counts, transactions "
                        "IN ACCESS EXCLUSIVE MODE")
        broken(make_app, make_client, operations, admin, tokens, "timeout", DATABASE_URL=url,
               STATEMENT_TIMEOUT_MS="100")


# What only one or two operations answer, asked of each version.

@pytest.fixture(params=VERSIONS)
def api(request, client):
    """A function that calls a path of one version: ``api("post", "products", …)``."""
    def call(method, path, client=client, **kwargs):
        return client.open(method.upper(), f"/api/{request.param}/{path}", **kwargs)
    call.profile = lambda name: {"name": name} if request.param == "v1" else {
        "profile": {"name": name}}
    return call


def refuses(response, status, code):
    assert (response.status_code, response.json["code"]) == (status, code)


def add(api, admin, path, **body):
    """The resource that a POST makes."""
    response = api("post", path, token=admin.token, json=body)
    assert response.status_code == 201, response.text
    return response.json


def product(api, admin, **fields):
    return add(api, admin, "products", name=unique("Product "), price="10.00", **fields)


def test_a_taken_email_is_409(api, user, other, admin):
    body = {"email": user.email, "password": PASSWORD}
    refuses(api("post", "auth/register", json=body | {"name": "Ada"}), 409, "email_taken")
    refuses(api("post", "users", token=admin.token, json=body | api.profile("Ada")), 409,
            "email_taken")
    refuses(api("patch", f"users/{other.id}", token=admin.token, json={"email": user.email}), 409,
            "email_taken")


def test_the_last_admin_stays(api, make_app, make_client, make_database):
    url = make_database()
    client = make_client(make_app(DATABASE_URL=url))
    only = register(client)
    execute(url, "UPDATE users SET role = 'admin'")
    refuses(api("delete", "users/me", client, token=only.token), 409, "conflict")
    refuses(api("patch", "users/me", client, token=only.token, json={"role": "user"}), 409,
            "conflict")


def test_of_two_password_changes_at_once_one_is_409(api, user, database_url):
    body = {"current_password": PASSWORD, "new_password": "another walk home"}
    with psycopg.connect(database_url) as twin, ThreadPoolExecutor() as threads:
        twin.execute("UPDATE users SET password_hash = 'new' WHERE id = %s", [user.id])
        answer = threads.submit(api, "post", "auth/password", token=user.token, json=body)
        until_somebody_waits(database_url)
        twin.commit()
        refuses(answer.result(), 409, "conflict")


def until_somebody_waits(url):
    """Return once a statement waits for another's lock."""
    deadline = time.monotonic() + 10
    while not execute(url, "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                           "AND wait_event_type = 'Lock'"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_wrong_credentials_are_401(api, user):
    wrong = {"token": "no-such-token"}
    for path, token, body in (
        ("auth/login", None, {"email": user.email, "password": "wrong"}),
        ("auth/password", user.token, {"current_password": "wrong", "new_password": PASSWORD}),
        ("auth/password/reset", None, wrong | {"password": PASSWORD}),
        ("auth/email/verify", None, wrong),
    ):
        refuses(api("post", path, token=token, json=body), 401, "invalid_credentials")
    body = {"email": f"{unique()}@example.com", "current_password": "wrong"}
    refuses(api("patch", "users/me", token=user.token, json=body), 401, "invalid_credentials")


def test_a_refresh_token_can_be_wrong_expired_or_revoked(api, app, user):
    def refresh(token):
        return api("post", "auth/refresh", json={"refresh_token": token})
    refuses(refresh(user.token), 401, "authentication_required")
    with app.app_context():
        old = create_refresh_token(str(user.id), additional_claims={"sid": 1, "gen": 0},
                                   expires_delta=timedelta(seconds=-1))
    refuses(refresh(old), 401, "token_expired")
    api("post", "auth/logout", token=user.token)
    refuses(refresh(user.refresh_token), 401, "token_revoked")


def test_an_unverified_address_is_403_where_it_has_to_be_verified(api, make_app, make_client, user):
    client = make_client(make_app(REQUIRE_VERIFIED_EMAIL="1"))
    body = {"email": user.email, "password": PASSWORD}
    refuses(api("post", "auth/login", client, json=body), 403, "forbidden")


def test_others_sales_are_403(api, user, other):
    refuses(api("get", f"transactions?user_id={other.id}", token=user.token), 403, "forbidden")


def test_a_taken_sku_is_409(api, admin):
    sku = product(api, admin, sku=unique("SKU-"))["sku"]
    body = {"name": "Twin", "price": 1, "sku": sku}
    refuses(api("post", "products", token=admin.token, json=body), 409, "sku_taken")
    path = f"products/{product(api, admin)['id']}"
    refuses(api("patch", path, token=admin.token, json={"sku": sku}), 409, "sku_taken")


def test_a_category_s_name_is_its_own_and_it_is_kept_while_in_use(api, admin):
    first, second = (add(api, admin, "categories", name=unique("Category ")) for _ in "ab")
    product(api, admin, category_id=first["id"])
    name = {"name": first["name"]}
    refuses(api("post", "categories", token=admin.token, json=name), 409, "name_taken")
    refuses(api("patch", f"categories/{second['id']}", token=admin.token, json=name), 409,
            "name_taken")
    refuses(api("delete", f"categories/{first['id']}", token=admin.token), 409, "category_in_use")


def test_what_is_out_of_stock_is_409(api, admin, user):
    items = [{"product_id": product(api, admin, stock=1)["id"], "quantity": 2}]
    refuses(api("post", "transactions", token=user.token, json={"items": items}), 409,
            "out_of_stock")


def test_a_second_refund_is_409(api, admin, user):
    items = [{"product_id": product(api, admin, stock=1)["id"], "quantity": 1}]
    sale = add(api, user, "transactions", items=items)
    path = f"transactions/{sale['id']}/refund"
    assert api("post", path, token=admin.token).status_code == 200
    refuses(api("post", path, token=admin.token), 409, "conflict")


@pytest.mark.parametrize("path", ["products", "transactions"])
def test_an_idempotency_key_belongs_to_one_request(api, admin, database_url, path):
    item = {"product_id": product(api, admin, stock=9)["id"], "quantity": 1}
    body = {"products": {"name": "Once", "price": 1}, "transactions": {"items": [item]}}[path]
    other = {"products": {"name": "Twice", "price": 1},
             "transactions": {"items": [item | {"quantity": 2}]}}[path]

    def post(body):
        return api("post", path, token=admin.token, json=body, headers={"Idempotency-Key": key})
    key = unique("key-")
    with psycopg.connect(database_url) as twin:
        twin.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, %s))", [key, admin.id])
        refuses(post(body), 409, "request_in_progress")
    first, again = post(body), post(body)
    assert (again.status_code, again.data) == (first.status_code, first.data)
    assert again.headers["Idempotent-Replayed"] == "true"
    refuses(post(other), 422, "idempotency_key_reused")


def test_a_report_of_another_type_is_406(api, admin):
    refuses(api("get", "reports/transactions?start_date=2026-01-01&end_date=2026-02-01",
                token=admin.token, headers={"Accept": "image/png"}), 406, "not_acceptable")


def test_an_account_s_life(api, database_url):
    def ok(status, method, path, **kwargs):
        response = api(method, path, **kwargs)
        assert response.status_code == status, response.text
        return response.json if status != 204 else None

    def mailed(purpose):
        token = unique("token-")
        with psycopg.connect(database_url) as conn:
            conn.execute("INSERT INTO mail_tokens SELECT %s, id, %s, email, now() + interval '1 h' "
                         "FROM users WHERE email = %s", [token_hash(token), purpose, email])
        return {"token": token}

    email = f"{unique('life')}@example.com"
    login = {"email": email, "password": PASSWORD}
    pair = ok(201, "post", "auth/register", json=login | {"name": "Ada"})
    ok(202, "post", "auth/email/verification", token=pair["token"])
    ok(204, "post", "auth/email/verify", json=mailed("verify"))
    pair = ok(200, "post", "auth/refresh", json={"refresh_token": pair["refresh_token"]})
    ok(204, "post", "auth/password", token=pair["token"],
       json={"current_password": PASSWORD, "new_password": "another walk home"})
    ok(202, "post", "auth/password/forgot", json={"email": email})
    ok(204, "post", "auth/password/reset", json=mailed("reset") | {"password": PASSWORD})
    token = ok(200, "post", "auth/login", json=login)["token"]
    second = ok(200, "post", "auth/login", json=login)["token"]
    sessions = ok(200, "get", "auth/sessions", token=token)["data"]
    ok(204, "delete", f"auth/sessions/{sessions[0]['id']}", token=token)
    assert api("get", "users/me", token=second).status_code == 401
    ok(200, "get", "users/me", token=token)
    ok(200, "patch", "users/me", token=token, json=api.profile("Ada King"))
    ok(204, "post", "auth/logout", token=token)
    token = ok(200, "post", "auth/login", json=login)["token"]
    ok(204, "delete", "users/me", token=token)


def test_a_product_s_life(api, admin, user):
    def ok(status, method, path, token=admin.token, **kwargs):
        response = api(method, path, token=token, **kwargs)
        assert response.status_code == status, response.text
        return response.json if response.is_json else None

    category = add(api, admin, "categories", name=unique("Category "))
    item = product(api, admin, stock=3, category_id=category["id"])
    ok(200, "patch", f"products/{item['id']}", json={"price": "12.00", "category_id": None})
    ok(200, "get", f"products/{item['id']}", token=None)
    ok(200, "get", "products", token=None)
    ok(200, "get", "categories", token=None)
    ok(200, "patch", f"categories/{category['id']}", json={"name": unique("Category ")})
    ok(200, "get", f"categories/{category['id']}", token=None)
    ok(204, "delete", f"categories/{category['id']}")
    sale = add(api, user, "transactions", items=[{"product_id": item["id"], "quantity": 2}])
    ok(200, "get", f"transactions/{sale['id']}", token=user.token)
    ok(200, "get", "transactions", token=user.token)
    window = "start_date=2026-01-01&end_date=2199-01-01"
    for kind in ("json", "ndjson", "csv"):
        ok(200, "get", f"reports/transactions?{window}&format={kind}")
    ok(200, "get", f"reports/sales?{window}&group_by=category")
    ok(200, "post", f"transactions/{sale['id']}/refund")
    ok(204, "delete", f"products/{item['id']}")
    body = {"email": f"{unique('x')}@example.com", "password": PASSWORD} | api.profile("Ben")
    add(api, admin, "users", **body)
    ok(200, "get", "users")


def test_a_version_s_document_and_page_are_there(api):
    assert api("get", "openapi.json").status_code == 200
    assert api("get", "docs").status_code == 200


def test_a_problem_s_code_is_explained(client):
    assert client.get("/problems/out_of_stock").json["status"] == 409
