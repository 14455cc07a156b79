"""What a request costs before its view: calls to Redis, and nothing asked twice."""
import hashlib
import itertools
import re
import threading

import psycopg
import pytest
import redis

from extensions.cache_backends import ENTER, KEEP, MARK, RENEW
from tests.conftest import register, unique

# By the hash that EVALSHA names; a heartbeat's are none of a request's.
SCRIPTS = {hashlib.sha1(text.encode()).hexdigest(): name for text, name in (
    (ENTER, "ENTER"), (MARK, "MARK"), (RENEW, "RENEW"), (KEEP, None), ("return 1", None))}


@pytest.fixture
def asked(redis_url):
    """A function that calls something and returns which commands Redis got meanwhile."""
    number = int(re.search(r"\d+$", redis_url)[0])
    with redis.Redis.from_url(redis_url) as memory:
        def ask(work):
            marker = unique("marker")
            with memory.monitor() as monitor:
                work()
                memory.echo(marker)
                seen = itertools.takewhile(lambda c: marker not in c["command"], monitor.listen())
                words = [command["command"].split() for command in seen
                         if command["db"] == number and command["client_type"] != "lua"]
                return [name for word, *rest in words
                        if (name := SCRIPTS.get(rest[0] if rest else "", word.upper()))]
        yield ask


def calls(commands):
    """The commands, without those of a new connection."""
    return [word for word in commands if word not in ("SELECT", "CLIENT", "INFO", "SCRIPT")]


@pytest.mark.parametrize("path", ["products?limit=3", "categories", "products?sort=price"])
def test_a_known_answer_is_one_call_to_redis(client, asked, path):
    for _ in range(2):
        client.get(path)
    assert calls(asked(lambda: client.get(path))) == ["ENTER"]


def test_a_product_never_asked_for_is_one_call_to_redis(client, asked, make_product):
    product = make_product()
    assert calls(asked(lambda: client.get(f"products/{product['id']}"))) == ["ENTER"]


def test_a_refused_request_is_one_call_to_redis(make_app, make_client, asked):
    visitor = make_client(make_app(RATE_LIMIT="1 per 15 minutes"), "192.0.2.77")
    visitor.get("categories")
    assert calls(asked(lambda: visitor.get("products?page=3"))) == ["ENTER"]


def test_a_signed_in_read_is_one_call_to_redis(client, asked, user):
    client.get("users/me", token=user.token)
    assert calls(asked(lambda: client.get("users/me", token=user.token))) == ["ENTER"]


def test_a_purchase_counts_marks_and_renews(client, asked, user, make_product):
    items = [{"product_id": make_product()["id"], "quantity": 1} for _ in range(3)]
    def buy():
        return client.post("transactions", token=user.token, json={"items": items})
    buy()
    assert calls(asked(buy)) == ["ENTER", "MARK", "RENEW"]


@pytest.fixture
def statements(monkeypatch):
    """The names of the queries that requests run from here on, and BEGIN."""
    seen, execute, here = [], psycopg.Cursor.execute, threading.get_ident()

    def note(self, query, *args, **kwargs):
        if threading.get_ident() == here:  # not those of the mail queue
            seen.append(re.match(r"(?:/\* )?([\w.]+)", query)[1])
        return execute(self, query, *args, **kwargs)
    monkeypatch.setattr(psycopg.Cursor, "execute", note)
    return seen


@pytest.mark.parametrize("path", ["/api/v1/users/me", "/api/v2/users/me"])
def test_who_am_i_is_one_query_and_what_the_view_says(client, user, statements, path):
    mine = client.get(path, token=user.token)
    assert statements == ["users.me" if "v1" in path else "users_v2.me"]
    same = client.get(path.replace("me", str(user.id)), token=user.token)
    assert (mine.json, mine.headers["ETag"], mine.headers["Cache-Control"], mine.vary) == (
        same.json, same.headers["ETag"], same.headers["Cache-Control"], same.vary)
    assert client.head(path, token=user.token).headers["Content-Length"] == str(len(mine.data))


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "identity"])
def test_who_am_i_is_compressed_where_it_is_long(client, encoding):
    person = register(client, name="a" * 100, email=f"{'b' * 60}@{'c' * 60}.{'d' * 60}.{unique()}")
    headers = {"Accept-Encoding": encoding}
    answers = [client.get(f"users/{who}", token=person.token, headers=headers)
               for who in ("me", person.id)]
    assert answers[0].headers.get("Content-Encoding") == answers[1].headers.get("Content-Encoding")
    assert answers[0].data == answers[1].data
    assert answers[0].vary == answers[1].vary


def test_a_category_s_newest_and_their_number_are_one_query(client, make_category, make_product,
                                                            statements):
    category = make_category()["id"]
    product = make_product(category_id=category)["id"]
    del statements[:]
    page = client.get(f"products?category_id={category}").json
    assert statements == ["products.newest"]
    assert ([one["id"] for one in page["data"]], page["pagination"]["total"]) == ([product], 1)


def test_a_purchase_is_three_statements(client, user, make_product, statements):
    product = make_product()
    del statements[:]
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": product["id"], "quantity": 1}]})
    assert statements == ["auth.caller", "BEGIN", "transactions.sell"]


def test_a_sale_is_planned_once(make_app, make_client, user, make_product):
    shop = make_client(make_app(POOL_MAX_SIZE="1"))
    items = [{"product_id": make_product()["id"], "quantity": 1}]
    for _ in range(20):
        shop.post("transactions", token=user.token, json={"items": items})
    with shop.app.extensions["db"].reading() as conn:
        generic, custom = conn.execute(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements "
            "WHERE statement LIKE '/* transactions.sell */%'").fetchone()
    assert (generic > 10, custom) == (True, 0)


def test_what_needs_nothing_asks_nobody(client, asked):
    for path in ("/health", "/health/live"):
        assert calls(asked(lambda path=path: client.get(path))) == []


def test_a_known_answer_keeps_every_promise(client, make_product):
    """What the door says is what the view said: but for whose it is, and what is left."""
    path = f"products?search={make_product(description='x' * 2000)['name']}"
    varying = re.compile("X-Request-ID|X-RateLimit-(Remaining|Reset)|RateLimit$|X-Cache|Date")
    def said(response):
        return {k: v for k, v in response.headers.items() if not varying.fullmatch(k)}
    for headers in ({}, {"Accept-Encoding": "br"}, {"Accept-Encoding": "gzip;q=0.5, zstd"}):
        first = client.get(path, headers=headers)
        client.get(path, headers=headers)
        again = client.get(path, headers=headers)
        assert (again.headers["X-Cache"], again.data) == ("hit", first.data)
        assert said(again) == said(first)
        tag = headers | {"If-None-Match": first.headers["ETag"]}
        unchanged = client.get(path, headers=tag)
        assert (unchanged.status_code, unchanged.data) == (304, b"")
        assert unchanged.headers["ETag"] == first.headers["ETag"]
        head = client.head(path, headers=headers)
        assert head.data == b""
        assert head.headers["Content-Length"] == again.headers["Content-Length"]
