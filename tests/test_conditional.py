"""Conditional requests: tags, 304 for who has it already, 412 for who would overwrite."""
import gzip
import re
from concurrent.futures import ThreadPoolExecutor

import brotli
import pytest
from backports import zstd

from tests.conftest import register, unique

DECODE = {"br": brotli.decompress, "zstd": zstd.decompress, "gzip": gzip.decompress}
STRONG = re.compile(r'"[\x21\x23-\x7e]+"')


@pytest.fixture(scope="module")
def resources(client, admin):
    """{name: (path, token)} of everything that has a tag; each is large enough to be compressed."""
    token = admin.token
    def post(path, **body):
        response = client.post(path, token=token, json=body)
        assert response.status_code in (200, 201), response.text
        return response.json["id"]
    category = post("categories", name=unique("C"))
    product = post("products", name="Tea", price=1, stock=99, description="leaf " * 300,
                   category_id=category)
    items = [{"product_id": post("products", name="x" * 150, price=1, stock=9), "quantity": 1}
             for _ in range(5)]
    sale = post("transactions", items=items)
    for _ in range(6):
        register(client)
        post("categories", name=unique("C"))
    return {
        "product": (f"products/{product}", None),
        "products": (f"products?category_id={category}", None),
        "category": (f"categories/{category}", None),
        "categories": ("categories", None),
        "sale": (f"transactions/{sale}", token),
        "sales": ("transactions", token),
        "user": (f"users/{admin.id}", token),
        "me": ("users/me", token),
        "users": ("users", token),
        "user of version 2": (f"/api/v2/users/{admin.id}", token),
        "users of version 2": ("/api/v2/users", token),
        "product of version 2": (f"/api/v2/products/{product}", None),
        "sessions": ("auth/sessions", token),
        "sales report": ("reports/sales?start_date=2020-01-01&end_date=2030-01-01", token),
        "document": ("/api/v1/openapi.json", None),
    }


NAMES = ["product", "products", "category", "categories", "sale", "sales", "user", "me", "users",
         "user of version 2", "users of version 2", "product of version 2", "sessions",
         "sales report", "document"]


@pytest.fixture(params=NAMES)
def resource(request, resources):
    return resources[request.param]


def test_everything_that_can_be_read_has_a_strong_tag(client, resource):
    path, token = resource
    first = client.get(path, token=token)
    assert first.status_code == 200
    assert STRONG.fullmatch(first.headers["ETag"])
    assert client.get(path, token=token).headers["ETag"] == first.headers["ETag"]


@pytest.mark.parametrize("encoding", DECODE)
def test_the_tag_is_the_same_however_the_answer_is_packed(client, resource, encoding):
    path, token = resource
    plain = client.get(path, token=token)
    for _ in range(2):  # from the cache, the second time
        packed = client.get(path, token=token, headers={"Accept-Encoding": encoding})
        assert packed.headers["ETag"] == plain.headers["ETag"]
        if len(plain.data) >= 500:
            assert packed.headers["Content-Encoding"] == encoding
            assert DECODE[encoding](packed.data) == plain.data


@pytest.mark.parametrize("encoding", [None, "br", "zstd", "gzip"])
def test_who_has_it_already_gets_304_and_no_body(client, resource, encoding):
    path, token = resource
    accept = {"Accept-Encoding": encoding} if encoding else {}
    full = client.get(path, token=token, headers=accept)
    tag = full.headers["ETag"]
    for sent in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        for method in ("GET", "HEAD"):
            response = client.open(method, path, token=token,
                                   headers=accept | {"If-None-Match": sent})
            assert (response.status_code, response.data) == (304, b"")
            assert "Content-Type" not in response.headers
            assert "Content-Encoding" not in response.headers
            for name in ("ETag", "Cache-Control", "Vary"):  # RFC 9110, 15.4.5
                assert response.headers.get(name) == full.headers.get(name), name


def test_who_has_another_gets_all_of_it(client, resource):
    path, token = resource
    full = client.get(path, token=token)
    for sent in ('"other"', 'W/"other"', full.headers["ETag"][:-2] + '"', '""'):
        response = client.get(path, token=token, headers={"If-None-Match": sent})
        assert (response.status_code, response.data) == (200, full.data)


def test_head_answers_as_get_does_without_the_body(client, resource):
    path, token = resource
    get, head = client.get(path, token=token), client.head(path, token=token)
    assert (head.status_code, head.data) == (200, b"")
    same = ("Content-Type", "Content-Length", "ETag", "Cache-Control", "Vary", "Link")
    assert {n: head.headers.get(n) for n in same} == {n: get.headers.get(n) for n in same}


@pytest.mark.parametrize("path", [
    "/", "/health", "/health/live", "/health/ready", "/api/v1/docs", "/problems/not_found",
    "/docs/page.css", "reports/transactions?start_date=2020-01-01&end_date=2030-01-01",
])
def test_head_works_wherever_else_get_does(client, admin, path):
    get, head = client.get(path, token=admin.token), client.head(path, token=admin.token)
    assert get.status_code == head.status_code == 200
    assert head.data == b""
    get.close()
    head.close()


def test_head_of_what_is_missing_is_404_without_a_body(client):
    for path in ("products/9223372036854775807", "/nowhere"):
        response = client.head(path)
        assert (response.status_code, response.data) == (404, b"")


def test_the_tag_moves_with_every_change(client, admin, make_category, make_product):
    category = make_category()["id"]
    product = make_product(category_id=category)
    paths = [f"products/{product['id']}", f"products?category_id={category}"]
    before = [client.get(path).headers["ETag"] for path in paths]
    changed = client.patch(paths[0], token=admin.token, json={"stock": 12345})
    after = [client.get(path).headers["ETag"] for path in paths]
    assert changed.headers["ETag"] == after[0]
    assert all(old != new for old, new in zip(before, after, strict=True))
    for path, old in zip(paths, before, strict=True):
        assert client.get(path, headers={"If-None-Match": old}).status_code == 200


def test_the_answer_to_a_creation_has_the_new_resources_tag(client, admin):
    for path, body in (("products", {"name": "Tea", "price": 1}),
                       ("categories", {"name": unique("C")})):
        created = client.post(path, token=admin.token, json=body)
        assert client.get(created.headers["Location"]).headers["ETag"] == created.headers["ETag"]


# If-Match


@pytest.fixture(params=["product", "category", "user", "user of version 2"])
def mine(request, client, admin, make_product, make_category):
    """(path, token, a change, another one) of something to change and delete."""
    if request.param == "product":
        return f"products/{make_product()['id']}", admin.token, {"stock": 1}, {"stock": 2}
    if request.param == "category":
        path = f"categories/{make_category()['id']}"
        return path, admin.token, {"name": unique("A")}, {"name": unique("B")}
    person = register(client)
    if request.param == "user":
        return f"users/{person.id}", person.token, {"name": "Bob"}, {"name": "Eve"}
    return (f"/api/v2/users/{person.id}", person.token, {"profile": {"name": "Bob"}},
            {"profile": {"name": "Eve"}})


def test_a_change_with_the_tag_of_the_moment_is_made(client, mine):
    path, token, change, other = mine
    tag = client.get(path, token=token).headers["ETag"]
    first = client.patch(path, token=token, json=change, headers={"If-Match": f'"old", {tag}'})
    assert first.status_code == 200
    second = client.patch(path, token=token, json=other,
                          headers={"If-Match": first.headers["ETag"]})
    assert second.status_code == 200
    assert client.get(path, token=token).headers["ETag"] == second.headers["ETag"]
    done = client.delete(path, token=token, headers={"If-Match": second.headers["ETag"]})
    assert done.status_code == 204


def test_a_change_with_a_stale_tag_is_412_and_changes_nothing(client, mine):
    path, token, change, other = mine
    stale = client.get(path, token=token).headers["ETag"]
    current = client.patch(path, token=token, json=change).headers["ETag"]
    for sent in (stale, f"W/{current}", '"other"', '""', current.strip('"') + "x", ","):
        headers = {"If-Match": sent}
        for response in (client.patch(path, token=token, json=other, headers=headers),
                         client.delete(path, token=token, headers=headers)):
            assert (response.status_code, response.json["code"]) == (412, "precondition_failed")
    assert client.get(path, token=token).headers["ETag"] == current


def test_a_star_matches_whatever_there_is(client, mine):
    path, token, change, _ = mine
    star = {"If-Match": "*"}
    assert client.patch(path, token=token, json=change, headers=star).status_code == 200
    assert client.delete(path, token=token, headers=star).status_code == 204
    gone = client.patch(path, token=token, json=change, headers=star)
    assert gone.status_code in (401, 404)  # 401 where one has deleted oneself


def test_a_tag_of_a_packed_answer_is_good_for_a_change(client, admin, make_product):
    path = f"products/{make_product(description='leaf ' * 300)['id']}"
    for encoding in DECODE:
        packed = client.get(path, headers={"Accept-Encoding": encoding})
        assert packed.headers["Content-Encoding"] == encoding
        changed = client.patch(path, token=admin.token, json={"stock": len(encoding)},
                               headers={"If-Match": packed.headers["ETag"]})
        assert changed.status_code == 200


def test_a_sale_makes_the_products_tag_stale(client, admin, user, make_product):
    product = make_product()
    path = f"products/{product['id']}"
    tag = client.get(path).headers["ETag"]
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": product["id"], "quantity": 1}]})
    changed = client.patch(path, token=admin.token, json={"stock": 100}, headers={"If-Match": tag})
    assert changed.status_code == 412


@pytest.mark.parametrize("kind", ["product", "category", "user"])
def test_of_ten_writers_with_one_tag_exactly_one_wins(server, client, admin, make_product,
                                                      make_category, kind):
    token = admin.token
    if kind == "product":
        path, name = f"products/{make_product()['id']}", "stock"
    elif kind == "category":
        path, name = f"categories/{make_category()['id']}", "name"
    else:
        person = register(client)
        path, token, name = f"users/{person.id}", person.token, "name"
    values = list(range(10)) if name == "stock" else [unique("Name") for _ in range(10)]
    tag = server.call("GET", path, token=token).headers["ETag"]
    def write(value):
        return server.call("PATCH", path, token=token, json={name: value},
                           headers={"If-Match": tag})
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(write, values))
    assert sorted(answer.status for answer in answers) == [200] + [412] * 9
    winner = next(answer for answer in answers if answer.status == 200)
    assert server.call("GET", path, token=token).json() == winner.json()


@pytest.mark.parametrize("kind", ["product", "category", "user"])
def test_a_shop_may_insist_on_if_match(make_app, make_client, admin, kind, make_category,
                                       make_product, user):
    insisting = make_client(make_app(REQUIRE_IF_MATCH="1"))
    path, token, change = {
        "product": lambda: (f"products/{make_product()['id']}", admin.token, {"stock": 1}),
        "category": lambda: (f"categories/{make_category()['id']}", admin.token,
                             {"name": unique("N")}),
        "user": lambda: (f"users/{user.id}", user.token, {"name": "Bob"}),
    }[kind]()
    for response in (insisting.patch(path, token=token, json=change),
                     insisting.delete(path, token=token)):
        assert (response.status_code, response.json["code"]) == (428, "precondition_required")
    tag = insisting.get(path, token=token).headers["ETag"]
    done = insisting.patch(path, token=token, json=change, headers={"If-Match": tag})
    assert done.status_code == 200
    assert insisting.delete(path, token=token, headers={"If-Match": "*"}).status_code == 204
