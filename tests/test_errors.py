"""Errors: one shape from every layer, with a code, and nothing of what goes on inside."""
import itertools
import json
import re
import socket

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from schemas.problems import PROBLEMS
from tests.conftest import PASSWORD, unique

MEMBERS = {"type", "title", "status", "detail", "instance", "code", "request_id", "error"}
INSIDE = re.compile(rb"psycopg|SELECT|INSERT|UPDATE |Traceback|File \"|/site-packages|/work|werk"
                    rb"zeug|marshmallow|gunicorn|_fkey|_check\b|relation|constraint|syntax error")
SECURITY = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


def problem(response, status, code):
    """Assert that an answer is this problem, in the one shape, and return it."""
    assert response.status_code == status, response.get_data()[:500]
    return shaped(response.status_code, response.headers, response.get_data(), code)


def shaped(status, headers, body, code):
    assert headers["Content-Type"] == "application/problem+json"
    assert headers["Cache-Control"] == "no-store"
    assert not INSIDE.search(body), body
    found = json.loads(body)
    assert set(found) - {"details"} == MEMBERS
    assert (found["code"], found["status"]) == (code, status)
    assert PROBLEMS[code][:2] == (status, found["title"])
    assert found["error"] == found["title"]
    assert found["type"] == f"/problems/{code}"
    assert found["request_id"] == headers["X-Request-ID"]
    for detail in found.get("details", ()):
        assert set(detail) == {"field", "in", "message"}
        assert detail["in"] in ("body", "query", "path", "header")
        assert isinstance(detail["message"], str)
    return found


# Paths and methods


@pytest.mark.parametrize("path", [
    "/nowhere", "/api", "/api/", "/api/v1", "/api/v1/", "/api/v3/products", "/api/v1/nowhere",
    "/api/v1/products/", "/api/v1//products", "//api/v1/products", "/api/v1/Products",
    "/api/v1/products/1/reviews", "/api/v1/products/1.5", "/api/v1/products/-1",
    "/api/v1/products/9223372036854775808", "/api/v1/products/" + "9" * 5000,
    "/api/v1/products/%00", "/api/v1/products/%FF", "/api/v1/products/%ED%A0%80",
    "/api/v1/products/%F0%9F%8D%B5", "/api/v1/products/1%0A", "/api/v1/products/1;x=1",
    "/%FF", "/%00", "/.env", "/%2e%2e/etc/passwd", "/..", "/docs/page.html", "/docs/../app.py",
    "/problems/nothing", "/problems/", "/api/v2/nowhere",
], ids=lambda path: path[:40])
def test_a_path_that_does_not_exist_is_404(client, path):
    problem(client.get(path), 404, "not_found")


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("PUT", "products", "GET, HEAD, OPTIONS, POST"),
    ("DELETE", "products", "GET, HEAD, OPTIONS, POST"),
    ("POST", "products/1", "DELETE, GET, HEAD, OPTIONS, PATCH"),
    ("PATCH", "categories", "GET, HEAD, OPTIONS, POST"), ("GET", "auth/login", "OPTIONS, POST"),
    ("POST", "reports/sales", "GET, HEAD, OPTIONS"),
    ("TRACE", "products", "GET, HEAD, OPTIONS, POST"),
    ("BREW", "products", "GET, HEAD, OPTIONS, POST"), ("POST", "/health", "GET, HEAD, OPTIONS"),
    ("DELETE", "/", "GET, HEAD, OPTIONS"), ("GET", "transactions/1/refund", "OPTIONS, POST"),
])
def test_a_method_that_a_path_lacks_is_405_with_allow(client, method, path, allowed):
    response = client.open(method, path)
    problem(response, 405, "method_not_allowed")
    assert sorted(response.headers["Allow"].split(", ")) == allowed.split(", ")


def test_options_says_what_a_path_allows(client):
    response = client.options("products")
    assert response.status_code in (200, 204)
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


# Bodies


def post(client, admin, data, kind="application/json", path="products"):
    return client.post(path, token=admin.token, data=data, content_type=kind)


@pytest.mark.parametrize("kind", [
    "text/plain", "application/xml", "multipart/form-data; boundary=x", "application/vnd.api+json",
    "application/octet-stream", "text/json", "application/jsonx", "nonsense", "",
])
def test_a_body_of_another_type_is_415(client, admin, kind):
    response = post(client, admin, b'{"name": "Tea", "price": 1}', kind)
    problem(response, 415, "unsupported_media_type")
    assert "application/json" in response.headers["Accept"]


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON",
                                  "application/json;charset=UTF-8"])
def test_json_may_be_called_by_its_other_names(client, admin, kind):
    assert post(client, admin, b'{"name": "Tea", "price": 1}', kind).status_code == 201


@pytest.mark.parametrize("name", ["\\u0000", "a\\", "\\\\u0000", "\\ud800"])
def test_what_only_looks_like_an_escape_is_text(client, admin, name):
    body = json.dumps({"name": f"{name}é", "price": 1}).encode()
    assert b"\\u00e9" in body
    assert post(client, admin, body).json["name"] == f"{name}é"


@pytest.mark.parametrize("body", [
    b"{", b"}", b'{"name": "Tea"', b"{'name': 'Tea'}", b'{"name": Tea}', b'{name: "Tea"}', b"[1,]",
    b'{"name": "Tea",}', b'{"name": "Tea"} x', b"{}{}", b"//x\n{}", b"undefined", b"\x00",
    b'{"name": "T\nea"}', b'{"name": "\\x"}', b'{"price": 01}', b'{"price": .5}', b'{"price": 0x1}',
    b'{"price": NaN}', b'{"price": Infinity}', b'{"price": -Infinity}', b'{"price": 1e}',
    b'{"name": "a", "name": "b"}', b'{"x": {"y": 1, "y": 1}}', b'{"x": [{"y": 1, "y": 2}]}',
    b'{"a": 1, "\\u0061": 2}',
    b'{"name": "a\\u0000b"}', b'{"a\\u0000b": 1}', b'{"name": "\\ud800"}', b'{"\\udfff": 1}',
    b'{"name": "\\udc00\\ud800"}', b'{"x": ["\\ud83c"]}',
    b'{"name": "\xff"}', b'{"name": "\xc0\x80"}', b'{"name": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}",
    '{"name": "Tea"}'.encode("utf-16"), b'{"name": "\xe9"}', b'{"name": "\x00"}',
    b"[" * 100000, b'{"a":' * 100000, b"[" * 100000 + b"]" * 100000,
    b'{"price": ' + b"1" * 5000 + b"}", b'{"price": -' + b"9" * 100000 + b"}",
], ids=lambda body: ascii(body[:24]))
def test_what_is_not_json_is_400(client, admin, body):
    problem(post(client, admin, body), 400, "malformed_json")


@pytest.mark.parametrize("path", ["products", "categories", "transactions", "auth/login",
                                  "auth/register", "users"])
@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"12", b"true", b"1.5", b"[{}]",
                                  b"", b"  ", b"{}"])
def test_what_is_not_an_object_with_the_fields_is_422(client, admin, path, body):
    problem(post(client, admin, body, path=path), 422, "validation_failed")


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9223372036854775808", "1e-400", "1" * 4000,
                                    "1e99999999999", "-0.001", "9" * 25])
@pytest.mark.parametrize("field", ["price", "stock", "category_id"])
def test_a_number_beyond_all_bounds_is_422(client, admin, field, number):
    body = {"name": '"Tea"', "price": "1"} | {field: number}
    text = "{" + ", ".join(f'"{k}": {v}' for k, v in body.items()) + "}"
    found = problem(post(client, admin, text), 422, "validation_failed")
    assert [detail["field"] for detail in found["details"]] == [field]


def test_an_id_in_a_body_beyond_64_bits_is_422(client, user):
    for number in (2**63, 10**30, -1, 0):
        response = client.post("transactions", token=user.token,
                               json={"items": [{"product_id": number, "quantity": 1}]})
        found = problem(response, 422, "validation_failed")
        assert [detail["field"] for detail in found["details"]] == ["items.0.product_id"]


def test_nesting_that_is_only_odd_is_422(client, admin):
    body = json.loads("[" * 100 + "]" * 100)
    problem(client.post("products", token=admin.token, json={"name": body, "price": 1}), 422,
            "validation_failed")


def test_many_wrong_fields_are_told_in_bounded_length(client, admin):
    body = {f"field{i}": i for i in range(5000)}
    response = client.post("products", token=admin.token, json=body)
    assert len(problem(response, 422, "validation_failed")["details"]) == 100


# Forms


@pytest.mark.parametrize(("path", "form"), [
    ("auth/login", {"email": "nobody@example.com", "password": "x"}),
    ("auth/password/forgot", {"email": "nobody@example.com"}),
    ("categories", {"name": "Form of {unique}"}),
    ("products", {"name": "Form", "price": "1.50", "stock": "5"}),
])
def test_a_form_is_taken_where_a_flat_body_is(client, admin, path, form):
    form = {k: v.replace("{unique}", unique()) for k, v in form.items()}
    response = client.post(path, token=admin.token, data=form)
    assert response.status_code in (201, 202, 401)
    response = client.post(path, token=admin.token, data=form | {"colour": "red"})
    assert "colour" in [d["field"] for d in problem(response, 422, "validation_failed")["details"]]


def test_a_form_is_not_taken_where_the_body_is_not_flat(client, admin):
    response = post(client, admin, b"items=1", "application/x-www-form-urlencoded", "transactions")
    problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(("form", "status", "code"), [
    (b"name=a&name=b&price=1", 422, "validation_failed"),
    (b"name=%FF&price=1", 400, "bad_request"), (b"name=\xff&price=1", 400, "bad_request"),
    (b"name=%00&price=1", 400, "bad_request"), (b"name=%ED%A0%80&price=1", 400, "bad_request"),
    (b"name=%C0%80&price=1", 400, "bad_request"), (b"%FF=1&name=a&price=1", 400, "bad_request"),
    (b"&".join([b"a=1"] * 5000), 400, "bad_request"), (b"name=a&price=1&stock=x", 422,
                                                       "validation_failed"),
    (b"name=a&price=1&stock=" + b"9" * 30, 422, "validation_failed"), (b"=", 422,
                                                                       "validation_failed"),
    (b"name=a&price=1&stock=--1", 422, "validation_failed"),
    (b"name=a&price=1&stock=1.0", 422, "validation_failed"),
    (b"name=a&price=NaN", 422, "validation_failed"), (b"name=a&price=", 422, "validation_failed"),
    (b"name=a&price=1&stock=%C2%B2", 422, "validation_failed"),
    (b"name=a&price=1&stock=%D9%A1", 422, "validation_failed"),
    (b"{}", 422, "validation_failed"),
])
def test_a_form_is_read_as_strictly(client, admin, form, status, code):
    problem(post(client, admin, form, "application/x-www-form-urlencoded"), status, code)


# Queries


@pytest.mark.parametrize("query", [
    "%FF", "search=%FF", "search=%C0%80", "search=%ED%A0%80", "search=%F8%88%80%80%80",
    "search=%00", "%00=1", "search=a%00b", "x" * 9000, "&".join(f"a{i}=1" for i in range(300)),
], ids=lambda query: query[:20])
def test_a_query_that_is_not_text_is_400(client, query):
    problem(client.get(f"products?{query}"), 400, "bad_request")
    problem(client.get(f"categories?{query}"), 400, "bad_request")


@pytest.mark.parametrize(("query", "field"), [
    ("page=1000000000000000000", "page"), ("page=9223372036854775808", "page"),
    ("limit=" + "9" * 4000, "limit"), ("page=1&page=2", "page"), ("page=0x1", "page"),
    ("page=%EF%BC%91", "page"), ("category_id=9223372036854775808", "category_id.0"),
    ("min_price=1e400", "min_price"), ("max_price=NaN", "max_price"),
    ("search=%zz&colour=1", "colour"),
])
def test_a_value_in_a_query_beyond_its_bounds_is_422(client, query, field):
    found = problem(client.get(f"products?{query}"), 422, "validation_failed")
    assert [(d["field"], d["in"]) for d in found["details"]] == [(field, "query")]


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "products/1"), ("GET", "categories"), ("GET", "categories/1"), ("POST", "products"),
    ("PATCH", "products/1"), ("DELETE", "products/1"), ("POST", "categories"), ("GET", "users/me"),
    ("GET", "transactions/1"), ("POST", "transactions"), ("GET", "auth/sessions"),
    ("GET", "/api/v2/users/me"), ("POST", "transactions/1/refund"), ("POST", "auth/login"),
])
def test_a_parameter_that_nothing_knows_is_refused_everywhere(client, admin, method, path):
    response = client.open(method, f"{path}?colour=red", token=admin.token)
    found = problem(response, 422, "validation_failed")
    assert ("colour", "query") in [(d["field"], d["in"]) for d in found["details"]]


# Whatever is thrown at it

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=6)
NAMES = ["name", "price", "stock", "sku", "category_id", "description", "items", "email", "role",
         "password", "product_id", "quantity", "refresh_token", "token"]
PATHS = ["products", "categories", "transactions", "users", "auth/login", "auth/refresh",
         "/api/v2/users", "auth/password/reset"]


@settings(max_examples=50, deadline=None, database=None,
          suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), body=st.one_of(
    st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(NAMES), JSON).map(lambda value: json.dumps(value).encode()),
))
def test_no_body_is_an_internal_error(client, admin, path, body):
    response = post(client, admin, body, path=path)
    assert response.status_code in (201, 400, 401, 409, 422, 429)
    assert not INSIDE.search(response.data)


@settings(max_examples=40, deadline=None, database=None,
          suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(["products", "users", "/api/v2/users", "transactions", "reports/sales",
                             "reports/transactions"]),
       query=st.dictionaries(
           st.sampled_from(["page", "limit", "cursor", "sort", "order", "search", "category_id",
                            "min_price", "in_stock", "count", "role", "from", "start_date",
                            "end_date", "group_by", "status", "user_id"]),
           st.one_of(st.text(st.characters(codec="utf-8"), max_size=12), st.integers().map(str),
                     st.dates().map(str), st.sampled_from(["name", "asc", "exact", "2026-01-01"])),
           max_size=4))
def test_no_query_is_an_internal_error(client, admin, path, query):
    response = client.get(path, token=admin.token, query_string=query)
    assert response.status_code in (200, 400, 422)
    assert response.status_code == 200 or not INSIDE.search(response.data)


# The database


def test_a_fault_of_ours_is_500_and_tells_nothing(make_app, make_client, make_database):
    url = make_database()
    shop = make_client(make_app(DATABASE_URL=url, CACHE_TYPE="NullCache", LOG_LEVEL="ERROR"))
    with psycopg.connect(url) as conn:
        conn.execute("ALTER VIEW products_v1 RENAME TO mislaid")
    for path in ("products?count=none", "products/1"):
        problem(shop.get(path), 500, "internal_error")


def test_a_database_that_is_away_is_503_with_a_time_to_wait(make_app, make_client, tmp_path):
    shop = make_client(make_app(DATABASE_URL=f"postgresql:///shop?host={tmp_path}"))
    response = shop.get("products?search=away")
    problem(response, 503, "unavailable")
    assert int(response.headers["Retry-After"]) > 0


def test_a_statement_that_takes_too_long_is_504(make_app, make_client, make_database):
    url = make_database()
    shop = make_client(make_app(DATABASE_URL=url, STATEMENT_TIMEOUT_MS="100"))
    with psycopg.connect(url) as locker:
        locker.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        problem(shop.get("products?search=slow"), 504, "timeout")
    assert shop.get("products?search=slow").status_code == 200


# Below Flask: gunicorn itself


def raw(server, *parts):
    """(status, headers, body) of what a server answers to these bytes. The rest may stay unsent."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        try:
            for part in parts:
                wire.sendall(part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        data = b""
        try:
            while chunk := wire.recv(65536):
                data += chunk
        except ConnectionResetError:
            pass
    head, _, body = data.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    return int(line.split()[1]), dict(field.split(": ", 1) for field in fields), body


HEAD = b"POST /api/v1/auth/login HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n" \
       b"Connection: close\r\n"


def test_a_body_that_says_it_is_over_10_mb_is_413_before_it_is_sent(server):
    status, headers, body = raw(server, HEAD + b"Content-Length: 10485761\r\n\r\n")
    assert status == 413
    shaped(status, headers, body, "payload_too_large")


def test_a_body_in_chunks_that_grows_over_10_mb_is_413(server):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    status, headers, body = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n",
                                *itertools.repeat(chunk, 161), b"0\r\n\r\n")
    assert status == 413
    shaped(status, headers, body, "payload_too_large")


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_of_10_mb_is_read(server, framing):
    body = b'{"email": "nobody@example.com"}'.ljust(10 * 1024 * 1024)
    if framing == "length":
        answer = raw(server, HEAD + b"Content-Length: 10485760\r\n\r\n", body)
    else:
        answer = raw(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"A00000\r\n", body,
                     b"\r\n0\r\n\r\n")
    shaped(*answer, "validation_failed")


@pytest.mark.parametrize("request_", [
    b"\r\n\r\nnonsense\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
    b"GET / FTP/1.1\r\n\r\n", b"G\xffT / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    b"GET / HTTP/1.1\r\nBroken header\r\n\r\n", b"GET / HTTP/1.1\r\nA b: c\r\n\r\n",
    b"GET / HTTP/1.1\r\n: c\r\n\r\n", b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, nonsense\r\n\r\n",
], ids=lambda request: ascii(request[:30]))
def test_what_is_not_http_is_400_in_the_same_shape(server, request_):
    status, headers, body = raw(server, request_ + b"\r\n\r\n")
    assert status == 400
    shaped(status, headers, body, "bad_request")
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("chunks", [
    b"x\r\n{}\r\n0\r\n\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"-2\r\n{}\r\n", b"2\r\n{}xx0\r\n\r\n",
    b"FFFFFFFFFFFFFFFFF\r\n{}",
])
def test_a_body_in_broken_chunks_is_400(server, chunks):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(head + chunks)
        wire.shutdown(socket.SHUT_WR)
        answer = wire.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer
    assert not INSIDE.search(answer.partition(b"\r\n\r\n")[2])


# Problems explain themselves


@pytest.mark.parametrize("code", PROBLEMS)
def test_every_code_has_a_page_that_explains_it(client, code):
    status, title, _ = PROBLEMS[code]
    response = client.get(f"/problems/{code}")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    found = response.json
    assert (found["code"], found["status"], found["title"]) == (code, status, title)
    assert found["meaning"].endswith(".")


def test_the_contracts_codes_are_all_there():
    contract = """bad_request 400, malformed_json 400, authentication_required 401,
        invalid_credentials 401, token_expired 401, token_revoked 401, forbidden 403, not_found 404,
        method_not_allowed 405, not_acceptable 406, conflict 409, email_taken 409, sku_taken 409,
        name_taken 409, category_in_use 409, out_of_stock 409, request_in_progress 409, gone 410,
        request_timeout 408, precondition_failed 412, payload_too_large 413,
        uri_too_long 414, unsupported_media_type 415, headers_too_large 431,
        validation_failed 422, idempotency_key_reused 422, precondition_required 428,
        rate_limited 429, internal_error 500, unavailable 503, timeout 504"""
    codes = dict(pair.split() for pair in contract.split(","))
    assert {code: str(status) for code, (status, *_) in PROBLEMS.items()} == codes


# What every answer has


@pytest.fixture(params=[
    ("GET", "products", 200), ("HEAD", "products", 200), ("GET", "products/0", 404),
    ("GET", "products?x=1", 422), ("PUT", "products", 405), ("GET", "users", 401),
    ("OPTIONS", "products", 200), ("GET", "/health", 200), ("GET", "/nowhere", 404),
    ("GET", "/", 200), ("GET", "/api/v1/docs", 200), ("GET", "/api/v1/openapi.json", 200),
    ("GET", "/problems/gone", 200), ("GET", "/metrics", 401), ("GET", "/docs/nothing", 404),
], ids=lambda param: " ".join(map(str, param)))
def any_answer(request):
    return request.param


def test_every_answer_has_the_security_headers_and_an_id(client, any_answer):
    method, path, status = any_answer
    response = client.open(method, path)
    assert response.status_code == status
    assert SECURITY.items() <= dict(response.headers).items()
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"])
    for name in ("Server", "X-Powered-By", "Strict-Transport-Security"):
        assert name not in response.headers
    for name in (*SECURITY, "X-Request-ID", "Content-Type", "Content-Length"):
        assert len(response.headers.getlist(name)) <= 1


def test_gunicorn_adds_nothing_to_that(server):
    answer = server.call("GET", "/nowhere")
    assert SECURITY.items() <= dict(answer.headers).items()
    assert "python" not in answer.headers.get("Server", "").lower()


def test_production_asks_for_https(make_app, make_client):
    shop = make_client(make_app(APP_ENV="production"))
    assert "max-age=" in shop.get("products").headers["Strict-Transport-Security"]


@pytest.mark.parametrize("sent", ["a", "A-b_c.9", "x" * 64, "0f9c2b7e-1d"])
def test_a_sane_request_id_is_kept(client, any_answer, sent):
    method, path, _ = any_answer
    response = client.open(method, path, headers={"X-Request-ID": sent})
    assert response.headers["X-Request-ID"] == sent
    if response.headers.get("Content-Type") == "application/problem+json":
        assert response.json["request_id"] == sent


@pytest.mark.parametrize("sent", ["", " ", "x" * 65, "a b", "ä", "<script>", "a;b", "a,b", "a/b",
                                  "{}", "a\tb", "%0d%0a"])
def test_another_request_id_is_replaced(client, sent):
    found = client.get("/nowhere", headers={"X-Request-ID": sent}).headers["X-Request-ID"]
    assert re.fullmatch("[0-9a-f]{32}", found)


def test_no_two_requests_have_one_id(client):
    ids = {client.get("/health/live").headers["X-Request-ID"] for _ in range(50)}
    assert len(ids) == 50


# Browsers from elsewhere (CORS)

ORIGIN = "https://shop.example.com"


@pytest.fixture(scope="module")
def shop(make_app, make_client):
    return make_client(make_app(ALLOWED_ORIGINS=f"{ORIGIN},https://admin.example.com"))


@pytest.fixture(scope="module")
def open_shop(make_app, make_client):
    return make_client(make_app(ALLOWED_ORIGINS="*"))


def preflight(client, origin, method="PATCH", headers="authorization, if-match"):
    return client.options("products/1", headers={
        "Origin": origin, "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers})


def test_a_preflight_of_an_allowed_origin_is_answered(shop):
    response = preflight(shop, ORIGIN, headers="authorization, content-type, idempotency-key, "
                                               "if-match, if-none-match, x-request-id")
    assert response.status_code in (200, 204)
    headers = response.headers
    assert headers["Access-Control-Allow-Origin"] == ORIGIN
    assert headers["Access-Control-Allow-Credentials"] == "true"
    assert {"GET", "HEAD", "POST", "PATCH", "DELETE"} <= set(
        headers["Access-Control-Allow-Methods"].split(", "))
    assert {"authorization", "content-type", "idempotency-key", "if-match", "if-none-match",
            "x-request-id"} <= set(headers["Access-Control-Allow-Headers"].lower().split(", "))
    assert int(headers["Access-Control-Max-Age"]) > 0


def test_the_headers_of_a_preflight_are_text_as_every_wsgi_server_wants_them(shop):
    sent, builder = [], EnvironBuilder("/api/v1/products", method="OPTIONS", headers={
        "Origin": ORIGIN, "Access-Control-Request-Method": "PATCH"})
    shop.app.wsgi_app(builder.get_environ(), lambda status, headers, *_: sent.extend(headers))
    assert "Access-Control-Max-Age" in dict(sent)
    assert [(name, value) for name, value in sent if type(value) is not str] == []


@pytest.mark.parametrize("path", ["products", "products/0", "users", "products?x=1", "/nowhere"])
def test_answers_to_an_allowed_origin_may_be_read_there(shop, path):
    response = shop.get(path, headers={"Origin": ORIGIN})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert {"ETag", "Link", "Location", "Retry-After", "X-Request-ID", "RateLimit"} <= set(
        response.headers["Access-Control-Expose-Headers"].split(", "))


def test_caches_keep_answers_to_origins_apart(shop):
    for origin in (ORIGIN, "https://evil.example.com", None):
        for response in (preflight(shop, origin or ""), shop.get("products", headers={
                "Origin": origin} if origin else None)):
            assert "Origin" in response.vary


@pytest.mark.parametrize("origin", [
    "https://evil.example.com", "http://shop.example.com", "https://shop.example.com.evil.com",
    "https://shop.example.com:8443", "https://shopXexample.com", "null", "",
    "https://evil.com/https://shop.example.com",
])
def test_another_origin_is_allowed_nothing(shop, origin):
    for response in (preflight(shop, origin), shop.get("products", headers={"Origin": origin}),
                     shop.get("products")):
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Access-Control-Allow-Credentials" not in response.headers


def test_a_star_never_goes_with_credentials(open_shop):
    for origin in (ORIGIN, "https://evil.example.com", "null"):
        for response in (preflight(open_shop, origin),
                         open_shop.get("products", headers={"Origin": origin}),
                         open_shop.get("/nowhere", headers={"Origin": origin})):
            assert response.headers["Access-Control-Allow-Origin"] in ("*", origin)
            assert "Access-Control-Allow-Credentials" not in response.headers


def test_a_star_among_origins_goes_without_credentials_too(make_app, make_client):
    shop = make_client(make_app(ALLOWED_ORIGINS=f"*,{ORIGIN}"))
    response = shop.get("products", headers={"Origin": ORIGIN})
    assert "Access-Control-Allow-Credentials" not in response.headers


def test_without_the_setting_no_origin_is_allowed(client):
    for response in (preflight(client, ORIGIN), client.get("products", headers={"Origin": ORIGIN})):
        assert "Access-Control-Allow-Origin" not in response.headers


def test_a_registration_from_elsewhere_may_be_read_there(shop):
    response = shop.post("auth/register", headers={"Origin": ORIGIN}, json={
        "email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada"})
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
