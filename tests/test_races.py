"""Many at once: buyers, refunds and retries over two real workers never lose or invent a thing."""
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.conftest import execute, unique


@pytest.fixture
def send(server, admin):
    """``send(path, json, key)`` posts to the real server."""
    def post(path, json=None, key=None):
        headers = {"Idempotency-Key": key} if key else {}
        return server.call("POST", path, token=admin.token, json=json, headers=headers)
    return post


@pytest.fixture
def buy(send):
    def post(*items, key=None):
        body = [{"product_id": product["id"], "quantity": quantity} for product, quantity in items]
        return send("transactions", {"items": body}, key)
    return post


@pytest.fixture
def at_once():
    """``at_once(calls)`` makes every call in a thread of its own, none before all are ready."""
    def run(calls):
        ready = threading.Barrier(len(calls))
        def start(call):
            ready.wait()
            return call()
        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(start, calls))
    return run


@pytest.fixture
def left(client, database_url):
    """The stock of products, as the API says it and as the database holds it."""
    def stock(*products):
        said = [client.get(f"products/{product['id']}").json["stock"] for product in products]
        for product, number in zip(products, said, strict=True):
            assert execute(database_url, "SELECT stock FROM products "
                                         f"WHERE id = {product['id']}") == [(number,)]
        return said
    return stock


def statuses(answers):
    return sorted(answer.status for answer in answers)


def test_forty_buyers_of_twenty_five_buy_twenty_five(buy, at_once, left, make_product,
                                                     database_url):
    product = make_product(stock=25)
    answers = at_once([lambda: buy((product, 1))] * 40)
    assert statuses(answers) == [201] * 25 + [409] * 15
    assert {answer.json()["code"] for answer in answers if answer.status == 409} == {
        "out_of_stock"}
    assert left(product) == [0]
    assert execute(database_url, "SELECT sum(quantity) FROM transaction_items "
                                 f"WHERE product_id = {product['id']}") == [(25,)]


def test_buyers_of_different_amounts_never_oversell(buy, at_once, left, make_product):
    product = make_product(stock=50)
    answers = at_once([lambda n=n: buy((product, 1 + n % 7)) for n in range(30)])
    assert set(statuses(answers)) == {201, 409}
    sold = sum(a.json()["items"][0]["quantity"] for a in answers if a.status == 201)
    assert left(product) == [50 - sold]
    assert sold > 50 - 7


def test_buyers_in_opposite_orders_never_wait_for_each_other(buy, at_once, left, make_product):
    products = [make_product(stock=1000) for _ in range(12)]
    forth = [(product, 1) for product in products]
    answers = at_once([lambda n=n: buy(*(forth if n % 2 else forth[::-1])) for n in range(30)])
    assert statuses(answers) == [201] * 30
    assert left(*products) == [970] * 12


def test_refunds_against_sales_in_any_order_keep_the_balance(buy, send, at_once, left,
                                                             make_product):
    dice = random.Random(7)
    products = [make_product(stock=200) for _ in range(8)]
    def any_four():
        return [(product, 1) for product in dice.sample(products, 4)]
    sales = [buy(*any_four()).json()["id"] for _ in range(15)]
    calls = [lambda i=i: send(f"transactions/{i}/refund") for i in sales]
    calls += [lambda items=items: buy(*items) for items in (any_four() for _ in range(15))]
    dice.shuffle(calls)
    assert statuses(at_once(calls)) == [200] * 15 + [201] * 15
    assert sum(left(*products)) == 8 * 200 - 15 * 4


def test_edits_of_a_product_and_sales_of_it_lose_nothing(buy, server, admin, at_once, left,
                                                         make_product):
    """A renamed product keeps the stock that sales have left it."""
    product = make_product(stock=100)
    def rename():
        return server.call("PATCH", f"products/{product['id']}", token=admin.token,
                           json={"name": unique("Renamed ")})
    answers = at_once([rename, lambda: buy((product, 1))] * 12)
    assert statuses(answers) == [200] * 12 + [201] * 12
    assert left(product) == [88]


def test_a_product_that_is_retired_meanwhile_is_sold_before_or_not_at_all(
        buy, server, admin, at_once, make_product, database_url):
    product = make_product(stock=100)
    assert buy((product, 1)).status == 201
    def retire():
        return server.call("DELETE", f"products/{product['id']}", token=admin.token)
    answers = at_once([lambda: buy((product, 1))] * 10 + [retire])
    assert set(statuses(answers)) <= {201, 204, 422}
    sold = 1 + statuses(answers).count(201)
    assert execute(database_url, f"SELECT stock FROM products WHERE id = {product['id']}") == [
        (100 - sold,)]


def test_a_buyer_who_is_deleted_meanwhile_leaves_whole_sales(server, client, admin, at_once,
                                                             send, make_product, user):
    product = make_product(stock=100)
    body = {"items": [{"product_id": product["id"], "quantity": 1}]}
    def buy():
        return server.call("POST", "transactions", token=user.token, json=body)
    made = [buy().json()["id"] for _ in range(5)]
    calls = [buy] * 8 + [lambda i=i: send(f"transactions/{i}/refund") for i in made]
    calls.append(lambda: server.call("DELETE", f"users/{user.id}", token=admin.token))
    answers = at_once(calls)
    assert set(statuses(answers)) <= {200, 201, 204, 401}
    sold = statuses(answers).count(201)
    assert client.get(f"products/{product['id']}").json["stock"] == 100 - sold


def test_equal_keyed_requests_make_one_sale(buy, at_once, left, make_product):
    product, key = make_product(stock=100), unique("key")
    answers = at_once([lambda: buy((product, 3), key=key)] * 20)
    done = [answer for answer in answers if answer.status == 201]
    assert len({answer.body for answer in done}) == 1
    assert {answer.json()["code"] for answer in answers if answer not in done} <= {
        "request_in_progress"}
    assert left(product) == [97]
    assert buy((product, 3), key=key).body == done[0].body


def test_refunds_of_one_sale_refund_it_once(buy, send, at_once, left, make_product):
    product = make_product(stock=10)
    sale = buy((product, 4)).json()
    answers = at_once([lambda: send(f"transactions/{sale['id']}/refund")] * 16)
    assert statuses(answers) == [200] + [409] * 15
    assert left(product) == [10]


def test_a_sale_that_loses_a_deadlock_is_made_all_the_same(buy, left, make_product, database_url):
    """Of two that wait for each other PostgreSQL undoes the one that has waited for a second."""
    product = make_product(stock=3)
    with psycopg.connect(database_url) as migration, ThreadPoolExecutor(1) as pool:
        migration.execute("LOCK TABLE products")
        sale = pool.submit(buy, (product, 1))
        while not execute(database_url, """
                SELECT pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                WHERE datname = current_database() AND relation = 'products'::regclass
                  AND NOT granted"""):
            time.sleep(0.02)
        migration.execute("LOCK TABLE users")  # the buyer's, by then
        migration.rollback()
    assert sale.result().status == 201
    assert left(product) == [2]
