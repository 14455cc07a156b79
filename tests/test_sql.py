"""Every named query compiles, and uses the indexes that it says it uses; SQL is in sql/ only.

That a query returns the fields which the document promises, all of them and no other, is held by
the contract: each answer's schema requires every field and refuses others.
"""
import ast
import re

import psycopg
import pytest

import db
from db import queries
from db.seed import seed
from tests.conftest import ROOT

FILES = sorted(file.stem for file in queries.FOLDER.glob("*.sql"))
QUERIES = {query.name: query for file in FILES for query in vars(db.load(file)).values()}
PREPARABLE = ("SELECT", "WITH", "INSERT", "UPDATE", "DELETE", "MERGE")
STATEMENT = re.compile(r"\s*(SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH|MERGE INTO)\b")

# What a page is asked for -> the index that has its order or its filter. The cursor's place is
# where such a list begins.
WINDOW = {"limit": 21, "offset": 0}
CURSORS = {"created_at": "2026-01-01", "name": "m", "price": "50.00", "email": "m"}
USES = [
    ("products.page", {"sort": "created_at"}, "products_created_idx"),
    ("products.page", {"sort": "name"}, "products_name_idx"),
    ("products.page", {"sort": "price"}, "products_price_idx"),
    ("products.page", {"sort": "created_at", "category": 3}, "products_category_created_idx"),
    ("products.page", {"sort": "name", "category": 3}, "products_category_name_idx"),
    ("products.page", {"sort": "price", "category": 3}, "products_category_price_idx"),
    ("users.page", {"sort": "created_at"}, "users_created_idx"),
    ("users.page", {"sort": "name"}, "users_name_idx"),
    ("users.page", {"sort": "email"}, "users_email_idx"),
]
FINDS = [
    ("products.page", {"sort": "-created_at", "pattern": "zzz"}, "products_search_idx"),
    ("products.page", {"sort": "-created_at", "in_stock": False}, "products_sold_out_idx"),
    ("products.relevant", {"search": "oak", "pattern": "oak"}, "products_name_search_idx"),
    ("users.page", {"sort": "-created_at", "pattern": "zzz"}, "users_search_idx"),
    ("transactions.page", {}, "transactions_created_idx"),
    ("transactions.page", {"user_id": 7}, "transactions_user_idx"),
]
# What a shop in use has beside the demo data.
LIFE = [
    "INSERT INTO sessions (user_id, expires_at, address) "
    "SELECT id, now() + n * interval '1 day', '192.0.2.1' FROM users, generate_series(0, 2) n",
    "INSERT INTO mail_tokens SELECT sha256(email::bytea), id, 'reset', email, now() FROM users",
    "INSERT INTO mails (purpose, email) SELECT 'reset', email FROM users",
    "INSERT INTO login_failures SELECT sha256(email::bytea), '192.0.2.1', 1, now() FROM users",
    "INSERT INTO idempotency_keys SELECT id, 'key', '', 201, '', '' FROM users",
]
# Parameters without which a query with an index comment would mean nothing.
PLAUSIBLE = {"search": "te", "pattern": "tea", "group_by": "day", "start_date": "2026-01-01",
             "end_date": "2026-02-01"}


def numbered(text):
    """(a statement with $1, $2 … for its named parameters, how many)."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
    return re.sub(r"%\((\w+)\)s", lambda name: f"${names.index(name[1]) + 1}", text), names


@pytest.fixture(scope="module")
def shop(make_database):
    """A connection to a demo shop, in which the planner does without an index only if it has to."""
    url = make_database()
    seed(url, {"users": 2000, "products": 3000, "transactions": 3000})
    with psycopg.connect(url, autocommit=True) as conn:
        for statement in LIFE:
            conn.execute(statement)
        conn.execute("VACUUM ANALYZE")
        conn.execute("SET enable_seqscan = off")
        yield conn


@pytest.mark.parametrize("file", FILES)
def test_every_query_compiles(shop, file):
    with shop.transaction(force_rollback=True):
        for query in vars(db.load(file)).values():
            text, _ = numbered(query.plain)
            try:
                # What makes a temporary table makes it for those that follow.
                shop.execute(f"PREPARE q AS {text}" if text.startswith(PREPARABLE) else text)
            except psycopg.Error as error:
                pytest.fail(f"{query.name}: {error}")
            if text.startswith(PREPARABLE):
                shop.execute("DEALLOCATE q")


def indexes_of(shop, query, params=None):
    """The indexes in the plan of a query: for these parameters, or for any."""
    if params is None and query.prepare is not False:
        text, _ = numbered(query.plain)
        plan = shop.execute(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {text}")
    else:
        _, names = numbered(query.plain)
        given = dict.fromkeys(names) | PLAUSIBLE | (params or {})
        text = queries._BARE_PERCENT.sub("%%", query.plain)
        plan = shop.execute(f"EXPLAIN (FORMAT JSON) {text}", given, prepare=False)
    plan = str(plan.fetchone()[0])
    arbiters = re.findall(r"'Conflict Arbiter Indexes': \[(.*?)\]", plan)
    return {*re.findall(r"'Index Name': '(\w+)'", plan), *re.findall(r"\w+", str(arbiters))}


@pytest.mark.parametrize("name", [name for name, query in QUERIES.items()
                                  if query.shape in ("csv", "ndjson")])
def test_a_stream_has_its_order_from_an_index(shop, name):
    text, _ = numbered(QUERIES[name].plain)
    shop.execute("SET enable_sort = off")
    plan = str(shop.execute(f"EXPLAIN (GENERIC_PLAN) {text}").fetchall())
    shop.execute("RESET enable_sort")
    assert "Sort" not in plan


@pytest.mark.parametrize("name", [name for name, query in QUERIES.items() if query.index])
def test_a_query_uses_the_indexes_that_it_names(shop, name):
    missing = set(QUERIES[name].index) - indexes_of(shop, QUERIES[name])
    assert not missing, f"{name} does without {missing}"


@pytest.mark.parametrize("down", ["", "-"])
@pytest.mark.parametrize("walking", [False, True])
@pytest.mark.parametrize(("name", "params", "index"), USES)
def test_a_page_is_read_in_the_order_of_an_index(shop, name, params, index, down, walking):
    after = {"after": CURSORS[params["sort"]], "after_id": 5} if walking else {}
    params = WINDOW | params | {"sort": down + params["sort"]} | after
    assert index in indexes_of(shop, QUERIES[name], dict.fromkeys(PLAUSIBLE) | params)


@pytest.mark.parametrize(("name", "params", "index"), FINDS)
def test_a_filter_is_answered_by_an_index(shop, name, params, index):
    assert index in indexes_of(shop, QUERIES[name], dict.fromkeys(PLAUSIBLE) | WINDOW | params)


def test_every_index_serves_a_query_or_a_rule(shop):
    all_ = {row[0] for row in shop.execute(
        "SELECT indexname FROM pg_indexes WHERE schemaname = 'public'")}
    rules = {name for name in all_ if name.endswith(("_pkey", "_key"))}
    named = {index for query in QUERIES.values() for index in query.index}
    assert all_ - rules - named - {index for *_, index in USES + FINDS} == set()


def test_names_are_unique_and_used():
    code = "".join(file.read_text() for folder in ("blueprints", "extensions", "db")
                   for file in (ROOT / folder).rglob("*.py"))
    for file in FILES:
        heads = re.findall(r"^-- name: (\w+)", (queries.FOLDER / f"{file}.sql").read_text(), re.M)
        assert len(set(heads)) == len(heads), file
        for name in heads:
            assert re.search(rf"\.{name}\b", code), f"nobody calls {file}.{name}"


def test_columns_are_spelled_out():
    for name, query in QUERIES.items():
        assert not re.search(r"(SELECT|,|\.)\s*\*", query.plain), name


def test_no_sql_is_built_in_python():
    for file in [ROOT / "app.py", *(ROOT / "blueprints").rglob("*.py"),
                 *(ROOT / "extensions").rglob("*.py"), *(ROOT / "schemas").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not STATEMENT.match(node.value), f"{file}:{node.lineno}"
