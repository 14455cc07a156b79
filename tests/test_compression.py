"""Compression: as the client prefers, for whatever is text and no secret."""
import gzip

import brotli
import pytest
import redis
from backports import zstd

from tests.conftest import PASSWORD, unique

DECODE = {"br": brotli.decompress, "zstd": zstd.decompress, "gzip": gzip.decompress,
          None: lambda data: data}
ALL = "gzip, deflate, br, zstd"


@pytest.fixture(scope="module")
def product(client, admin):
    """The path of a product that is worth packing."""
    response = client.post("products", token=admin.token, json={
        "name": unique("Tea "), "price": 1, "stock": 100, "description": "leaf and bud " * 200})
    return f"products/{response.json['id']}"


def packed(client, path, accept, token=None):
    return client.get(path, token=token, headers={"Accept-Encoding": accept})


# Which


@pytest.mark.parametrize(("accept", "encoding"), [
    ("gzip", "gzip"), ("br", "br"), ("zstd", "zstd"), ("GZip", "gzip"), ("BR", "br"),
    (ALL, "zstd"), ("gzip, br", "br"), ("gzip, zstd", "zstd"), ("br,gzip", "br"),
    ("gzip;q=1.0, br;q=0.5", "gzip"), ("gzip;q=0.2, br;q=0.3, zstd;q=0.1", "br"),
    ("gzip;q=0.001", "gzip"), ("br;q=1, gzip;q=0", "br"), ("gzip ; q=0.8 , br ; q=0.9", "br"),
    ("*", "zstd"), ("*;q=0.5", "zstd"), ("zstd;q=0, *", "br"), ("zstd;q=0, br;q=0, *;q=1", "gzip"),
    ("gzip, *;q=0.5", "gzip"), ("gzip, *;q=0", "gzip"), ("gzip;q=0.2, *;q=0.5", "zstd"),
    ("identity;q=0, gzip;q=0.1", "gzip"), ("identity;q=0, *", "zstd"), ("identity;q=0, br", "br"),
    ("identity;q=0.5, gzip;q=0.6", "gzip"), ("compress, deflate, gzip", "gzip"),
    ("", None), ("identity", None), ("deflate", None), ("br;q=0", None), ("*;q=0", None),
    ("gzip;q=0, br;q=0, zstd;q=0", None), ("identity, gzip;q=0.5", None),
    ("identity;q=0.7, br;q=0.5", None), ("snappy, x-lz4", None), (",;,", None),
])
def test_the_encoding_is_what_the_client_prefers(client, product, accept, encoding):
    plain = client.get(product)
    assert "Content-Encoding" not in plain.headers
    for _ in range(2):  # from the cache, the second time
        response = packed(client, product, accept)
        assert response.headers.get("Content-Encoding") == encoding
        assert DECODE[encoding](response.data) == plain.data
        assert int(response.headers["Content-Length"]) == len(response.data)
        assert encoding is None or len(response.data) < len(plain.data) / 3


def test_what_is_not_kept_is_packed_all_the_same(make_app, make_client, product):
    uncached = make_client(make_app(CACHE_TYPE="NullCache"))
    for path in (product, "products?limit=5"):
        plain = uncached.get(path)
        for encoding in ("br", "zstd", "gzip"):
            response = packed(uncached, path, encoding)
            assert response.headers["Content-Encoding"] == encoding
            assert DECODE[encoding](response.data) == plain.data
            assert response.headers["ETag"] == plain.headers["ETag"]


def test_head_tells_of_the_packed_answer(client, product):
    for encoding in ("br", "zstd", "gzip"):
        get = packed(client, product, encoding)
        head = client.head(product, headers={"Accept-Encoding": encoding})
        for name in ("Content-Encoding", "Content-Length", "ETag", "Vary"):
            assert head.headers[name] == get.headers[name]


# What


@pytest.fixture(scope="module")
def sales(client, admin, product):
    """A window that has some sales in it."""
    item = {"product_id": int(product.rpartition("/")[2]), "quantity": 1}
    for _ in range(8):
        client.post("transactions", token=admin.token, json={"items": [item]})
    return "start_date=2020-01-01&end_date=2100-01-01"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip"])
@pytest.mark.parametrize(("path", "kind"), [
    ("products", "application/json"), ("categories", "application/json"),
    ("transactions", "application/json"),
    ("reports/transactions?{window}", "application/json"),
    ("reports/transactions?{window}&format=ndjson", "application/x-ndjson"),
    ("reports/transactions?{window}&format=csv", "text/csv"),
    ("/api/v1/openapi.json", "application/json"), ("/api/v1/docs", "text/html"),
    ("/docs/page.css", "text/css"),
])
def test_every_kind_of_text_is_packed(client, admin, sales, make_category, path, kind, encoding):
    for _ in range(3 if path == "categories" else 0):
        make_category("Category " + unique("x" * 60))
    path = path.format(window=sales)
    plain = client.get(path, token=admin.token)
    response = packed(client, path, encoding, admin.token)
    assert response.headers["Content-Type"].partition(";")[0] == kind
    for answer in (plain, response):
        assert "Accept-Encoding" in answer.vary
    if len(plain.data) >= 500:
        assert response.headers["Content-Encoding"] == encoding
    assert DECODE[response.headers.get("Content-Encoding")](response.data) == plain.data
    assert len(plain.data) >= 500 or path == "/docs/page.css"
    plain.close()
    response.close()


@pytest.mark.parametrize("form", ["json", "ndjson", "csv"])
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip"])
def test_a_report_is_packed_as_it_streams(server, admin, sales, form, encoding):
    path = f"reports/transactions?{sales}&format={form}"
    answer = server.call("GET", path, token=admin.token, headers={"Accept-Encoding": encoding})
    plain = server.call("GET", path, token=admin.token)
    assert answer.headers["Content-Encoding"] == encoding
    assert "Content-Length" not in answer.headers
    assert answer.headers["Report-Rows"] == plain.headers["Report-Rows"]
    assert DECODE[encoding](answer.body) == plain.body


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip"])
def test_a_refusal_is_packed_too(server, encoding):
    headers = {"Accept-Encoding": encoding, "X-Request-ID": "one-for-all"}
    path = "products?" + "&".join(f"unknown{i}=1" for i in range(9))
    plain = server.call("GET", path, headers=headers | {"Accept-Encoding": "identity"})
    answer = server.call("GET", path, headers=headers)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Content-Encoding"] == encoding
    assert DECODE[encoding](answer.body) == plain.body


def test_what_is_small_is_left_as_it_is(client, make_category):
    path = f"categories/{make_category()['id']}"
    response = packed(client, path, ALL)
    assert len(response.data) < 500
    assert "Content-Encoding" not in response.headers
    assert "Accept-Encoding" in response.vary


def test_tokens_are_never_packed(client, user):
    headers = {"Accept-Encoding": ALL}
    login = client.post("auth/login", json={"email": user.email, "password": PASSWORD},
                        headers=headers)
    registration = client.post("auth/register", headers=headers, json={
        "email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada"})
    refresh = client.post("auth/refresh", json={"refresh_token": user.refresh_token},
                          headers=headers)
    for response in (login, registration, refresh):
        assert response.status_code < 300
        assert len(response.data) > 500
        assert "Content-Encoding" not in response.headers
        assert "token" in response.json


# In the cache


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip"])
def test_a_kept_answer_is_packed_once(client, admin, product, redis_url, encoding):
    """What is sent is what Redis has: another text put there, packed, is what comes next."""
    client.patch(product, token=admin.token, json={"stock": len(encoding)})
    first = packed(client, product, encoding)
    for _ in range(2):
        assert packed(client, product, encoding).data == first.data
    with redis.Redis.from_url(redis_url) as memory:
        kept = {key: memory.get(key) for key in memory.scan_iter("{shopfront}:entry:*")}
        (key, entry), = ((k, v) for k, v in kept.items() if v.endswith(first.data))
        memory.set(key, entry.removesuffix(first.data) + b"as it stands", ex=60)
        second = packed(client, product, encoding)
        assert second.headers["X-Cache"] == "hit"
        assert second.headers["Content-Encoding"] == encoding
        assert second.data == b"as it stands"
        memory.delete(key)
    assert packed(client, product, encoding).data == first.data


def test_packed_and_plain_answers_of_a_list_are_kept_apart(client, product):
    path = f"products?search={client.get(product).json['name']}"
    bodies = {encoding: packed(client, path, encoding or "") for encoding in DECODE}
    for encoding, answer in bodies.items():
        again = packed(client, path, encoding or "")
        assert again.headers["X-Cache"] == "hit"
        assert again.data == answer.data
        assert again.headers["Link"] == answer.headers["Link"]
        assert DECODE[encoding](again.data) == bodies[None].data
