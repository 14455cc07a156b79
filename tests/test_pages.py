"""Lists: pages by number and by cursor, what they count, and where their links lead."""
import itertools
import random
import re
from urllib.parse import parse_qsl, quote, urlsplit

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import PASSWORD, execute, register, unique

SORTS = ["created_at", "name", "price"]
ORDERS = ["asc", "desc"]


@pytest.fixture(scope="module")
def catalogue(client, admin, database_url):
    """A category of 23 products, in which every sort has ties: its id."""
    category = client.post("categories", token=admin.token, json={"name": unique("C")}).json["id"]
    execute(database_url, f"""
        INSERT INTO products (name, price, stock, category_id, created_at)
        SELECT (ARRAY['Tea', 'tea', 'Äther', 'coffee', 'Zimt'])[1 + i % 5], i % 4, i % 3,
               {category}, timestamptz '2026-01-01' + i / 6 * interval '1 microsecond'
        FROM generate_series(1, 23) i
    """)
    return category


def links(response):
    """The Link header, {relation: address}."""
    found = re.findall(r'<([^>]*)>; rel="(\w+)"', response.headers.get("Link", ""))
    return {relation: address for address, relation in found}


def walk(client, path, token=None):
    """Every row of a list, by cursor, and the pages they came in."""
    rows, pages, cursor = [], [], ""
    while cursor is not None:
        body = client.get(path + (f"&cursor={cursor}" if cursor else ""), token=token).json
        rows += body["data"]
        pages.append(body["pagination"])
        cursor = body["pagination"]["next_cursor"]
    return rows, pages


# By number


@pytest.mark.parametrize(("limit", "sizes"), [
    (1, [1] * 23), (10, [10, 10, 3]), (22, [22, 1]), (23, [23]), (24, [23]), (100, [23]),
])
def test_pages_by_number_are_the_whole_list_in_parts(client, catalogue, limit, sizes):
    base = f"products?category_id={catalogue}"
    everything = client.get(f"{base}&limit=100").json["data"]
    rows = []
    for number, size in enumerate(sizes, 1):
        body = client.get(f"{base}&limit={limit}&page={number}").json
        rows += body["data"]
        assert len(body["data"]) == size
        pagination = body["pagination"]
        assert (pagination.pop("next_cursor") is None) == (number == len(sizes))
        assert pagination == {"page": number, "limit": limit, "total": 23, "pages": len(sizes)}
    assert rows == everything


def test_a_page_is_the_first_of_twenty_rows_unless_it_says_otherwise(client, catalogue):
    plain = client.get(f"products?category_id={catalogue}")
    assert plain.json == client.get(f"products?category_id={catalogue}&page=1&limit=20").json
    assert len(plain.json["data"]) == plain.json["pagination"]["limit"] == 20


def test_an_empty_list_has_no_pages(client, make_category):
    response = client.get(f"products?category_id={make_category()['id']}")
    assert response.json == {"data": [], "pagination": {
        "page": 1, "limit": 20, "total": 0, "pages": 0, "next_cursor": None}}
    assert set(links(response)) == {"first", "last"}


def test_total_is_exact_after_every_change(client, admin, make_category, make_product):
    category = make_category()["id"]
    def total():
        return client.get(f"products?category_id={category}").json["pagination"]["total"]
    assert total() == 0
    product = make_product(category_id=category)
    assert total() == 1
    client.patch(f"products/{product['id']}", token=admin.token, json={"category_id": None})
    assert total() == 0
    client.patch(f"products/{product['id']}", token=admin.token, json={"category_id": category})
    assert total() == 1
    client.delete(f"products/{product['id']}", token=admin.token)
    assert total() == 0


def test_total_is_counted_once_a_filter_until_something_changes(client, user, make_category,
                                                                make_product, database_url):
    """A row that arrives behind the API's back shows which answers were counted anew."""
    category = make_category()["id"]
    def total(query):
        path = f"products?category_id={category}&limit=1&{query}"
        return client.get(path).json["pagination"]["total"]
    products = [make_product(category_id=category) for _ in range(2)]
    assert total("max_price=99") == total("max_price=99&in_stock=true") == 2
    execute(database_url, "INSERT INTO products (name, price, stock, category_id) "
                          f"VALUES ('behind', 5, 1, {category})")
    assert total("max_price=99&page=2") == total("max_price=99&sort=price&order=desc") == 2
    assert total("max_price=9999") == 3
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": products[0]["id"], "quantity": 1}]})
    assert total("max_price=99&page=2") == 2  # a sale changes no count but those of in_stock
    assert total("max_price=99&in_stock=true&page=2") == 3
    make_product(category_id=category)
    assert total("max_price=99&page=2") == total("max_price=9999&sort=name") == 4


def test_a_page_behind_the_end_reads_no_rows(client, make_category, make_product, database_url):
    category = make_category()["id"]
    for _ in range(3):
        make_product(category_id=category)
    for query in ("", "&max_price=99", "&count=none"):
        behind = client.get(f"products?category_id={category}&page=5000{query}").json
        assert behind["data"] == []
        assert behind["pagination"]["next_cursor"] is None


def test_count_none_leaves_the_total_out(client, catalogue):
    response = client.get(f"products?category_id={catalogue}&count=none&page=2&limit=10")
    pagination = response.json["pagination"]
    assert (pagination["page"], pagination["total"], pagination["pages"]) == (2, None, None)
    assert set(links(response)) == {"first", "prev", "next"}


def test_count_estimated_guesses(client, make_category, database_url):
    category = make_category()["id"]
    execute(database_url, f"INSERT INTO products (name, price, category_id) "
                          f"SELECT 'x', 1, {category} FROM generate_series(1, 2000)")
    execute(database_url, "ANALYZE products")
    base = f"products?category_id={category}"
    pagination = client.get(f"{base}&count=estimated").json["pagination"]
    assert 1000 < pagination["total"] < 4000
    assert pagination["pages"] == -(-pagination["total"] // 20)
    assert client.get(f"{base}&count=exact").json["pagination"]["total"] == 2000
    execute(database_url, f"DELETE FROM products WHERE category_id = {category}")


@pytest.mark.parametrize("path", ["users", "transactions"])
def test_other_lists_count_as_asked_too(client, admin, path):
    def total(how):
        response = client.get(f"{path}?count={how}", token=admin.token)
        return response.json["pagination"]["total"]
    assert total("none") is None
    assert total("estimated") >= 0
    rows, _ = walk(client, f"{path}?limit=100", admin.token)
    assert total("exact") == len(rows)


# Links


@pytest.mark.parametrize("sorted_by", ["sort=created_at", "sort=name&order=desc", "sort=price",
                                       "sort=relevance&search=t"])
def test_links_lead_through_the_whole_list(client, catalogue, sorted_by):
    base = f"products?category_id={catalogue}&{sorted_by}"
    everything = client.get(f"{base}&limit=100").json["data"]
    address, rows = f"{base}&limit=5", []
    while address:
        response = client.get(address)
        rows += response.json["data"]
        address = links(response).get("next")
    assert rows == everything


@pytest.mark.parametrize(("page", "relations"), [
    (1, {"first": 1, "next": 2, "last": 5}),
    (2, {"first": 1, "prev": 1, "next": 3, "last": 5}),
    (5, {"first": 1, "prev": 4, "last": 5}),
    (6, {"first": 1, "prev": 5, "last": 5}),
])
def test_links_lead_to_the_other_pages_and_keep_the_callers_parameters(client, catalogue, page,
                                                                       relations):
    asked = [("category_id", str(catalogue)), ("limit", "5"), ("sort", "price"),
             ("min_price", "0"), ("page", str(page))]
    response = client.get("products", query_string=asked)
    found = links(response)
    assert {relation: dict(parse_qsl(urlsplit(address).query))["page"]
            for relation, address in found.items()} == {r: str(n) for r, n in relations.items()}
    for relation, address in found.items():
        assert urlsplit(address).path == "/api/v1/products"
        same = client.get("products", query_string=[*asked[:-1], ("page", relations[relation])])
        assert client.get(address).json == same.json
        assert client.get(address).headers["Link"] == same.headers["Link"]


def test_links_keep_every_kind_of_parameter(client, make_category):
    one, two = make_category()["id"], make_category()["id"]
    asked = {"category_id": [str(one), str(two)], "search": ["a&b=c d+é%_"], "in_stock": ["true"],
             "min_price": ["1.50"], "max_price": ["9999999999.99"], "sort": ["name"],
             "order": ["desc"], "limit": ["7"], "count": ["none"]}
    for relation in links(client.get("products", query_string=asked)).values():
        kept = {}
        for name, value in parse_qsl(urlsplit(relation).query, strict_parsing=True):
            kept.setdefault(name, []).append(value)
        assert asked.items() <= kept.items()


def test_links_of_a_walk_lead_on_by_cursor(client, catalogue):
    path, rows = f"products?category_id={catalogue}&limit=10&sort=name", []
    response = client.get(f"{path}&count=none")
    cursor = response.json["pagination"]["next_cursor"]
    response = client.get(f"{path}&cursor={cursor}")
    rows += response.json["data"]
    assert set(links(response)) == {"first", "next"}
    response = client.get(links(response)["next"])
    rows += response.json["data"]
    assert set(links(response)) == {"first"}
    everything = client.get(f"products?category_id={catalogue}&limit=100&sort=name").json["data"]
    assert rows == everything[10:]
    assert client.get(links(response)["first"]).json["data"] == everything[:10]


def test_version_2_links_to_version_2(client, catalogue):
    for address in links(client.get(f"/api/v2/products?category_id={catalogue}")).values():
        assert address.startswith("/api/v2/products?")


# By cursor


@pytest.mark.parametrize("limit", [1, 2, 7, 22, 23, 24])
@pytest.mark.parametrize("sorted_by", [
    *(f"sort={sort}&order={order}" for sort in SORTS for order in ORDERS),
    "sort=relevance&search=t", "sort=relevance&search=tea",
])
def test_a_walk_is_the_whole_list(client, catalogue, sorted_by, limit):
    base = f"products?category_id={catalogue}&{sorted_by}"
    everything = client.get(f"{base}&limit=100").json["data"]
    rows, pages = walk(client, f"{base}&limit={limit}")
    assert rows == everything
    for pagination in pages[1:]:
        assert (pagination["total"], pagination["page"], pagination["pages"]) == (None, None, None)
        assert pagination["limit"] == limit


@pytest.mark.parametrize("query", ["&search=tea", "&in_stock=true", "&min_price=1&max_price=2",
                                   "&in_stock=false&search=E"])
def test_a_walk_keeps_to_its_filters(client, catalogue, query):
    base = f"products?category_id={catalogue}&sort=price{query}"
    rows, _ = walk(client, f"{base}&limit=2")
    assert rows == client.get(f"{base}&limit=100").json["data"]
    assert len(rows) >= 3


def test_a_walk_over_several_categories_is_the_whole_list(client, catalogue, make_category,
                                                          make_product):
    other = make_category()["id"]
    for _ in range(3):
        make_product(category_id=other, price=2)
    base = f"products?category_id={catalogue}&category_id={other}&sort=price"
    rows, _ = walk(client, f"{base}&limit=4")
    assert rows == client.get(f"{base}&limit=100").json["data"]
    assert len(rows) == 26


@pytest.fixture(scope="module")
def crowd(client, database_url):
    """A word that seven users have in their names."""
    word = unique("crowd")
    for name in ("Bo", "ann", "Ann", "ann", "Cy", "bo", "Ann"):
        register(client, name=f"{name} {word}", password=PASSWORD)
    return word


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sort", ["created_at", "name", "email"])
def test_users_are_walked_in_both_versions(client, admin, crowd, sort, order):
    query = f"users?search={crowd}&sort={sort}&order={order}"
    everything = client.get(f"{query}&limit=100", token=admin.token).json["data"]
    rows, _ = walk(client, f"{query}&limit=2", admin.token)
    assert rows == everything
    assert len(rows) == 7
    ids, address = [], f"/api/v2/{query}&limit=2"
    while address:
        body = client.get(address, token=admin.token).json
        ids += [user["id"] for user in body["data"]]
        address = body["links"]["next"]
    assert ids == [user["id"] for user in everything]


def test_sales_are_walked(client, user, make_product):
    product = make_product()
    for _ in range(5):
        client.post("transactions", token=user.token,
                    json={"items": [{"product_id": product["id"], "quantity": 1}]})
    rows, _ = walk(client, "transactions?limit=2", user.token)
    assert rows == client.get("transactions", token=user.token).json["data"]
    assert len(rows) == 5


def test_a_walk_may_change_its_step(client, catalogue):
    base = f"products?category_id={catalogue}"
    everything = client.get(f"{base}&limit=100").json["data"]
    cursor = client.get(f"{base}&limit=5").json["pagination"]["next_cursor"]
    assert client.get(f"{base}&limit=9&cursor={cursor}").json["data"] == everything[5:14]


def test_a_walk_gets_past_the_longest_names(client, make_category, make_product):
    """Whose characters repeat nothing that could be packed."""
    category, dice = make_category()["id"], random.Random(7)
    names = ["".join(chr(dice.randrange(0x10000, 0x110000)) for _ in range(200)) for _ in "abc"]
    for name in names:
        make_product(category_id=category, name=name)
    rows, _ = walk(client, f"products?category_id={category}&sort=name&limit=1")
    assert [row["name"] for row in rows] == sorted(names)


def test_a_cursor_is_safe_in_an_address(client, catalogue):
    for sort in SORTS:
        cursor = client.get(f"products?category_id={catalogue}&limit=1&sort={sort}") \
            .json["pagination"]["next_cursor"]
        assert quote(cursor, safe="") == cursor


@pytest.fixture
def step(client, catalogue):
    """(path of a list, its next cursor)."""
    path = f"products?category_id={catalogue}&limit=5&sort=name"
    return path, client.get(path).json["pagination"]["next_cursor"]


def refused(response):
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")
    assert [(d["field"], d["in"]) for d in response.json["details"]] == [("cursor", "query")]


def test_a_changed_cursor_is_refused(client, step):
    path, cursor = step
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    dice = random.Random(1)
    changed = [cursor[:i] + dice.choice(alphabet.replace(c, "")) + cursor[i + 1:]
               for i, c in enumerate(cursor)]
    changed += [cursor[:-1] + c for c in alphabet if c != cursor[-1]]
    for other in changed:
        refused(client.get(f"{path}&cursor={other}"))


def test_a_truncated_or_lengthened_cursor_is_refused(client, step):
    path, cursor = step
    for length in range(1, len(cursor)):
        refused(client.get(f"{path}&cursor={cursor[:length]}"))
    for other in (cursor[1:], cursor + "A", "A" + cursor, cursor + "=", cursor + ".A", cursor * 2,
                  cursor + "%20", "%20" + cursor, cursor + "%C3%A9", "%F0%9F%8D%B5", "."):
        refused(client.get(f"{path}&cursor={other}"))


def test_a_cursor_of_other_filters_or_another_sort_is_refused(client, catalogue, step,
                                                              make_category):
    path, cursor = step
    assert client.get(f"{path}&cursor={cursor}").status_code == 200
    base = f"products?limit=5&cursor={cursor}"
    for query in (f"&category_id={catalogue}", "&sort=name",
                  f"&sort=name&category_id={make_category()['id']}",
                  f"&sort=price&category_id={catalogue}",
                  f"&sort=name&order=desc&category_id={catalogue}",
                  f"&sort=name&search=t&category_id={catalogue}",
                  f"&sort=name&min_price=1&category_id={catalogue}",
                  f"&sort=name&max_price=1&category_id={catalogue}",
                  f"&sort=name&in_stock=true&category_id={catalogue}"):
        refused(client.get(base + query))


def test_a_cursor_of_another_list_is_refused(client, admin, crowd):
    users = client.get("users?limit=1", token=admin.token).json["pagination"]["next_cursor"]
    products = client.get("products?limit=1").json["pagination"]["next_cursor"]
    refused(client.get(f"products?limit=1&cursor={users}"))
    refused(client.get(f"users?limit=1&cursor={products}", token=admin.token))
    refused(client.get(f"transactions?limit=1&cursor={products}", token=admin.token))


def test_a_cursor_of_another_shop_is_refused(make_app, make_client, client, step):
    path, cursor = step
    foreign = make_client(make_app(JWT_SECRET_KEY="another key of thirty-two bytes."))
    refused(foreign.get(f"{path}&cursor={cursor}"))


# A walk through a catalogue that changes under it

ROWS = st.tuples(st.sampled_from(["a", "A", "b", "ä", "c"]), st.integers(0, 3), st.integers(0, 3))
CHANGES = st.one_of(
    st.tuples(st.just("insert"), ROWS), st.tuples(st.just("delete"), st.integers(0, 11)),
    st.tuples(st.just("change"), st.integers(0, 11), ROWS),
)


class Shelf:
    """A category whose products come and go by SQL, behind the cache's back."""

    _numbers = itertools.count()

    def __init__(self, conn):
        self.conn, self.touched = conn, set()
        self.category = self._value("INSERT INTO categories (name) VALUES (%s) RETURNING id",
                                    unique("Shelf"))

    def _value(self, sql, *values):
        return self.conn.execute(sql, values).fetchone()[0]

    def insert(self, row):
        name, price, moment = row
        return self._value(
            "INSERT INTO products (name, price, created_at, category_id) VALUES "
            "(%s, %s, timestamptz '2026-01-01' + %s * interval '1 microsecond', %s) RETURNING id",
            name, price, moment, self.category)

    def apply(self, ids, change):
        kind, *what = change
        if kind == "insert":
            self.touched.add(self.insert(*what))
        elif ids:
            product = ids[what[0] % len(ids)]
            self.touched.add(product)
            if kind == "delete":
                self.conn.execute("DELETE FROM products WHERE id = %s", [product])
            else:
                name, price, moment = what[1]
                self.conn.execute(
                    "UPDATE products SET name = %s, price = %s, created_at = timestamptz "
                    "'2026-01-01' + %s * interval '1 microsecond' WHERE id = %s",
                    [name, price, moment, product])


@pytest.fixture(scope="module")
def conn(database_url):
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield conn


@settings(max_examples=80, deadline=None, database=None,
          suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(ROWS, max_size=12), sort=st.sampled_from(SORTS),
       order=st.sampled_from(ORDERS), limit=st.integers(1, 4),
       changes=st.lists(st.lists(CHANGES, max_size=3), max_size=12))
def test_a_walk_meets_every_untouched_row_exactly_once(client, conn, rows, sort, order, limit,
                                                       changes):
    shelf = Shelf(conn)
    ids = [shelf.insert(row) for row in rows]
    path = f"products?category_id={shelf.category}&sort={sort}&order={order}&limit={limit}"
    met, cursor, steps = [], "", iter(changes)
    while cursor is not None:
        body = client.get(path + (f"&cursor={cursor}" if cursor else "")).json
        met += [product["id"] for product in body["data"]]
        cursor = body["pagination"]["next_cursor"]
        for change in next(steps, ()):
            shelf.apply(ids, change)
    for product in ids:
        if product not in shelf.touched:
            assert met.count(product) == 1
    assert set(met) <= set(ids) | shelf.touched
    untouched = [product for product in met if product not in shelf.touched]
    key = {"name": lambda row: row[0].lower(), "price": lambda row: row[1],
           "created_at": lambda row: row[2]}[sort]
    kept = dict(zip(ids, rows, strict=True))
    assert untouched == sorted(untouched, key=lambda i: (key(kept[i]), i), reverse=order == "desc")
