"""Every way to ask for products is answered by an index, on a shop large enough to mind."""
import itertools
import re

import psycopg
import pytest

import db
from db.pool import connect_options
from db.seed import seed
from tests.conftest import execute

PRODUCTS = 15_000
FILTERS = {
    "nothing": {},
    "a category": {"category": 3},
    "categories": {"categories": [3, 5]},
    "a price": {"min_price": 100, "max_price": 110},
    "in stock": {"in_stock": True},
    "sold out": {"in_stock": False},
    "a rare term": {"pattern": "COF-000A"},
    "a term that is nowhere": {"pattern": "zzzz"},
    "a term that is everywhere": {"pattern": "every day"},
    "a term between": {"pattern": "teapot"},
    "a common pair": {"pattern": "oo"},
    "a common letter": {"pattern": "e"},
    "a rare pair": {"pattern": "qz", "ids": [5, 500, 5000]},
    "a category and a price": {"category": 3, "min_price": 10, "max_price": 20},
    "a category and a term": {"category": 3, "pattern": "oak"},
    "all at once": {"categories": [1, 2], "min_price": 5, "max_price": 300, "in_stock": True,
                    "pattern": "oak"},
}
AFTER = {"created_at": "2026-05-01T00:00:00+00:00", "name": "M", "price": "200.00"}
SORTS = [sign + column for column in AFTER for sign in ("", "-")]
EMPTY = {"category": None, "categories": None, "min_price": None, "max_price": None,
         "in_stock": None, "pattern": None, "ids": None, "limit": 21, "offset": 0, "after": None,
         "after_id": None}


@pytest.fixture(scope="module")
def conn(make_database):
    url = make_database()
    seed(url, {"users": 2000, "products": PRODUCTS, "transactions": 10})
    execute(url, "UPDATE products SET stock = 0 WHERE id % 7 = 0")
    execute(url, "VACUUM ANALYZE products")
    with psycopg.connect(url, autocommit=True, **connect_options()) as conn:
        yield conn


def plan(conn, query, **parameters):
    explain = f"EXPLAIN {query._escaped}"
    return "\n".join(row[0] for row in conn.execute(explain, parameters, prepare=False))


@pytest.mark.parametrize("name", FILTERS)
def test_no_page_of_products_reads_the_table_through(conn, name):
    page = db.load("products").page
    for sort, cursor in itertools.product(SORTS, (False, True)):
        parameters = EMPTY | FILTERS[name] | {"sort": sort}
        if cursor:
            parameters |= {"after": AFTER[sort.lstrip("-")], "after_id": PRODUCTS // 2}
        found = plan(conn, page, **parameters)
        assert "Seq Scan on products" not in found, (sort, cursor, found)


@pytest.mark.parametrize("term", ["COF-000A", "zzzz", "every day", "teapot", "oo", "e", "oak"])
def test_no_page_by_relevance_reads_the_table_through(conn, term):
    relevant = db.load("products").relevant
    for rank in (None, 1, 2, 3):
        parameters = EMPTY | {"pattern": term, "search": term, "after_rank": rank,
                              "after_name": rank and "M", "after_id": rank and PRODUCTS // 2}
        assert "Seq Scan on products" not in plan(conn, relevant, **parameters), (term, rank)


@pytest.mark.parametrize(("term", "index"), [
    ("qz", "products_grams_idx"), ("COF-000A", "products_search_idx")])
def test_a_rare_term_is_found_by_one_index_once(conn, term, index):
    found = plan(conn, db.load("products").matches, **EMPTY | {"search": term, "pattern": term})
    assert re.findall(r"Scan on (\w+)", found) == ["products", index]


@pytest.mark.parametrize("version", [1, 2])
def test_no_page_of_users_reads_the_table_through(conn, version):
    page = db.load("users").page
    after = {"created_at": AFTER["created_at"], "name": "M", "email": "user5@example.com"}
    filters = [{}, {"pattern": "user199"}, {"role": "admin"}]
    for column, sign, cursor, chosen in itertools.product(after, ("", "-"), (0, 1), filters):
        parameters = {"role": None, "pattern": None, "limit": 21, "offset": 0, "after": None,
                      "after_id": None, "sort": sign + column, "version": version} | chosen
        if cursor:
            parameters |= {"after": after[column], "after_id": 1000}
        assert "Seq Scan on users" not in plan(conn, page, **parameters), parameters
