"""Products: what may be stored, how it is found, changed and taken out of the shop."""
import itertools

import pytest

from tests.conftest import unique

MAX_ID = 2**63 - 1


@pytest.fixture
def shelf(make_category, make_product):
    """A category of the test's own; ``shelf.add(**fields)`` puts a product into it."""
    class Shelf:
        id = make_category()["id"]

        def add(self, **fields):
            return make_product(category_id=self.id, **fields)
    return Shelf()


def listed(client, shelf, query=""):
    """The products of a shelf that a query finds, in its order."""
    response = client.get(f"products?limit=100&category_id={shelf.id}{query}")
    assert response.status_code == 200, response.text
    return response.json["data"]


def ids(products):
    return [product["id"] for product in products]


def send(client, admin, **body):
    return client.post("products", token=admin.token,
                       json={"name": unique("Product "), "price": "1.00"} | body)


def refused(response, field):
    """Assert that an answer is a 422 that names this field."""
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")
    assert field in [detail["field"] for detail in response.json["details"]]


def test_a_product_is_created_read_changed_and_deleted(client, admin, shelf):
    body = {"sku": unique("SKU-"), "name": "Green tea", "description": "First flush,\nloose.",
            "price": "119.23", "stock": 7, "category_id": shelf.id}
    created = client.post("products", token=admin.token, json=body)
    assert created.status_code == 201
    product = created.json
    assert body.items() <= product.items()
    path = f"products/{product['id']}"
    assert client.get(path).json == product
    changed = client.patch(path, token=admin.token, json={"stock": 8, "price": "9.90"})
    assert changed.status_code == 200
    assert changed.json == product | {"stock": 8, "price": "9.90",
                                      "updated_at": changed.json["updated_at"]}
    assert changed.json["updated_at"] > product["updated_at"]
    assert client.get(path).json == changed.json
    deleted = client.delete(path, token=admin.token)
    assert (deleted.status_code, deleted.data) == (204, b"")
    assert client.get(path).status_code == 404
    assert client.patch(path, token=admin.token, json={"stock": 1}).status_code == 404
    assert client.delete(path, token=admin.token).status_code == 404


def test_what_is_left_out_has_its_default(client, admin):
    product = send(client, admin).json
    assert (product["sku"], product["description"], product["stock"]) == (None, "", 0)
    assert (product["category_id"], product["category_name"]) == (None, None)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_location_leads_to_the_new_product(client, admin, version):
    created = client.post(f"/api/{version}/products", token=admin.token,
                          json={"name": "Tea", "price": 1})
    assert created.headers["Location"] == f"/api/{version}/products/{created.json['id']}"
    assert client.get(created.headers["Location"]).json == created.json


def test_version_2_serves_the_same_products(client, admin, shelf):
    product = shelf.add(name="Tea")
    path = f"products/{product['id']}"
    assert client.get(f"/api/v2/{path}").json == product
    assert (client.get(f"/api/v2/products?category_id={shelf.id}").json["data"]
            == listed(client, shelf) == [product])
    client.patch(f"/api/v2/{path}", token=admin.token, json={"name": "Black tea"})
    assert client.get(path).json["name"] == "Black tea"
    assert client.delete(f"/api/v2/{path}", token=admin.token).status_code == 204
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(("field", "value"), [
    ("sku", "x"), ("sku", "x" * 64), ("sku", None),
    ("name", "x"), ("name", "x" * 200), ("name", "茶" * 200), ("name", "🍵" * 200),
    ("description", ""), ("description", "x" * 10000), ("description", "tab\tand\r\nlines"),
    ("stock", 0), ("stock", 2147483647), ("stock", 7.0), ("category_id", None),
], ids=lambda value: str(value)[:12])
def test_a_value_on_its_bound_is_stored(client, admin, field, value):
    product = send(client, admin, **{field: value}).json
    assert product[field] == value
    client.delete(f"products/{product['id']}", token=admin.token)


@pytest.mark.parametrize(("field", "value"), [
    ("sku", ""), ("sku", "   "), ("sku", "x" * 65), ("sku", 12), ("sku", "a\tb"), ("sku", ["x"]),
    ("name", ""), ("name", "  "), ("name", "x" * 201), ("name", None), ("name", 1),
    ("name", "a\nb"), ("name", "a\x7fb"), ("name", {"x": 1}),
    ("description", "x" * 10001), ("description", None), ("description", "bell\a"),
    ("description", 5),
    ("stock", -1), ("stock", 2147483648), ("stock", 2**63), ("stock", 1.5),
    ("stock", "7"), ("stock", True), ("stock", None), ("stock", [1]),
    ("category_id", 0), ("category_id", -1), ("category_id", 2**63), ("category_id", "1"),
    ("category_id", True), ("category_id", 1.5), ("stock", 1e300),
    ("price", -1), ("price", -0.01), ("price", 10000000000), ("price", 9999999999.995),
    ("price", "-0.01"), ("price", "10000000000.00"), ("price", "119.239"), ("price", 119.239),
    ("price", "1,50"), ("price", "1e2"), ("price", " 1"), ("price", "1 "), ("price", "+1"),
    ("price", "1."), ("price", ".5"), ("price", ""), ("price", "NaN"), ("price", "Infinity"),
    ("price", "１"), ("price", True), ("price", None), ("price", [1]), ("price", 0.1 + 0.2),
], ids=lambda value: repr(value)[:16])
@pytest.mark.parametrize("change", [False, True], ids=["new", "change"])
def test_a_value_beyond_its_bound_is_refused_by_name(client, admin, a_product, field, value,
                                                     change):
    if change:
        refused(client.patch(a_product, token=admin.token, json={field: value}), field)
    else:
        refused(send(client, admin, **{field: value}), field)


@pytest.fixture(scope="module")
def a_product(client, admin):
    """The path of a product that nobody changes."""
    return f"products/{send(client, admin).json['id']}"


@pytest.mark.parametrize(("number", "stored"), [
    ("0", "0.00"), ("-0.0", "0.00"), ("0.1", "0.10"), ("0.3", "0.30"), ("1.1", "1.10"),
    ("4.35", "4.35"), ("0.01", "0.01"), ("119.23", "119.23"), ("119.230", "119.23"),
    ("1e2", "100.00"), ("1.5E1", "15.00"), ("0e400", "0.00"), ("99999999.99", "99999999.99"),
    ("9999999999.99", "9999999999.99"), ("9999999999.98", "9999999999.98"),
    ('"0"', "0.00"), ('"0.1"', "0.10"), ('"119.23"', "119.23"), ('"0007.5"', "7.50"),
    ('"9999999999.99"', "9999999999.99"),
])
def test_a_price_is_kept_to_the_cent(client, admin, number, stored):
    response = client.post("products", token=admin.token, content_type="application/json",
                           data=f'{{"name": "Tea", "price": {number}}}')
    assert response.json["price"] == stored
    assert client.get(f"products/{response.json['id']}").json["price"] == stored


@pytest.mark.parametrize("number", [
    "1e400", "-1e400", "1e-400", "1e999999999", "119.239", "0.30000000000000004", "1" * 400,
    "9999999999.990000000000000000000001",
])
def test_a_number_that_is_no_price_is_refused(client, admin, number):
    refused(client.post("products", token=admin.token, content_type="application/json",
                        data=f'{{"name": "Tea", "price": {number}}}'), "price")


def test_white_space_around_a_name_is_dropped(client, admin):
    assert send(client, admin, name="  Green tea ").json["name"] == "Green tea"


@pytest.mark.parametrize("missing", ["name", "price"])
def test_a_product_needs_name_and_price(client, admin, missing):
    body = {"name": "Tea", "price": 1}
    del body[missing]
    refused(client.post("products", token=admin.token, json=body), missing)


@pytest.mark.parametrize("field", ["id", "category_name", "created_at", "updated_at", "sold",
                                   "retired_at", "search_text", "colour"])
def test_a_field_that_is_not_the_clients_is_refused(client, admin, a_product, field):
    refused(send(client, admin, **{field: 1}), field)
    refused(client.patch(a_product, token=admin.token, json={field: 1, "stock": 1}), field)


def test_a_change_has_at_least_one_field(client, admin, a_product):
    response = client.patch(a_product, token=admin.token, json={})
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")


def test_null_takes_sku_and_category_away(client, admin, shelf):
    product = shelf.add(sku=unique("S"))
    changed = client.patch(f"products/{product['id']}", token=admin.token,
                           json={"sku": None, "category_id": None}).json
    assert (changed["sku"], changed["category_id"], changed["category_name"]) == (None, None, None)


def test_a_form_makes_a_product_too(client, admin):
    response = client.post("products", token=admin.token, data={
        "name": "Tea & more", "price": "2.50", "stock": "3", "sku": "", "category_id": ""})
    assert response.status_code == 201
    product = response.json
    assert (product["name"], product["price"], product["stock"]) == ("Tea & more", "2.50", 3)
    assert (product["sku"], product["category_id"]) == (None, None)


def test_everybody_reads_and_only_an_admin_writes(client, user, a_product):
    assert client.get("products").status_code == client.get(a_product).status_code == 200
    calls = [("POST", "products"), ("PATCH", a_product), ("DELETE", a_product)]
    for (method, path), (token, status) in itertools.product(calls, [(None, 401),
                                                                     (user.token, 403)]):
        assert client.open(method, path, token=token, json={}).status_code == status


def test_a_sku_is_taken_once(client, admin, make_product):
    sku = unique("S")
    first, second = make_product(sku=sku), make_product(sku=unique("S"))
    answers = [send(client, admin, sku=sku),
               client.patch(f"products/{second['id']}", token=admin.token, json={"sku": sku})]
    assert {(a.status_code, a.json["code"]) for a in answers} == {(409, "sku_taken")}
    assert client.get(f"products/{second['id']}").json == second
    same = client.patch(f"products/{first['id']}", token=admin.token, json={"sku": sku})
    assert same.status_code == 200


def test_any_number_of_products_have_no_sku(make_product):
    assert make_product(sku=None)["id"] != make_product(sku=None)["id"]


def sell(client, user, product):
    response = client.post("transactions", token=user.token,
                           json={"items": [{"product_id": product["id"], "quantity": 1}]})
    assert response.status_code == 201, response.text
    return response.json


@pytest.mark.parametrize("sold", [False, True], ids=["deleted", "retired"])
def test_a_sku_is_free_again_when_its_product_is_gone(client, admin, user, make_product, sold):
    product = make_product(sku=unique("S"))
    if sold:
        sell(client, user, product)
    assert client.delete(f"products/{product['id']}", token=admin.token).status_code == 204
    assert send(client, admin, sku=product["sku"]).status_code == 201


def test_a_sold_product_is_retired(client, admin, user, shelf):
    kept, product = shelf.add(), shelf.add(name=unique("Rare "))
    sale = sell(client, user, product)
    path = f"products/{product['id']}"
    assert client.delete(path, token=admin.token).status_code == 204
    for method in ("GET", "PATCH", "DELETE"):
        answer = client.open(method, path, token=admin.token,
                             json={"stock": 1} if method == "PATCH" else None)
        assert answer.status_code == 404
    assert listed(client, shelf) == [kept]
    assert client.get("products", query_string={"search": product["name"]}).json["data"] == []
    again = client.post("transactions", token=user.token,
                        json={"items": [{"product_id": product["id"], "quantity": 1}]})
    refused(again, "items.0.product_id")
    assert client.get(f"transactions/{sale['id']}", token=user.token).json == sale


def test_an_unknown_category_is_refused_by_name(client, admin, a_product):
    refused(send(client, admin, category_id=MAX_ID), "category_id")
    refused(client.patch(a_product, token=admin.token, json={"category_id": MAX_ID}),
            "category_id")


@pytest.mark.parametrize("bad", ["0", "-1", "01", "x", "1.0", "9223372036854775808", "1" * 30,
                                 "%00", "%FF", "1%20", "+1", "١"])
def test_an_id_that_no_product_can_have_is_404(client, admin, bad):
    for method in ("GET", "PATCH", "DELETE"):
        assert client.open(method, f"products/{bad}", token=admin.token).status_code == 404
    assert client.get(f"products/{MAX_ID}").status_code == 404


# Lists: filters


def test_categories_are_any_of_those_named(client, make_category, make_product):
    one, two, three = (make_category()["id"] for _ in range(3))
    products = [make_product(category_id=c) for c in (one, two, three, one)]
    def found(*categories):
        return ids(client.get("products", query_string={"category_id": categories,
                                                        "limit": 100}).json["data"])
    a, b, c, d = ids(products)
    assert found(one) == [d, a]
    assert found(one, three) == [d, c, a]
    assert found(three, one, two) == [d, c, b, a]
    assert found(one, one) == [d, a]
    assert found(MAX_ID) == []


def test_prices_are_bounded_inclusively(client, shelf):
    cheap, middle, dear = (shelf.add(price=p)["id"] for p in ("9.99", "10.00", "10.01"))
    def found(query):
        return ids(listed(client, shelf, "&sort=price" + query))
    assert found("&min_price=10.00") == [middle, dear]
    assert found("&max_price=10") == [cheap, middle]
    assert found("&min_price=10&max_price=10.0") == [middle]
    assert found("&min_price=0&max_price=9999999999.99") == [cheap, middle, dear]
    assert found("&min_price=10.02") == []


def test_in_stock_is_what_can_be_bought(client, shelf):
    there, gone = shelf.add(stock=1)["id"], shelf.add(stock=0)["id"]
    assert ids(listed(client, shelf, "&in_stock=true")) == [there]
    assert ids(listed(client, shelf, "&in_stock=false")) == [gone]


SEARCHED = {"name": "Grüner Tee 100%_pur", "description": "Finest leaves,\nlong \\walks'; --",
            "price": 1}


@pytest.fixture(scope="module")
def searched(client, admin):
    """The category of one product, whose SKU is ``Ab-12_<more>z``, and one that nothing finds."""
    category = client.post("categories", token=admin.token, json={"name": unique("C")}).json["id"]
    send(client, admin, category_id=category, sku=f"Ab-12_{unique()}z", **SEARCHED)
    send(client, admin, category_id=category, name="~", description="~", sku=unique("~"))
    return category


@pytest.mark.parametrize("text", [
    "Grüner Tee 100%_pur", "grüner", "GRÜNER", "ü", "r T", "100%", "%_", "_pur", "%", "_", "\\",
    "\\w", "FINEST", "leaves,", "'; --", "ab-12_", "2_", "Z", "e",
])
def test_a_search_finds_a_substring_in_any_letter_case(client, searched, text):
    found = client.get("products", query_string={"search": text, "category_id": searched})
    names = [product["name"] for product in found.json["data"]]
    assert names == [SEARCHED["name"]]


@pytest.mark.parametrize("text", [
    "100_", "Gr%r", "Gr_ner", "Tee  100", "Grüner Tee pur", "%%", "__", "\\%", "\\\\", "n_r",
    "purAb", "purAb-12", "zFinest", "pur Ab", "r%A", "r_A", "tea", "gruner", " Grüner",
])
def test_a_search_finds_nothing_else_nor_across_a_border(client, searched, text):
    found = client.get("products", query_string={"search": text, "category_id": searched})
    assert (found.status_code, found.json["data"]) == (200, [])


def test_white_space_counts_in_a_search(client, shelf):
    product = shelf.add(name="one two")
    assert ids(listed(client, shelf, "&search=%20")) == [product["id"]]
    assert listed(client, shelf, "&search=%20%20") == []


def test_filters_are_taken_together(client, shelf):
    wanted = shelf.add(name="Tea", price=5, stock=1)
    shelf.add(name="Tea", price=5, stock=0)
    shelf.add(name="Tea", price=6, stock=1)
    shelf.add(name="Coffee", price=5, stock=1)
    assert listed(client, shelf, "&search=tea&max_price=5&in_stock=true") == [wanted]


# Lists: orders


@pytest.fixture(scope="module")
def row_of_shelves(client, admin):
    """A category, and its products: names and prices that tie, in any letter case."""
    category = client.post("categories", token=admin.token, json={"name": unique("C")}).json["id"]
    names = ["apple", "Banana", "APPLE", "cherry", "banana", "Äpfel", "apple", "10", "9", "a b"]
    return category, [
        send(client, admin, category_id=category, name=name, price=price).json
        for name, price in zip(names, [5, 3, 5, 10, 3, 5, "0.50", 3, 9, 10], strict=True)
    ]


KEYS = {"created_at": lambda p: p["created_at"], "name": lambda p: p["name"].lower(),
        "price": lambda p: float(p["price"])}


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("sort", KEYS)
def test_a_list_is_sorted_and_ties_are_in_the_order_of_ids(client, row_of_shelves, sort, order):
    category, products = row_of_shelves
    expected = sorted(products, key=lambda p: (KEYS[sort](p), p["id"]), reverse=order == "desc")
    response = client.get(f"products?category_id={category}&sort={sort}&order={order}")
    assert response.json["data"] == expected


@pytest.mark.parametrize(("query", "sort", "order"), [
    ("", "created_at", "desc"), ("&sort=created_at", "created_at", "desc"),
    ("&order=asc", "created_at", "asc"), ("&sort=name", "name", "asc"),
    ("&sort=price", "price", "asc"),
])
def test_the_newest_come_first_and_other_orders_ascend(client, row_of_shelves, query, sort, order):
    category, _ = row_of_shelves
    base = f"products?category_id={category}"
    assert (client.get(base + query).json["data"]
            == client.get(f"{base}&sort={sort}&order={order}").json["data"])


@pytest.fixture(scope="module")
def tea_shop(client, admin):
    """A category with products that have to do with tea, each in its way: (id, {name: id})."""
    category = client.post("categories", token=admin.token, json={"name": unique("C")}).json["id"]
    names = ["Iced Tea", "tea", "Box", "Teapot", "Bowl", "TEA towel", "steam", "Coffee", "Tea"]
    more = {"Box": {"description": "for tea"}, "Bowl": {"sku": unique("tea-")}}
    return category, {
        name + str(names[:i].count(name)): send(
            client, admin, category_id=category, name=name, **more.get(name, {})).json["id"]
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize(("search", "names"), [
    # Names that begin with it, by name; names that have it, the newest first; then the rest.
    ("Tea", ["tea", "Tea", "TEA towel", "Teapot", "steam", "Iced Tea", "Bowl", "Box"]),
    ("teapot", ["Teapot"]),
    ("for tea", ["Box"]),
    # One or two letters are looked for in two steps only.
    ("te", ["tea", "Tea", "TEA towel", "Teapot", "steam", "Bowl", "Box", "Iced Tea"]),
])
def test_relevance_puts_what_is_called_so_before_what_speaks_of_it(client, tea_shop, search,
                                                                   names):
    category, products = tea_shop
    by_id = {number: name[:-1] for name, number in products.items()}
    query = {"category_id": category, "search": search, "sort": "relevance"}
    assert [by_id[number] for number in ids(client.get("products", query_string=query).json["data"])
            ] == names
    for limit in (1, 2, 3):  # and so does a walk, and so do pages
        walked, paged, step = [], [], {}
        for page in range(1, len(names) // limit + 2):
            body = client.get("products", query_string=query | {"limit": limit} | step).json
            walked += ids(body["data"])
            step = {"cursor": body["pagination"]["next_cursor"]}
            body = client.get("products", query_string=query | {"limit": limit, "page": page}).json
            paged += ids(body["data"])
            if step["cursor"] is None:
                break
        assert [by_id[number] for number in walked] == names
        assert paged == walked


# Lists: what is refused


@pytest.mark.parametrize(("query", "field"), [
    ("colour=red", "colour"), ("Page=1", "Page"), ("page[]=1", "page[]"),
    ("page=1&page=1", "page"), ("limit=5&limit=5", "limit"), ("sort=name&sort=price", "sort"),
    ("search=a&search=b", "search"), ("in_stock=true&in_stock=true", "in_stock"),
    ("min_price=1&min_price=2", "min_price"), ("cursor=a&cursor=b", "cursor"),
    ("page=0", "page"), ("page=-1", "page"), ("page=1.0", "page"), ("page=x", "page"),
    ("page=", "page"), ("page=%20 1", "page"), ("page=2147483648", "page"),
    ("page=1000000000000000000", "page"), ("page=9223372036854775808", "page"),
    ("page=%D9%A1", "page"), ("page=1e3", "page"), ("page=true", "page"),
    ("limit=0", "limit"), ("limit=101", "limit"), ("limit=-5", "limit"), ("limit=", "limit"),
    ("sort=stock", "sort"), ("sort=", "sort"), ("sort=Name", "sort"), ("sort=-name", "sort"),
    ("sort=relevance", "sort"), ("sort=relevance&search=a&order=asc", "order"),
    ("order=up", "order"), ("order=DESC", "order"),
    ("count=all", "count"), ("count=", "count"),
    ("category_id=0", "category_id.0"), ("category_id=x", "category_id.0"),
    ("category_id=", "category_id.0"), ("category_id=9223372036854775808", "category_id.0"),
    ("category_id=1&category_id=-1", "category_id.1"),
    ("&".join(["category_id=1"] * 21), "category_id"),
    ("min_price=-1", "min_price"), ("min_price=x", "min_price"), ("min_price=1.001", "min_price"),
    ("max_price=10000000000", "max_price"), ("max_price=", "max_price"),
    ("max_price=NaN", "max_price"), ("min_price=2&max_price=1", "max_price"),
    ("in_stock=1", "in_stock"), ("in_stock=TRUE", "in_stock"), ("in_stock=", "in_stock"),
    ("search=", "search"), ("search=" + "x" * 101, "search"), ("search=a%1Fb", "search"),
    ("search=a%0Ab", "search"), ("cursor=", "cursor"), ("cursor=abc", "cursor"),
    ("cursor=abc&page=1", "page"),
], ids=lambda value: value[:24])
def test_a_parameter_that_is_not_valid_is_refused_by_name(client, query, field):
    response = client.get(f"products?{query}")
    refused(response, field)
    assert {detail["in"] for detail in response.json["details"]} == {"query"}


def test_a_page_beyond_the_end_is_empty(client, shelf):
    shelf.add()
    for page in (2, 1000, 2147483647):
        body = client.get(f"products?category_id={shelf.id}&page={page}").json
        assert body == {"data": [], "pagination": {"page": page, "limit": 20, "total": 1,
                                                   "pages": 1, "next_cursor": None}}
