"""Sales: what buying takes, keeps and refuses, who may read it, and that a refund happens once."""
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from urllib.parse import quote

import pytest

from tests.conftest import execute, register, unique

LARGEST = 2**63 - 1  # an id that nothing has
PRICES = ["0.00", "0.01", "0.07", "0.99", "19.99", "33.33", "1234.56", "9999999999.99"]


@pytest.fixture
def buy(client, user):
    """``buy((product, quantity), …)`` answers what the API does."""
    def send(*items, token=user.token, version="v1"):
        body = {"items": [{"product_id": product["id"], "quantity": n} for product, n in items]}
        return client.post(f"/api/{version}/transactions", token=token, json=body)
    return send


@pytest.fixture
def stock(client):
    return lambda product: client.get(f"products/{product['id']}").json["stock"]


@pytest.fixture
def refund(client, admin):
    return lambda sale: client.post(f"transactions/{sale['id']}/refund", token=admin.token)


def fields(response):
    """Which fields a refusal names."""
    assert response.status_code in (409, 422), response.text
    return [detail["field"] for detail in response.json["details"]]


# Buying


def test_buying_takes_the_stock(buy, stock, make_product):
    product = make_product(stock=5)
    assert buy((product, 3)).status_code == 201
    assert stock(product) == 2
    assert buy((product, 2)).status_code == 201
    assert stock(product) == 0


def test_a_sale_says_who_bought_what_at_which_price(buy, user, make_product):
    lamp, tea = make_product(price="19.99"), make_product(price="0.07")
    before = datetime.now(UTC)
    response = buy((tea, 3), (lamp, 2))
    sale = response.json
    assert response.headers["Location"] == f"/api/v1/transactions/{sale['id']}"
    assert before - timedelta(seconds=5) < datetime.fromisoformat(sale.pop("created_at"))
    assert sale == {
        "id": sale["id"], "user_id": user.id, "status": "completed", "total": "40.19",
        "items": [
            {"product_id": tea["id"], "name": tea["name"], "quantity": 3, "unit_price": "0.07",
             "amount": "0.21"},
            {"product_id": lamp["id"], "name": lamp["name"], "quantity": 2,
             "unit_price": "19.99", "amount": "39.98"},
        ],
        "refunded_at": None,
    }


def test_a_sale_reads_as_it_was_answered(buy, client, user, make_product):
    response = buy((make_product(), 1), (make_product(), 2))
    assert client.get(response.headers["Location"], token=user.token).data == response.data


@pytest.mark.parametrize("price", PRICES)
def test_amounts_are_exact_to_the_cent(buy, make_product, price):
    sale = buy((make_product(price=price, stock=1000), 997)).json
    assert Decimal(sale["total"]) == Decimal(price) * 997
    assert sale["total"] == sale["items"][0]["amount"]


def test_a_hundred_products_a_thousand_of_each_are_one_sale(buy, stock, client, admin,
                                                            database_url):
    price = "9999999999.99"
    [(first,)] = execute(database_url, "INSERT INTO products (name, price, stock) SELECT 'Gold', "
                         f"{price}, 1000 FROM generate_series(1, 100) RETURNING id")[:1]
    products = [{"id": first + n} for n in range(100)]
    sale = buy(*[(product, 1000) for product in reversed(products)]).json
    assert sale["total"] == str(Decimal(price) * 100_000)
    assert [item["product_id"] for item in sale["items"]] == [
        product["id"] for product in reversed(products)]
    assert {stock(product) for product in products[::25]} == {0}


def test_buying_is_all_or_nothing(buy, stock, client, user, make_product):
    plenty, scarce = make_product(stock=10), make_product(stock=1)
    response = buy((plenty, 2), (scarce, 2))
    assert (response.status_code, response.json["code"]) == (409, "out_of_stock")
    assert (stock(plenty), stock(scarce)) == (10, 1)
    assert client.get("transactions", token=user.token).json["pagination"]["total"] == 0


def test_what_is_out_of_stock_is_named(buy, make_product):
    a, b, c = make_product(stock=0), make_product(stock=5), make_product(stock=4)
    response = buy((c, 5), (b, 5), (a, 1))
    assert fields(response) == ["items.0.quantity", "items.2.quantity"]
    for product, detail in zip((c, a), response.json["details"], strict=True):
        assert str(product["id"]) in detail["message"]


def test_an_unknown_product_is_422_and_nothing_is_sold(buy, stock, make_product):
    product = make_product(stock=3)
    response = buy((product, 1), ({"id": LARGEST}, 1), (product | {"id": LARGEST - 1}, 1))
    assert fields(response) == ["items.1.product_id", "items.2.product_id"]
    assert stock(product) == 3


def test_a_retired_product_can_not_be_bought(buy, client, admin, make_product):
    product = make_product()
    buy((product, 1))
    client.delete(f"products/{product['id']}", token=admin.token)
    assert fields(buy((product, 1))) == ["items.0.product_id"]


def test_an_unknown_product_goes_before_one_out_of_stock(buy, make_product):
    response = buy((make_product(stock=0), 1), ({"id": LARGEST}, 1))
    assert fields(response) == ["items.1.product_id"]


def test_a_product_may_stand_in_a_sale_once(buy, stock, make_product):
    product = make_product(stock=10)
    assert fields(buy((product, 1), (product, 2))) == ["items"]
    assert stock(product) == 10


@pytest.mark.parametrize("count", [0, 101])
def test_a_sale_has_1_to_100_items(buy, count):
    assert fields(buy(*[({"id": 1 + n}, 1) for n in range(count)])) == ["items"]


@pytest.mark.parametrize("quantity", [0, -1, 1001, 2**63, 1.5, "1", None, True])
def test_a_quantity_is_a_whole_number_from_1_to_1000(buy, stock, make_product, quantity):
    product = make_product(stock=5)
    assert fields(buy((product, quantity))) == ["items.0.quantity"]
    assert stock(product) == 5


@pytest.mark.parametrize("product_id", [0, -1, 2**63, "7", 1.5, None])
def test_a_product_id_is_a_positive_64_bit_integer(buy, product_id):
    assert fields(buy(({"id": product_id}, 1))) == ["items.0.product_id"]


@pytest.mark.parametrize("body", [
    {}, {"items": None}, {"items": {}}, {"items": ["x"]}, {"items": [{}]}, {"items": [[1, 2]]},
    {"items": [{"product_id": 1, "quantity": 1, "unit_price": "0.01"}]},
    {"items": [{"product_id": 1, "quantity": 1}], "user_id": 1},
    {"items": [{"product_id": 1, "quantity": 1}], "total": "0.01"},
])
def test_a_body_of_another_form_is_422(client, user, body):
    response = client.post("transactions", token=user.token, json=body)
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")


def test_a_form_can_not_say_what_is_bought(client, user):
    response = client.post("transactions", token=user.token, data={"items": "1"})
    assert (response.status_code, response.json["code"]) == (415, "unsupported_media_type")


def test_buying_needs_an_account(client, make_product):
    body = {"items": [{"product_id": make_product()["id"], "quantity": 1}]}
    assert client.post("transactions", json=body).status_code == 401


# Reading


@pytest.fixture
def sale(buy, make_product):
    return buy((make_product(stock=50), 2)).json


def test_a_sale_is_for_its_buyer_and_admins(client, user, admin, sale):
    path = f"transactions/{sale['id']}"
    assert client.get(path, token=user.token).json == sale
    assert client.get(path, token=admin.token).json == sale
    assert client.get(path).status_code == 401


def test_someone_elses_sale_is_404_as_one_that_never_was(client, other, sale):
    for path in (f"transactions/{sale['id']}", f"transactions/{LARGEST}"):
        assert client.get(path, token=other.token).json["code"] == "not_found"


@pytest.mark.parametrize("wrong", ["0", "-1", "x", str(2**63), "1.0", "me"])
def test_a_malformed_id_is_404(client, admin, wrong):
    assert client.get(f"transactions/{wrong}", token=admin.token).status_code == 404
    assert client.post(f"transactions/{wrong}/refund", token=admin.token).status_code == 404


def ids(response):
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json["data"]]


@pytest.fixture
def listed(client, user):
    """``listed(token, **query)``: the ids of the sales on one page."""
    return lambda token=user.token, **query: ids(
        client.get("transactions", token=token, query_string=query))


def test_everybody_lists_their_own_sales_the_newest_first(buy, listed, other, make_product):
    product = make_product()
    mine = [buy((product, 1)).json["id"] for _ in range(3)]
    theirs = buy((product, 1), token=other.token).json["id"]
    assert listed() == mine[::-1]
    assert listed(other.token) == [theirs]


def test_an_admin_lists_everybodys_sales(buy, listed, admin, user, other, make_product):
    product = make_product()
    mine, theirs = (buy((product, 1), token=who.token).json["id"] for who in (user, other))
    assert {mine, theirs} <= set(listed(admin.token, limit=100))
    assert listed(admin.token, user_id=user.id) == [mine]
    assert listed(admin.token, user_id=LARGEST) == []


def test_only_an_admin_may_ask_for_someone_elses_sales(client, listed, user, other, sale):
    assert listed(user_id=user.id) == [sale["id"]]
    for number in (other.id, LARGEST):
        response = client.get(f"transactions?user_id={number}", token=user.token)
        assert (response.status_code, response.json["code"]) == (403, "forbidden")


def test_a_list_holds_whole_sales(client, user, sale):
    assert client.get("transactions", token=user.token).json["data"] == [sale]


def test_sales_can_be_chosen_by_status(buy, refund, listed, make_product):
    product = make_product()
    kept, returned = (buy((product, 1)).json for _ in range(2))
    refund(returned)
    assert listed(status="completed") == [kept["id"]]
    assert listed(status="refunded") == [returned["id"]]
    assert listed() == [returned["id"], kept["id"]]


def test_sales_can_be_chosen_by_time_from_a_moment_up_to_another(buy, listed, make_product):
    product = make_product()
    first, second, third = (buy((product, 1)).json for _ in range(3))
    borders = {"from": second["created_at"], "to": third["created_at"]}
    assert listed(**borders) == [second["id"]]
    assert listed(to=second["created_at"]) == [first["id"]]
    assert listed(**{"from": third["created_at"]}) == [third["id"]]


def test_times_may_have_any_offset_and_dates_are_midnight_in_utc(listed, sale):
    moment = datetime.fromisoformat(sale["created_at"])
    abroad = moment.astimezone(timezone(timedelta(hours=5, minutes=30))).isoformat()
    today, tomorrow = moment.date(), moment.date() + timedelta(days=1)
    assert listed(**{"from": abroad}) == [sale["id"]]
    assert listed(to=abroad) == []
    assert listed(**{"from": today, "to": tomorrow}) == [sale["id"]]
    assert listed(**{"from": tomorrow}) == listed(to=today) == []


@pytest.mark.parametrize("query", [
    "status=open", "status=", "user_id=0", "user_id=x", f"user_id={2**63}", "from=yesterday",
    "to=2026-02-30", "from=infinity", "from=0001-01-01", "to=9999-12-31", "limit=101", "page=0",
    "sort=total", "status=completed&status=refunded", "cursor=x", "count=some",
])
def test_a_wrong_parameter_is_named(client, user, query):
    assert fields(client.get(f"transactions?{query}", token=user.token)) == [query.split("=")[0]]


def test_pages_follow_each_other(client, buy, user, make_product):
    product = make_product()
    made = [buy((product, 1)).json["id"] for _ in range(5)][::-1]
    pages = [client.get(f"transactions?limit=2&page={n}", token=user.token) for n in (1, 2, 3, 4)]
    assert [ids(page) for page in pages] == [made[:2], made[2:4], made[4:], []]
    assert pages[1].json["pagination"] | {"next_cursor": None} == {
        "page": 2, "limit": 2, "total": 5, "pages": 3, "next_cursor": None}


def test_a_cursor_walks_past_sales_that_are_made_meanwhile(client, buy, user, make_product):
    product = make_product()
    made = [buy((product, 1)).json["id"] for _ in range(5)][::-1]
    seen, query = [], "limit=2"
    while query:
        page = client.get(f"transactions?{query}", token=user.token)
        seen += ids(page)
        buy((product, 1))
        cursor = page.json["pagination"]["next_cursor"]
        query = cursor and f"limit=2&cursor={quote(cursor)}"
    assert seen == made


def test_a_cursor_is_bound_to_its_filters(client, buy, user, make_product):
    product = make_product()
    buy((product, 1))
    buy((product, 1))
    page = client.get("transactions?limit=1&status=completed", token=user.token).json
    cursor = page["pagination"]["next_cursor"]
    again = {"limit": 1, "cursor": cursor, "status": "completed"}
    assert len(ids(client.get("transactions", token=user.token, query_string=again))) == 1
    again["status"] = "refunded"
    assert fields(client.get("transactions", token=user.token, query_string=again)) == ["cursor"]


# Refunds


def test_a_refund_returns_the_stock(buy, refund, stock, make_product):
    a, b = make_product(stock=5), make_product(stock=7)
    sale = buy((b, 3), (a, 5)).json
    answer = refund(sale)
    assert answer.status_code == 200
    assert answer.json.pop("refunded_at") is not None
    assert answer.json | {"refunded_at": None} == sale | {"status": "refunded"}
    assert (stock(a), stock(b)) == (5, 7)


def test_a_sale_is_refunded_once(client, admin, refund, stock, make_product, buy):
    product = make_product(stock=5)
    sale = buy((product, 2)).json
    first = refund(sale)
    for _ in range(2):
        again = refund(sale)
        assert (again.status_code, again.json["code"]) == (409, "conflict")
    assert stock(product) == 5
    assert client.get(f"transactions/{sale['id']}", token=admin.token).json == first.json


def test_only_an_admin_refunds(client, user, sale):
    path = f"transactions/{sale['id']}/refund"
    assert client.post(path).status_code == 401
    assert client.post(path, token=user.token).status_code == 403
    assert client.get(f"transactions/{sale['id']}", token=user.token).json == sale


def test_what_was_never_sold_can_not_be_refunded(refund):
    assert refund({"id": LARGEST}).json["code"] == "not_found"


def test_what_a_refund_returns_can_be_bought_again(buy, refund, make_product):
    product = make_product(stock=1)
    for _ in range(3):
        refund(buy((product, 1)).json)
    assert buy((product, 1)).status_code == 201


def test_a_retired_product_is_still_refunded(buy, client, admin, refund, make_product,
                                             database_url):
    product = make_product(stock=3)
    sale = buy((product, 2)).json
    client.delete(f"products/{product['id']}", token=admin.token)
    assert refund(sale).json["status"] == "refunded"
    assert execute(database_url, f"SELECT stock FROM products WHERE id = {product['id']}") == [(3,)]


def test_a_refund_that_would_overflow_the_stock_is_refused_as_a_whole(
        buy, client, admin, refund, stock, make_product):
    product, full = make_product(stock=5), make_product(stock=5)
    sale = buy((product, 1), (full, 1)).json
    client.patch(f"products/{full['id']}", token=admin.token, json={"stock": 2**31 - 1})
    assert refund(sale).status_code in (409, 422)
    assert (stock(product), stock(full)) == (4, 2**31 - 1)
    assert client.get(f"transactions/{sale['id']}", token=admin.token).json == sale


# A sale stays as it was


@pytest.fixture
def category(make_category):
    return make_category()


@pytest.mark.parametrize("change", [
    lambda do, product, category: do("PATCH", f"products/{product['id']}", json={"name": "New"}),
    lambda do, product, category: do("PATCH", f"products/{product['id']}", json={"price": "9.99"}),
    lambda do, product, category: do("DELETE", f"products/{product['id']}"),
    lambda do, product, category: do("PATCH", f"categories/{category['id']}",
                                     json={"name": unique("New ")}),
], ids=["renamed", "repriced", "retired", "category renamed"])
def test_a_sale_stays_as_it_was_when_its_product_changes(client, admin, buy, make_product,
                                                         category, change):
    product = make_product(category_id=category["id"], price="7.77")
    made = buy((product, 3))
    def do(*args, **kwargs):
        response = client.open(*args, token=admin.token, **kwargs)
        assert response.status_code in (200, 204), response.text
    change(do, product, category)
    assert client.get(made.headers["Location"], token=admin.token).data == made.data


def test_a_sale_stays_as_it_was_when_its_category_is_deleted(client, admin, buy, make_product,
                                                             category):
    product = make_product(category_id=category["id"])
    made = buy((product, 3))
    client.delete(f"products/{product['id']}", token=admin.token)
    path = f"categories/{category['id']}"
    assert client.delete(path, token=admin.token).status_code == 204
    assert client.get(made.headers["Location"], token=admin.token).data == made.data


def test_a_sale_outlives_its_buyer_without_naming_them(client, admin, buy, refund, make_product):
    buyer = register(client)
    made = buy((make_product(), 3), token=buyer.token)
    assert client.delete(f"users/{buyer.id}", token=admin.token).status_code == 204
    sale = client.get(made.headers["Location"], token=admin.token).json
    assert sale == made.json | {"user_id": None}
    assert refund(sale).json["status"] == "refunded"


def test_the_next_sale_has_the_new_name_and_price(client, admin, buy, make_product):
    product = make_product(price="1.00")
    buy((product, 1))
    client.patch(f"products/{product['id']}", token=admin.token,
                 json={"name": "Dearer", "price": "2.50"})
    [item] = buy((product, 1)).json["items"]
    assert (item["name"], item["unit_price"]) == ("Dearer", "2.50")


# Version 2


def test_v2_serves_the_same(client, admin, user, buy, make_product):
    product = make_product(stock=5)
    made = buy((product, 2), version="v2")
    assert made.headers["Location"] == f"/api/v2/transactions/{made.json['id']}"
    for path in (f"transactions/{made.json['id']}", "transactions"):
        old, new = (client.get(f"/api/{v}/{path}", token=user.token) for v in ("v1", "v2"))
        assert old.data == new.data
    path = f"/api/v2/transactions/{made.json['id']}/refund"
    assert client.post(path, token=admin.token).json["status"] == "refunded"
    assert client.post(path.replace("v2", "v1"), token=admin.token).status_code == 409
