"""The cache: what it keeps, for whom, and that no change is ever hidden by it."""
import random
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import redis

from extensions import cache, cache_backends
from tests.conftest import execute, register, unique


@pytest.fixture
def kept(client):
    """Whether the cache has the answer at a path."""
    def ask(path):
        return client.get(path).headers["X-Cache"] == "hit"
    return ask


@pytest.fixture
def fill(client):
    """A function that sees to it that the answers at some paths are in the cache."""
    def ask(*paths):
        for path in paths:
            # A process that stood still for a second has let its lease run out.
            seen = [client.get(path).headers["X-Cache"] for _ in range(4)]
            assert "hit" in seen[1:]
    return ask


@pytest.fixture
def shelf(make_category, make_product):
    """A category and a product of it, and the paths that show them."""
    class Shelf:
        def __init__(self):
            self.category = make_category()
            self.product = make_product(category_id=self.category["id"])
            self.one = f"products/{self.product['id']}"
            self.list = f"products?category_id={self.category['id']}"
            self.page = f"categories/{self.category['id']}"
    return Shelf


@pytest.fixture
def memory(redis_url):
    """What the cache keeps in Redis, raw."""
    with redis.Redis.from_url(redis_url) as raw:
        yield raw


def test_an_answer_is_a_miss_and_then_a_hit(client, shelf):
    mine = shelf()
    for path in (mine.one, mine.list, f"{mine.list}&search=p", mine.page, "categories"):
        first, second = client.get(path), client.get(path)
        assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "hit")
        assert second.data == first.data
        same = ("ETag", "Cache-Control", "Content-Type", "Vary", "Link")
        assert {n: second.headers.get(n) for n in same} == {n: first.headers.get(n) for n in same}
        assert client.head(path).headers["X-Cache"] == "hit"
        tag = {"If-None-Match": first.headers["ETag"]}
        assert client.get(path, headers=tag).headers["X-Cache"] == "hit"


@pytest.mark.parametrize(("spelled", "otherwise"), [
    ("category_id={0}", "category_id={0}&page=1&limit=20&count=exact&sort=created_at&order=desc"),
    ("category_id={0}&sort=price&in_stock=true",
     "in_stock=true&order=asc&category_id={0}&sort=price"),
    ("category_id={0}&min_price=1.5", "category_id={0}&min_price=1.50"),
    ("category_id={0}&search=a+b", "category_id={0}&search=a%20b"),
    ("category_id={0}&category_id=99", "category_id=99&category_id={0}&category_id=99"),
])
def test_a_question_is_one_entry_however_it_is_spelled(client, shelf, spelled, otherwise):
    category = shelf().category["id"]
    first = client.get(f"products?{spelled.format(category)}")
    second = client.get(f"products?{otherwise.format(category)}")
    assert second.headers["X-Cache"] == "hit"
    assert second.data == first.data


@pytest.mark.parametrize("query", ["page=2", "limit=21", "sort=name", "order=asc", "search=x",
                                   "in_stock=true", "in_stock=false", "min_price=1", "max_price=1",
                                   "count=none"])
def test_another_question_is_another_entry(fill, kept, shelf, query):
    mine = shelf()
    fill(mine.list)
    assert not kept(f"{mine.list}&{query}")


# What a write makes stale


def test_a_changed_product_is_seen_everywhere_at_once(client, admin, shelf):
    mine = shelf()
    paths = [mine.one, mine.list, f"{mine.list}&sort=price", "products",
             f"/api/v2/{mine.one}", f"/api/v2/{mine.list}"]
    for price in ("1.00", "2.00", "3.00"):
        for path in paths:
            client.get(path)
        client.patch(mine.one, token=admin.token, json={"price": price})
        for path in paths:
            body = client.get(path).json
            shown = body["data"][0] if "data" in body else body
            assert (shown["id"], shown["price"]) == (mine.product["id"], price)


def test_a_moved_product_leaves_one_list_and_enters_another(client, admin, shelf):
    mine, theirs = shelf(), shelf()
    both = f"{mine.list}&category_id={theirs.category['id']}"
    def sizes():
        return [client.get(path).json["pagination"]["total"]
                for path in (mine.list, theirs.list, both)]
    assert sizes() == [1, 1, 2]
    client.patch(mine.one, token=admin.token, json={"category_id": theirs.category["id"]})
    assert sizes() == [0, 2, 2]
    client.delete(theirs.one, token=admin.token)
    assert sizes() == [0, 1, 1]


def test_a_renamed_category_is_renamed_on_its_products(client, admin, shelf):
    mine = shelf()
    paths = [mine.one, mine.list, "products"]
    for path in (*paths, mine.page, "categories"):
        client.get(path)
    name = unique("Renamed ")
    client.patch(mine.page, token=admin.token, json={"name": name})
    for path in paths:
        body = client.get(path).json
        assert (body["data"][0] if "data" in body else body)["category_name"] == name
    assert client.get(mine.page).json["name"] == name
    assert name in [c["name"] for c in client.get("categories").json["data"]]


def test_a_sale_and_its_refund_change_the_stock_everywhere(client, admin, user, shelf):
    mine, theirs = shelf(), shelf()
    paths = [mine.one, mine.list, f"{mine.list}&in_stock=true", theirs.one, theirs.list]
    def stocks():
        bodies = [client.get(path).json for path in paths]
        return [(body["data"][0] if "data" in body else body)["stock"] for body in bodies]
    assert stocks() == [100] * 5
    items = [{"product_id": mine.product["id"], "quantity": 7},
             {"product_id": theirs.product["id"], "quantity": 9}]
    sale = client.post("transactions", token=user.token, json={"items": items}).json
    assert stocks() == [93, 93, 93, 91, 91]
    client.post(f"transactions/{sale['id']}/refund", token=admin.token)
    assert stocks() == [100] * 5


def test_a_deleted_product_is_gone_at_once(client, admin, shelf, fill):
    mine = shelf()
    fill(mine.one, mine.list, mine.page)
    client.delete(mine.one, token=admin.token)
    assert client.get(mine.one).status_code == 404
    assert client.get(mine.list).json["data"] == []
    assert client.get(mine.page).json["product_count"] == 0


def test_a_write_leaves_everything_else_in_the_cache(client, admin, user, shelf, fill, kept):
    mine, theirs = shelf(), shelf()
    others = [theirs.one, theirs.list, f"{theirs.list}&sort=name", theirs.page]
    fill(*others)
    made = client.post("products", token=admin.token, json={
        "name": "Tea", "price": 1, "category_id": mine.category["id"]}).json
    client.patch(mine.one, token=admin.token, json={"price": 2, "name": "x", "sku": unique("S")})
    client.patch(mine.one, token=admin.token, json={"category_id": None})
    client.patch(mine.one, token=admin.token, json={"category_id": mine.category["id"]})
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": mine.product["id"], "quantity": 1}]})
    client.delete(f"products/{made['id']}", token=admin.token)
    client.delete(mine.one, token=admin.token)
    assert [path for path in others if not kept(path)] == []
    client.patch(mine.page, token=admin.token, json={"name": unique("C")})
    client.delete(mine.page, token=admin.token)
    assert [path for path in others[1:] if not kept(path)] == []


def test_a_change_of_price_leaves_the_categories_in_the_cache(client, admin, shelf, fill, kept):
    mine = shelf()
    fill("categories", mine.page)
    client.patch(mine.one, token=admin.token, json={"price": 2})
    assert kept("categories")
    assert kept(mine.page)


def test_a_refused_write_leaves_everything_in_the_cache(client, admin, user, shelf, fill, kept):
    mine = shelf()
    fill(mine.one, mine.list)
    for refused in (
        client.patch(mine.one, token=admin.token, json={"price": -1}),
        client.patch(mine.one, token=user.token, json={"price": 1}),
        client.patch(mine.one, token=admin.token, json={"price": 1}, headers={"If-Match": '"x"'}),
        client.patch(mine.one, token=admin.token, json={"category_id": 2**62}),
        client.delete(mine.page, token=admin.token),
    ):
        assert refused.status_code >= 400
    assert kept(mine.one)
    assert kept(mine.list)


# Several processes


def test_a_write_is_seen_by_every_process_as_soon_as_it_is_answered(server, client, admin, shelf):
    mine = shelf()
    for price in range(1, 31):
        change = {"price": f"{price}.00", "stock": price}
        if price % 2:
            assert server.call("PATCH", mine.one, token=admin.token, json=change).status == 200
        else:
            assert client.patch(mine.one, token=admin.token, json=change).status_code == 200
        seen = [client.get(mine.one).json, client.get(mine.list).json["data"][0]]
        for _ in range(2):
            seen.append(server.call("GET", mine.one).json())
            seen.append(server.call("GET", mine.list).json()["data"][0])
        assert {(body["stock"], body["price"]) for body in seen} == {(price, f"{price}.00")}


def test_no_reader_goes_back_in_time_while_a_writer_writes(server, client, admin, shelf):
    """Readers in all processes, and a writer: what has been answered once is not unsaid later."""
    mine = shelf()
    client.patch(mine.one, token=admin.token, json={"stock": 0})
    written, last = [0], 60
    def read(path):
        while written[0] < last:
            least = written[0]
            body = server.call("GET", path).json()
            stock = (body["data"][0] if "data" in body else body)["stock"]
            assert stock >= least
    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, path) for path in (mine.one, mine.list, mine.one, mine.list)]
        try:
            for stock in range(1, last + 1):
                answer = server.call("PATCH", mine.one, token=admin.token, json={"stock": stock})
                assert answer.status == 200
                written[0] = stock
        finally:
            written[0] = last
        for reader in readers:
            reader.result()


def test_many_who_miss_at_once_ask_the_database_once(server, shelf, database_url):
    """The table is locked, so that every query for it stands waiting and can be counted."""
    mine = shelf()
    asking = ("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
              "AND wait_event_type = 'Lock' AND query LIKE '%products%'")
    with psycopg.connect(database_url) as locker, ThreadPoolExecutor(50) as pool:
        locker.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        answers = [pool.submit(server.call, "GET", mine.one) for _ in range(50)]
        time.sleep(1)
        waiting = execute(database_url, asking)[0][0]
        locker.rollback()
        answers = [answer.result() for answer in answers]
    assert 1 <= waiting <= 2
    assert [answer.status for answer in answers] == [200] * 50
    assert len({answer.body for answer in answers}) == 1
    assert sum(answer.headers["X-Cache"] == "miss" for answer in answers) <= 2


def ask(key, find, expensive=True, group="group"):
    """(body, whether it was found) of the cache's answer at a key."""
    known = cache.Known(key, (group,), lambda: (find(), ()), expensive=expensive)
    entry, hit, _ = cache.fetch(known)
    return entry.partition(b"\n")[2].decode(), hit


@pytest.mark.parametrize("expensive", [True, False])
def test_a_slow_reader_brings_nothing_old_back(app, expensive):
    key, group = unique("key"), unique("group")
    def slow():
        cache.invalidate(group)  # by a write that begins and ends while this reader still reads
        return "old"
    with app.app_context():
        assert ask(key, slow, expensive, group) == ("old", False)
        assert ask(key, lambda: "new", expensive, group) == ("new", False)
        assert ask(key, lambda: "newer", expensive, group) == ("new", True)


@pytest.mark.parametrize("expensive", [True, False])
def test_a_reader_who_fails_leaves_the_others_to_it(app, expensive):
    key = unique("key")
    def fail():
        raise LookupError
    with app.app_context():
        with pytest.raises(LookupError):
            ask(key, fail, expensive)
        before = time.monotonic()
        assert ask(key, lambda: "fine", expensive) == ("fine", False)
        assert time.monotonic() - before < cache_backends.BUSY_SECONDS - 0.5


# What must not be kept


def test_what_belongs_to_one_person_is_not_shared(client, user, other, admin, make_product):
    product = make_product()
    for person, quantity in ((user, 1), (other, 2)):
        client.post("transactions", token=person.token,
                    json={"items": [{"product_id": product["id"], "quantity": quantity}]})
    for person, quantity in ((user, 1), (other, 2), (user, 1)):
        response = client.get("transactions", token=person.token)
        items = [sale["items"][0]["quantity"] for sale in response.json["data"]]
        assert items == [quantity]
    for path in ("transactions", "users/me", "auth/sessions", "users"):
        response = client.get(path, token=admin.token)
        assert "X-Cache" not in response.headers
        assert response.headers["Cache-Control"] in ("private, no-cache", "no-store")
        assert "Authorization" in response.vary or response.headers["Cache-Control"] == "no-store"
    assert client.get("users/me", token=user.token).json["id"] == user.id
    assert client.get("users/me", token=other.token).json["id"] == other.id


def test_everybody_shares_the_catalogue(client, user, shelf, fill):
    mine = shelf()
    fill(mine.one)
    response = client.get(mine.one, token=user.token)
    assert response.headers["X-Cache"] == "hit"
    assert response.headers["Cache-Control"] == "public, no-cache"
    assert set(response.vary) == {"Accept-Encoding"}


def test_tokens_are_for_nobody_to_keep(client):
    person = register(client)
    body = {"email": person.email, "password": person.password}
    for response in (client.post("auth/login", json=body),
                     client.post("auth/refresh", json={"refresh_token": person.refresh_token})):
        assert response.status_code == 200
        assert response.headers["Cache-Control"] == "no-store"


def test_errors_are_not_kept(client, database_url):
    number = 10**12 + random.randrange(10**9)
    for path in (f"products/{number}", "products?sort=colour", f"categories/{number}"):
        for _ in range(2):
            response = client.get(path)
            assert response.status_code >= 400
            assert "X-Cache" not in response.headers
            assert response.headers["Cache-Control"] == "no-store"
    execute(database_url, f"INSERT INTO products (id, name, price) VALUES ({number}, 'late', 1)")
    assert client.get(f"products/{number}").json["name"] == "late"


# What may be in its place


@pytest.mark.parametrize("ruin", [
    lambda memory, key: memory.set(key, b""),
    lambda memory, key: memory.set(key, b"garbage"),
    lambda memory, key: memory.set(key, b"\x00\xff|\xfe\n{}"),
    lambda memory, key: memory.set(key, b"|" * 100000),
    lambda memory, key: memory.set(key, b'"tag"\n{"id": 666}'),
    lambda memory, key: memory.set(key, 42),
    lambda memory, key: (memory.delete(key), memory.rpush(key, "a", "b")),
    lambda memory, key: (memory.delete(key), memory.hset(key, "a", "b")),
    lambda memory, key: memory.delete(key),
], ids=["empty", "text", "bytes", "long", "another's", "number", "list", "hash", "nothing"])
def test_garbage_in_redis_is_a_miss(client, memory, shelf, fill, kept, ruin):
    mine = shelf()
    expected = [client.get(path).json for path in (mine.one, mine.list, mine.page)]
    fill(mine.one, mine.list, mine.page)
    for key in memory.keys("{shopfront}:[eg]*"):
        ruin(memory, key)
    try:
        for path, body in zip((mine.one, mine.list, mine.page), expected, strict=True):
            response = client.get(path)
            assert (response.status_code, response.headers["X-Cache"]) == (200, "miss")
            assert response.json == body
            assert kept(path) or kept(path)
    finally:
        memory.delete(*memory.keys("{shopfront}:[eg]*"))


def test_an_emptied_redis_is_no_more_than_misses(client, memory, shelf, fill, kept):
    mine = shelf()
    fill(mine.one)
    memory.flushdb()
    assert not kept(mine.one)
    assert kept(mine.one)


def test_an_entry_lives_as_long_as_the_setting_says(make_app, make_client, shelf, memory):
    mine = shelf()
    for seconds in (1, 77):
        memory.flushdb()
        shop = make_client(make_app(CACHE_TTL=str(seconds)))
        shop.get(mine.one)
        shop.get(mine.one)
        lives = [memory.pttl(key) for key in memory.keys("{shopfront}:entry:*")
                 if mine.product["name"].encode() in memory.get(key)]
        assert len(lives) == 1
        assert 0 < lives[0] <= seconds * 1000


def test_a_shop_runs_without_a_cache(make_app, make_client, admin, user, shelf):
    mine, shop = shelf(), make_client(make_app(CACHE_TYPE="NullCache"))
    for path in (mine.one, mine.list, mine.page, "categories"):
        first, second = shop.get(path), shop.get(path)
        assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("miss", "miss")
        assert second.data == first.data
        packed = shop.get(path, headers={"Accept-Encoding": "br"})
        assert packed.headers["ETag"] == first.headers["ETag"]
    shop.patch(mine.one, token=admin.token, json={"stock": 55})
    assert shop.get(mine.one).json["stock"] == 55
    assert shop.get(mine.list).json["data"][0]["stock"] == 55
    shop.post("transactions", token=user.token,
              json={"items": [{"product_id": mine.product["id"], "quantity": 5}]})
    assert shop.get(mine.one).json["stock"] == 50
    shop.patch(mine.page, token=admin.token, json={"name": f"{mine.category['name']}x"})
    assert shop.get(mine.one).json["category_name"] == f"{mine.category['name']}x"


def test_what_is_asked_for_once_is_not_written_to_redis(client, shelf, memory):
    mine = shelf()
    def kept():
        return [key for key in memory.keys("{shopfront}:entry:*")
                if mine.product["name"].encode() in (memory.get(key) or b"")]
    client.get(mine.one)
    assert kept() == []
    client.get(mine.one)
    assert len(kept()) == 1
