"""Idempotency-Key: a request that is sent again gets the first answer, and does nothing more."""
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.conftest import execute, unique


@pytest.fixture(params=["products", "transactions"])
def call(request, client, admin, make_product):
    """``call(key, **changes)`` sends a request; ``call.made()`` counts what came of it."""
    class Call:
        path, token = request.param, admin.token

        def __init__(self):
            self.name = unique("Product ")
            self.product = make_product()
            self.body = {
                "products": {"name": self.name, "price": "3.50"},
                "transactions": {"items": [{"product_id": self.product["id"], "quantity": 2}]},
            }[self.path]
            self.other = {
                "products": {"name": self.name, "price": "3.51"},
                "transactions": {"items": [{"product_id": self.product["id"], "quantity": 3}]},
            }[self.path]

        def __call__(self, key, body=None, token=None, version="v1"):
            return client.post(f"/api/{version}/{self.path}", token=token or self.token,
                               json=body or self.body, headers={"Idempotency-Key": key})

        def made(self):
            if self.path == "products":
                found = client.get("products", query_string={"search": self.name})
                return found.json["pagination"]["total"]
            stock = client.get(f"products/{self.product['id']}").json["stock"]
            return (100 - stock) // 2
    return Call()


def test_a_repeated_request_gets_the_first_answer_byte_for_byte(call):
    key = unique("key")
    first = call(key)
    assert first.status_code == 201
    assert "Idempotent-Replayed" not in first.headers
    for _ in range(3):
        again = call(key)
        assert (again.status_code, again.data) == (201, first.data)
        assert again.headers["Idempotent-Replayed"] == "true"
        for name in ("Location", "ETag", "Content-Type", "Cache-Control"):
            assert again.headers[name] == first.headers[name]
    assert call.made() == 1


def test_the_first_answer_stays_whatever_becomes_of_the_resource(client, admin, make_product):
    def create(key):
        return client.post("products", token=admin.token, json={"name": "Tea", "price": 1},
                           headers={"Idempotency-Key": key})
    key = unique("key")
    first = create(key)
    path = f"products/{first.json['id']}"
    client.patch(path, token=admin.token, json={"price": 2})
    assert create(key).data == first.data
    client.delete(path, token=admin.token)
    assert create(key).data == first.data
    assert client.get(path).status_code == 404


def test_a_key_is_good_for_both_versions(call):
    key = unique("key")
    first, again = call(key), call(key, version="v2")
    assert (again.status_code, again.data) == (201, first.data)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"].replace("/v1/", "/v2/")
    assert call.made() == 1
    second = call(unique("key"), version="v2")
    assert (second.status_code, "Idempotent-Replayed" in second.headers) == (201, False)
    assert call.made() == 2


def test_the_same_body_may_be_spelled_otherwise(client, admin):
    name, headers = unique("P"), {"Idempotency-Key": unique("key")}
    first = client.post("products", token=admin.token, json={"name": name, "price": "1.00"},
                        headers=headers)
    for again in (
        client.post("products", token=admin.token, json={"stock": 0, "price": 1, "name": name},
                    headers=headers),
        client.post("products", token=admin.token, data={"price": "1", "name": name},
                    headers=headers),
    ):
        assert (again.status_code, again.data) == (201, first.data)


def test_a_key_with_another_body_is_refused(call):
    key = unique("key")
    first = call(key)
    for version in ("v1", "v2"):
        reused = call(key, call.other, version=version)
        assert (reused.status_code, reused.json["code"]) == (422, "idempotency_key_reused")
    assert call.made() == 1
    assert call(key).data == first.data


def test_a_key_of_another_route_is_refused(client, admin, make_product):
    headers = {"Idempotency-Key": unique("key")}
    items = {"items": [{"product_id": make_product()["id"], "quantity": 1}]}
    first = client.post("products", token=admin.token, json={"name": "Tea", "price": 1},
                        headers=headers)
    assert first.status_code == 201
    reused = client.post("transactions", token=admin.token, json=items, headers=headers)
    assert (reused.status_code, reused.json["code"]) == (422, "idempotency_key_reused")


def test_keys_belong_to_their_user(client, user, other, make_product):
    product, headers = make_product(), {"Idempotency-Key": unique("key")}
    body = {"items": [{"product_id": product["id"], "quantity": 1}]}
    sales = [client.post("transactions", token=person.token, json=body, headers=headers).json
             for person in (user, other, user, other)]
    assert [sale["user_id"] for sale in sales] == [user.id, other.id, user.id, other.id]
    assert len({sale["id"] for sale in sales}) == 2


def test_without_a_key_every_request_counts(client, admin, make_product):
    product = make_product()
    body = {"items": [{"product_id": product["id"], "quantity": 1}]}
    ids = {client.post("transactions", token=admin.token, json=body).json["id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "schlüssel", "a\tb", "a\x7fb", "\xa0"],
                         ids=ascii)
def test_a_key_that_is_none_is_refused(call, key):
    response = call(key)
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")
    assert [(d["field"], d["in"]) for d in response.json["details"]] == [
        ("Idempotency-Key", "header")]
    assert call.made() == 0


@pytest.mark.parametrize("call", ["products"], indirect=True)
@pytest.mark.parametrize("key", ["!", "~" * 255, "';DROP/**/TABLE/**/x;--", '"quoted"', "%00", "0"])
def test_any_visible_ascii_is_a_key(call, key):
    first = call(key)
    assert first.status_code == 201
    assert call(key).data == first.data
    assert call.made() == 1


def test_a_refusal_is_not_kept(client, admin, user, make_product):
    product, headers = make_product(stock=1), {"Idempotency-Key": unique("key")}
    body = {"items": [{"product_id": product["id"], "quantity": 2}]}
    def buy():
        return client.post("transactions", token=user.token, json=body, headers=headers)
    for _ in range(2):
        refused = buy()
        assert (refused.status_code, refused.json["code"]) == (409, "out_of_stock")
        assert "Idempotent-Replayed" not in refused.headers
    client.patch(f"products/{product['id']}", token=admin.token, json={"stock": 2})
    done = buy()
    assert (done.status_code, "Idempotent-Replayed" in done.headers) == (201, False)
    assert buy().data == done.data


def test_a_key_of_a_refusal_is_free_for_another_body(client, admin, make_product):
    sku, headers = make_product(sku=unique("S"))["sku"], {"Idempotency-Key": unique("key")}
    statuses = [
        client.post("products", token=admin.token, json=body, headers=headers).status_code
        for body in ({"name": "", "price": 1}, {"name": "x", "price": 1, "category_id": 2**62},
                     {"name": "x", "price": 1, "sku": sku}, {"name": "x", "price": 1},
                     {"name": "x", "price": 2})
    ]
    assert statuses == [422, 422, 409, 201, 422]


def test_who_may_not_call_learns_nothing_from_a_key(client, admin, user):
    headers, body = {"Idempotency-Key": unique("key")}, {"name": "Tea", "price": 1}
    assert client.post("products", token=admin.token, json=body, headers=headers).status_code == 201
    assert client.post("products", json=body, headers=headers).status_code == 401
    assert client.post("products", token=user.token, json=body, headers=headers).status_code == 403


@pytest.mark.parametrize(("age", "replayed"), [("23 hours 59 minutes", True),
                                               ("24 hours 1 second", False)])
def test_a_key_is_kept_for_a_day(call, database_url, age, replayed):
    key = unique("key")
    first = call(key)
    execute(database_url, f"UPDATE idempotency_keys SET created_at = created_at - interval '{age}' "
                          f"WHERE key = '{key}'")
    again = call(key)
    assert again.status_code == 201
    assert (again.data == first.data) is replayed
    assert call.made() == (1 if replayed else 2)
    assert call(key).data == again.data


def test_an_expired_key_may_have_another_body(call, database_url):
    key = unique("key")
    call(key)
    execute(database_url, "UPDATE idempotency_keys SET created_at = now() - interval '25 hours' "
                          f"WHERE key = '{key}'")
    assert call(key, call.other).status_code == 201
    assert call(key).json["code"] == "idempotency_key_reused"


def test_a_key_whose_request_still_runs_is_told_so_at_once(client, user, make_product,
                                                           database_url):
    product, headers = make_product(), {"Idempotency-Key": unique("key")}
    body = {"items": [{"product_id": product["id"], "quantity": 1}]}
    def buy():
        return client.post("transactions", token=user.token, json=body, headers=headers)
    with psycopg.connect(database_url) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(f"SELECT FROM products WHERE id = {product['id']} FOR UPDATE")
        first = pool.submit(buy)  # waits for the product
        while not execute(database_url, "SELECT pid FROM pg_stat_activity WHERE wait_event_type = "
                                        "'Lock' AND datname = current_database()"):
            time.sleep(0.01)
        begun = time.monotonic()
        second = buy()
        assert time.monotonic() - begun < 4  # a lock is waited for for five seconds
        holder.rollback()
        assert (second.status_code, second.json["code"]) == (409, "request_in_progress")
        assert second.headers["Retry-After"] == "1"
        assert first.result().status_code == 201
    assert buy().data == first.result().data


def test_many_equal_requests_at_once_make_one(server, call):
    key = unique("key")
    def send(_):
        return server.call("POST", call.path, token=call.token, json=call.body,
                           headers={"Idempotency-Key": key})
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(send, range(20)))
    done = [answer for answer in answers if answer.status == 201]
    assert len({answer.body for answer in done}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in done) == 1
    for answer in answers:
        if answer not in done:
            assert (answer.status, answer.json()["code"]) == (409, "request_in_progress")
            assert answer.headers["Retry-After"] == "1"
    assert call.made() == 1
    assert send(0).body == done[0].body


def test_key_and_write_are_stored_together_or_not_at_all(make_database, make_app, make_client,
                                                         database_url):
    """In a database that can't store keys nothing is sold either."""
    url = make_database()
    shop = make_client(make_app(DATABASE_URL=url))
    person = shop.post("auth/register", json={
        "email": "ada@example.com", "password": "a long walk home", "name": "Ada"}).json
    execute(url, "UPDATE users SET role = 'admin'")
    execute(url, "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                 "$$ BEGIN RAISE 'no'; END $$; CREATE TRIGGER refuse BEFORE INSERT ON "
                 "idempotency_keys FOR EACH ROW EXECUTE FUNCTION refuse()")
    body = {"name": "Tea", "price": 1}
    failed = shop.post("products", token=person["token"], json=body,
                       headers={"Idempotency-Key": "k"})
    assert failed.status_code == 500
    assert execute(url, "SELECT count(*) FROM products") == [(0,)]
    assert shop.post("products", token=person["token"], json=body).status_code == 201
