"""The whole shop against a model of it, which is a few lists in memory.

Hypothesis sends whatever it likes, one request or several at once, to two nodes in turn, and moves
the clock. After every step all that can be asked is asked of both nodes and of one without a cache,
and is what the model says. Where requests race, the model first learns who won, and sees to it that
the answers allow it.
"""
import csv
import io
import itertools
import json
import random
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from flask_jwt_extended import create_access_token
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from extensions import cache
from extensions.behind.upkeep import tidy
from tests.conftest import Client, execute, unique

NAMES = ["Tea", "teapot", "Pen", "=cup", 'Jug, "blue"', "Éclair", "steam iron"]
SKUS = [None, None, "S1", "S2", "S3", "S4", "S5", "tea-6"]
PRICES = ["0.00", "0.07", "1.10", "19.99", "9999999.99"]
STOCKS = [0, 2, 9, 50]
SHELVES = ["Kitchen", "kitchen", "Tools", "Books", "Änderung", "zoo"]
NOWHERE = 2**40  # a category that there is not
LONG_AGO, LATER = datetime(2000, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
MOST_CALLS = 14  # at once

# The database's own now() goes before PostgreSQL's, and can be put forward, as days go by.
CLOCK = """
    CREATE SCHEMA clock;
    CREATE TABLE clock.ahead AS SELECT 0 AS days;
    CREATE FUNCTION clock.now() RETURNS timestamptz STABLE LANGUAGE sql
        AS 'SELECT pg_catalog.now() + days * interval ''1 day'' FROM clock.ahead';
    ALTER TABLE products ALTER created_at SET DEFAULT clock.now();
    ALTER TABLE categories ALTER created_at SET DEFAULT clock.now();
    ALTER TABLE transactions ALTER created_at SET DEFAULT clock.now();
    ALTER TABLE idempotency_keys ALTER created_at SET DEFAULT clock.now();
    DO $$ BEGIN
        EXECUTE format('ALTER DATABASE %I SET search_path = clock, pg_catalog, public',
                       current_database());
    END $$;
"""
EMPTY = """
    TRUNCATE users, sessions, categories, products, product_counts, transactions,
        transaction_items, sales_days, sales_product_months, idempotency_keys
        RESTART IDENTITY CASCADE;
    UPDATE sales_sealed SET until = '1970-01-01';
    UPDATE clock.ahead SET days = 0;
"""


class Shop:
    """Two nodes of a shop, and a third that has no cache."""

    def __init__(self, url, make_app, folder):
        execute(url, CLOCK)
        own = {"DATABASE_URL": url, "REDIS_PREFIX": "model", "ACCESS_TOKEN_MINUTES": "1000"}
        self.url, self.folder = url, folder
        self.nodes = [Client(make_app(**own)) for _ in range(2)]
        self.plain = Client(make_app(**own, CACHE_TYPE="NullCache"))
        self.threads = ThreadPoolExecutor(MOST_CALLS)
        self.seen = Counter()

    def sql(self, text):
        return execute(self.url, text)

    def empty(self):
        self.sql(EMPTY)
        with self.nodes[0].app.app_context():
            cache.invalidate(cache.EVERYTHING)

    def person(self, role):
        """(id, token) of a new account."""
        [(user, session)] = self.sql(f"""
            WITH person AS (
                INSERT INTO users (email, name, role, password_hash)
                SELECT count(*) || gen_random_uuid()::text, 'Ada', '{role}', 'x' FROM users
                RETURNING id
            )
            INSERT INTO sessions (user_id, expires_at, address)
            SELECT id, '2300-01-01', '' FROM person
            RETURNING user_id, id""")
        with self.plain.app.app_context():
            return user, create_access_token(str(user), additional_claims={"sid": session})


@pytest.fixture(scope="module")
def shop(make_database, make_app, tmp_path_factory):
    shop = Shop(make_database(), make_app, tmp_path_factory.mktemp("files"))
    yield shop
    shop.threads.shutdown()


# The model


@dataclass
class Product:
    id: int
    created: datetime
    sku: str | None
    name: str
    price: Decimal
    stock: int
    category: int | None = None

    def change(self, fields):
        for name, value in fields.items():
            setattr(self, {"category_id": "category"}.get(name, name),
                    Decimal(value) if name == "price" else value)


@dataclass
class Line:
    product: int
    name: str
    quantity: int
    price: Decimal
    category: int | None
    category_name: str | None

    @property
    def amount(self):
        return self.price * self.quantity


@dataclass
class Sale:
    id: int
    created: datetime
    user: int | None
    lines: list
    refunded: bool = False


class Model:
    def __init__(self):
        self.products, self.categories, self.sales, self.users = {}, {}, {}, {}
        self.gone = []  # ids of products that were
        self.keys = {}  # what was bought with them: (user, key) -> (items, body)

    def with_sku(self, sku):
        return next((p for p in self.products.values() if sku and p.sku == sku), None)

    def shelf(self, name):
        """The id of the category of a name, in any letter case."""
        return next((i for i, n in self.categories.items() if n.lower() == name.lower()), None)

    def listed(self, where=lambda product: True, key=lambda p: (p.created, p.id), reverse=False):
        return [self.shown(p) for p in sorted(filter(where, self.products.values()), key=key,
                                              reverse=reverse)]

    def shown(self, product):
        return {"id": product.id, "sku": product.sku, "name": product.name,
                "price": str(product.price), "stock": product.stock,
                "category_id": product.category,
                "category_name": self.categories.get(product.category)}

    def shown_category(self, number):
        count = sum(p.category == number for p in self.products.values())
        return {"id": number, "name": self.categories[number], "product_count": count}

    def shown_sale(self, sale):
        return {"id": sale.id, "user_id": sale.user, "total": str(total(sale.lines)),
                "status": "refunded" if sale.refunded else "completed", "items": [
                    {"product_id": line.product, "name": line.name, "quantity": line.quantity,
                     "unit_price": str(line.price), "amount": str(line.amount)}
                    for line in sale.lines]}

    def sold(self, start=LONG_AGO, end=LATER):
        """(sale, line) of a time, in order."""
        sales = [s for s in self.sales.values() if start <= s.created < end]
        return [(sale, line) for sale in sorted(sales, key=lambda s: (s.created, s.id))
                for line in sale.lines]

    def sums(self, group_by, start, end):
        """({key: (orders, items, amount, possible labels)} in order, total) of a report."""
        of = {"day": lambda s, _: f"{s.created:%Y-%m-%d}",
              "week": lambda s, _: f"{s.created:%G-W%V}",
              "month": lambda s, _: f"{s.created:%Y-%m}",
              "category": lambda _, line: line.category and str(line.category),
              "product": lambda _, line: str(line.product)}[group_by]
        found = [(sale, line) for sale, line in self.sold(start, end) if not sale.refunded]
        groups, labels = defaultdict(list), defaultdict(set)
        for sale, line in self.sold():
            labels[of(sale, line)].add({"category": line.category_name,
                                        "product": line.name}.get(group_by, of(sale, line)))
        for sale, line in found:
            groups[of(sale, line)].append((sale, line))
        summed = {key: (*summary(rows), labels[key]) for key, rows in groups.items()}
        order = {"category": lambda key: (-summed[key][2], key is None, key or ""),
                 "product": lambda key: (-summed[key][2], int(key))}.get(group_by, str)
        return {key: summed[key] for key in sorted(summed, key=order)}, summary(found)


def total(lines):
    return sum((line.amount for line in lines), Decimal("0.00"))


def summary(rows):
    lines = [line for _, line in rows]
    return len({sale.id for sale, _ in rows}), sum(line.quantity for line in lines), total(lines)


# What is done, one or several at once


class Batch:
    """Things that are done at once. What would leave open how they end doesn't get in.

    Each method is a thing to do, drawn with dice: it claims what it touches, adds its calls, and
    says how the model settles with their answers. ``was`` are the products as they were before.
    """

    def __init__(self, shop, model, admin, turn):
        self.shop, self.model, self.admin, self.turn = shop, model, admin, turn
        self.claims, self.calls, self.parts = {}, [], []
        self.was = {i: copy(product) for i, product in model.products.items()}
        self.shelves = dict(model.categories)
        self.sold, self.returned, self.refused = Counter(), Counter(), []
        self.ending, self.leaving = set(), set()  # products, users

    def run(self):
        """Make every call, none before all are ready; settle in the order of what depends on what.
        """
        ready = threading.Barrier(len(self.calls) or 1)

        def start(call):
            ready.wait()
            return call()
        if len(self.calls) < 2:
            answers = [call() for call in self.calls]
        else:
            answers = list(self.shop.threads.map(start, self.calls))
        for _, settle, places in sorted(self.parts, key=lambda part: part[0]):
            settle([answers[place] for place in places])
        for number in self.sold | self.returned:
            if product := self.model.products.get(number):
                product.stock += self.returned[number] - self.sold[number]
                assert product.stock >= 0
        for items, answer in self.refused:
            self.justify(items, answer)

    def claim(self, *keys, alone=()):
        """Whether nobody has these, or all who have share them; ``alone`` are for nobody else."""
        if any(self.claims.get(key) == "alone" for key in keys) or \
                any(key in self.claims for key in alone):
            return False
        self.claims |= dict.fromkeys(keys, "shared") | dict.fromkeys(alone, "alone")
        return True

    def add(self, order, calls, settle):
        places = range(len(self.calls), len(self.calls) + len(calls))
        self.calls += calls
        self.parts.append((order, settle, places))

    def send(self, method, path, token=None, **kwargs):
        """A call of the node whose turn it is."""
        node = self.shop.nodes[next(self.turn)]
        version = random.Random(len(self.calls)).choice(["v1", "v2"])
        kwargs["token"] = token or self.admin[1]
        return lambda: node.open(method, f"/api/{version}/{path}", **kwargs)

    def any_product(self, dice):
        return self.was and self.model.products[dice.choice(sorted(self.was))]

    # Sales

    def buy(self, dice, copies=None):
        model = self.model
        user, token = dice.choice([*model.users.items(), self.admin])
        picks = dice.sample(sorted(self.was), min(len(self.was), dice.randint(1, 4)))
        if model.gone and dice.random() < 0.1:
            picks.append(dice.choice(model.gone))
        items = [{"product_id": i, "quantity": dice.choice([1, 1, 2, 3, 5])} for i in picks]
        key = dice.choice([None, "a", "b"]) if copies is None else None
        copies = copies or dice.choice([1, 1, 3])
        if (user, key) in model.keys and dice.random() < 0.7:
            items = model.keys[user, key][0]
        wanted = [("product", item["product_id"]) for item in items]
        if items and self.claim(("user", user), *wanted, alone=[("key", user, key)] if key else ()):
            note(f"buy: {user} {items} {key} x{copies}")
            call = lambda: self.send("POST", "transactions", token, json={"items": items},
                                     headers={"Idempotency-Key": key} if key else None)
            self.add(2, [call() for _ in range(copies)],
                     lambda answers: self.settle_sales(user, items, key, answers))

    def rush(self, dice):
        """Many want what there is not enough of."""
        product = self.any_product(dice)
        if product and self.claim(alone=[("product", product.id)]):
            items = [{"product_id": product.id, "quantity": dice.randint(1, 2)}]
            note(f"rush: {items}")
            people = [self.admin, *self.model.users.items()]
            self.add(2, [self.send("POST", "transactions", people[n % len(people)][1],
                                   json={"items": items}) for n in range(8)],
                     lambda answers: [self.settle_sales(people[n % len(people)][0], items, None,
                                                        [answer])
                                      for n, answer in enumerate(answers)])

    def settle_sales(self, user, items, key, answers):
        model = self.model
        known = model.keys.get((user, key))
        made = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code != 201]
        codes = {answer.json["code"] for answer in refused}
        if key:
            assert "request_in_progress" not in codes or len(answers) > 1
            refused = [a for a in refused if a.json["code"] != "request_in_progress"]
            codes -= {"request_in_progress"}
        if known and user not in self.leaving:
            assert codes <= ({"idempotency_key_reused"} if known[0] != items else set())
            assert {answer.data for answer in made} <= ({known[1]} if known[0] == items else set())
            assert all(answer.headers["Idempotent-Replayed"] == "true" for answer in made)
            assert made or refused
            return
        assert codes <= {"out_of_stock", "validation_failed"} | (
            {"token_revoked", "idempotency_key_reused"} if user in self.leaving else set())
        if key:
            assert made or refused
            assert len({answer.data for answer in made}) <= 1
            if made and not known:
                model.keys[user, key] = items, made[0].data
            made = made[:0] if known else made[:1]
        for answer in made:
            self.record(user, items, answer.json)
        self.refused += [(items, answer) for answer in refused]

    def record(self, user, items, sale):
        """Note a sale that was made, after it was found to be one that could be made."""
        assert sale["user_id"] == user
        assert [{k: i[k] for k in ("product_id", "quantity")} for i in sale["items"]] == items
        lines, kept = [], None
        for place, item in enumerate(sale["items"]):
            number = item["product_id"]
            assert number in self.was
            forms = [self.was[number], self.model.products.get(number, self.was[number])]
            assert item["name"] in {form.name for form in forms}
            assert Decimal(item["unit_price"]) in {form.price for form in forms}
            shelves = {(form.category, shelves.get(form.category)) for form in forms
                       for shelves in (self.shelves, self.model.categories)}
            if len(shelves) > 1:  # a race, whose end only the sale itself knows
                kept = kept or self.shop.sql("SELECT category_id, category_name "
                                             "FROM transaction_items WHERE transaction_id = "
                                             f"{sale['id']} ORDER BY line")
                assert kept[place] in shelves
                shelves = {kept[place]}
            lines.append(Line(number, item["name"], item["quantity"], Decimal(item["unit_price"]),
                              *shelves.pop()))
            self.sold[number] += item["quantity"]
        assert sale["total"] == str(total(lines))
        self.model.sales[sale["id"]] = Sale(sale["id"], moment(sale), user, lines)

    def justify(self, items, answer):
        """Whoever was refused could not have been served, in some order of what happened."""
        code = answer.json["code"]
        named = {int(detail["field"].split(".")[1]) for detail in answer.json.get("details", ())}
        assert named or code not in ("out_of_stock", "validation_failed")
        for place, item in enumerate(items):
            number, wanted = item["product_id"], item["quantity"]
            if code == "validation_failed":
                assert number in self.was or place in named
                assert place not in named or number in self.ending or number not in self.was
            elif code == "out_of_stock" and place in named:
                assert wanted > self.was[number].stock - self.sold[number]
            elif code == "out_of_stock":
                assert wanted <= self.was[number].stock + self.returned[number]

    def refund(self, dice):
        model = self.model
        open_ = [i for i, sale in model.sales.items() if not sale.refunded]
        pool = open_ if open_ and dice.random() < 0.8 else sorted(model.sales)
        if not pool:
            return
        sale, copies = model.sales[dice.choice(pool)], dice.choice([1, 1, 3])
        if self.claim(*(("product", line.product) for line in sale.lines),
                      alone=[("sale", sale.id)]):
            note(f"refund: {sale.id} x{copies}")
            self.add(1, [self.send("POST", f"transactions/{sale.id}/refund")
                         for _ in range(copies)], lambda answers: self.settle_refund(sale, answers))

    def settle_refund(self, sale, answers):
        done = [answer.json for answer in answers if answer.status_code == 200]
        assert len(done) == (not sale.refunded)
        assert {a.json["code"] for a in answers if a.status_code != 200} <= {"conflict"}
        if done:
            assert done[0]["status"] == "refunded"
            sale.refunded = True
            for line in sale.lines:
                self.returned[line.product] += line.quantity

    # Products

    def create(self, dice):
        category = dice.choice([None, *self.shelves, NOWHERE])
        fields = {"name": dice.choice(NAMES), "price": dice.choice(PRICES),
                  "sku": dice.choice(SKUS), "stock": dice.choice(STOCKS),
                  "category_id": category}
        if category == NOWHERE:
            fields["sku"] = None
        key, copies = dice.choice([None, None, unique("key")]), dice.choice([1, 1, 3])
        alone = [("sku", fields["sku"])] if fields["sku"] else ()
        if self.claim(("category", category), alone=alone):
            note(f"create: {fields} {key} x{copies}")
            self.add(0, [self.send("POST", "products", json=fields,
                                   headers={"Idempotency-Key": key} if key else None)
                         for _ in range(copies)],
                     lambda answers: self.settle_create(fields, key, answers))

    def settle_create(self, fields, key, answers):
        made = {answer.data: answer.json for answer in answers if answer.status_code == 201}
        codes = {answer.json["code"] for answer in answers if answer.status_code != 201}
        if fields["category_id"] == NOWHERE:
            assert not made
            assert codes <= {"validation_failed", *(["request_in_progress"] if key else [])}
            return
        if key:
            assert codes <= {"request_in_progress", "sku_taken"}
            codes -= {"request_in_progress"}
        if self.model.with_sku(fields["sku"]):
            assert not made
            assert codes == {"sku_taken"}
        elif fields["sku"] or key:
            assert len(made) == 1
            assert codes <= (set() if key else {"sku_taken"})
        else:
            assert len(made) == len(answers)
        for product in made.values():
            self.model.products[product["id"]] = Product(
                product["id"], moment(product), fields["sku"], fields["name"],
                Decimal(fields["price"]), fields["stock"], fields["category_id"])
            self.look_at(product)

    def edit(self, dice):
        product = self.any_product(dice)
        if not product:
            return
        all_ = {"name": dice.choice(NAMES), "price": dice.choice(PRICES),
                "stock": dice.choice(STOCKS), "sku": dice.choice(SKUS),
                "category_id": dice.choice([None, *self.shelves, NOWHERE])}
        fields = {name: all_[name] for name in dice.sample(sorted(all_), dice.randint(1, 3))}
        if fields.get("category_id") == NOWHERE:
            fields.pop("sku", None)
        stale = dice.random() < 0.1
        shared = [("category", product.category), ("category", fields.get("category_id"))]
        alone = {("edit", product.id)}
        if "sku" in fields:
            alone |= {("sku", sku) for sku in (product.sku, fields["sku"]) if sku}
        (alone.add if "stock" in fields else shared.append)(("product", product.id))
        if self.claim(*shared, alone=alone):
            note(f"edit: {product.id} {fields}{' stale' if stale else ''}")
            self.add(0, [self.send("PATCH", f"products/{product.id}", json=fields,
                                   headers={"If-Match": '"x"'} if stale else None)],
                     lambda answers: self.settle_edit(product, fields, stale, *answers))

    def settle_edit(self, product, fields, stale, answer):
        taken = self.model.with_sku(fields.get("sku"))
        if stale:
            assert answer.status_code == 412
        elif fields.get("category_id") == NOWHERE:
            assert answer.status_code == 422
        elif taken and taken is not product:
            assert answer.json["code"] == "sku_taken"
        else:
            assert answer.status_code == 200
            product.change(fields)
            self.look_at(answer.json)

    def look_at(self, answer):
        """A product that a write answered with is the model's, but for what others change."""
        shown = self.model.shown(self.model.products[answer["id"]])
        if len(self.calls) > 1:
            del shown["stock"], shown["category_name"]
        assert answer | shown == answer

    def contend(self, dice):
        """Several with one ETag: one of them wins."""
        product, copies = self.any_product(dice), dice.randint(1, 4)
        if product and self.claim(
                ("category", product.category),
                alone=[("edit", product.id), ("product", product.id), ("name", product.category)]):
            tag = self.shop.plain.get(f"products/{product.id}").headers["ETag"]
            note(f"contend: {product.id} x{copies}")
            bodies = [{"stock": n + 1, "price": PRICES[n]} for n in range(copies)]
            self.add(0, [self.send("PATCH", f"products/{product.id}", json=body,
                                   headers={"If-Match": tag}) for body in bodies],
                     lambda answers: self.settle_contend(product, bodies, answers))

    def settle_contend(self, product, bodies, answers):
        statuses = [answer.status_code for answer in answers]
        assert sorted(statuses) == [200] + [412] * (len(answers) - 1)
        product.change(bodies[statuses.index(200)])

    def delete(self, dice):
        product, copies = self.any_product(dice), dice.choice([1, 1, 2])
        if product and self.claim(("product", product.id), ("category", product.category),
                                  alone=[("edit", product.id), *(
                                      [("sku", product.sku)] if product.sku else [])]):
            note(f"delete: {product.id} x{copies}")
            self.ending.add(product.id)
            self.add(0, [self.send("DELETE", f"products/{product.id}") for _ in range(copies)],
                     lambda answers: self.settle_delete(product, answers))

    def settle_delete(self, product, answers):
        assert sorted(a.status_code for a in answers) == [204] + [404] * (len(answers) - 1)
        del self.model.products[product.id]
        self.model.gone.append(product.id)

    def bring(self, dice):
        """Import a file: products that exist and new ones, in any order."""
        columns = {"name": NAMES, "price": PRICES, "stock": STOCKS,
                   "category": ["", *self.shelves.values()]}
        for name in ("stock", "category"):
            if dice.random() < 0.5:
                del columns[name]
        rows = [{"sku": sku} | {name: dice.choice(values) for name, values in columns.items()}
                for sku in dice.sample([sku for sku in SKUS if sku], dice.randint(1, 4))]
        spoiled, dry = dice.random() < 0.1, dice.random() < 0.1
        if spoiled:
            dice.choice(rows)["price"] = "-1"
        known = [product for row in rows if (product := self.model.with_sku(row["sku"]))]
        alone = [("import",), *(("sku", row["sku"]) for row in rows),
                 *(("edit", product.id) for product in known)]
        shared = [("category", product.category) for product in known]
        if "stock" in columns:
            alone += [("product", product.id) for product in known]
        if "category" in columns:
            shared += [("category", number) for number in self.shelves]
            alone += [("name", number) for number in self.shelves]
        if self.claim(*shared, alone=alone):
            note(f"import: {rows}{' dry' if dry else ''}")
            text = io.StringIO()
            file = csv.DictWriter(text, ["sku", *columns])
            file.writeheader()
            file.writerows(rows)
            path = self.shop.folder / "products.csv"
            path.write_text(text.getvalue())
            run = self.shop.nodes[next(self.turn)].app.test_cli_runner().invoke
            words = ["products", "import", str(path), *(["--dry-run"] if dry else [])]
            self.add(0, [lambda: run(args=words)],
                     lambda answers: self.settle_import(rows, spoiled, dry, *answers))

    def settle_import(self, rows, spoiled, dry, result):
        model = self.model
        assert result.exit_code == spoiled, result.output
        if spoiled:
            return
        new = [row for row in rows if not model.with_sku(row["sku"])]
        assert f"{len(new)} created, {len(rows) - len(new)} changed" in result.output
        if dry:
            return
        found = {sku: (number, at) for number, sku, at in self.shop.sql(
            "SELECT id, sku, created_at FROM products WHERE retired_at IS NULL")}
        for row in rows:
            product = model.with_sku(row["sku"])
            if product is None:
                number, at = found[row["sku"]]
                product = model.products[number] = Product(
                    number, at, row["sku"], row["name"], Decimal(row["price"]), 0)
            product.change({"name": row["name"], "price": row["price"]})
            if "stock" in row:
                product.stock = row["stock"]
            if "category" in row:
                product.category = model.shelf(row["category"]) if row["category"] else None

    # Categories

    def open_shelf(self, dice):
        name = dice.choice(SHELVES)
        if self.claim(alone=[("shelf", name.lower())]):
            note(f"open shelf: {name}")
            self.add(0, [self.send("POST", "categories", json={"name": name})],
                     lambda answers: self.settle_shelf(name, None, *answers))

    def rename(self, dice):
        name = dice.choice(SHELVES)
        number = self.shelves and dice.choice(sorted(self.shelves))
        if number and self.claim(("category", number), alone={
                ("name", number), ("shelf", name.lower()),
                ("shelf", self.shelves[number].lower())}):
            note(f"rename: {number} {name}")
            self.add(0, [self.send("PATCH", f"categories/{number}", json={"name": name})],
                     lambda answers: self.settle_shelf(name, number, *answers))

    def settle_shelf(self, name, number, answer):
        if self.model.shelf(name) not in (None, number):
            assert answer.json["code"] == "name_taken"
        else:
            assert answer.status_code == (200 if number else 201)
            assert number in (None, answer.json["id"])
            self.model.categories[answer.json["id"]] = name

    def close_shelf(self, dice):
        number, copies = self.shelves and dice.choice(sorted(self.shelves)), dice.choice([1, 1, 2])
        if number and self.claim(alone=[("category", number), ("name", number),
                                        ("shelf", self.shelves[number].lower())]):
            note(f"close shelf: {number} x{copies}")
            self.add(0, [self.send("DELETE", f"categories/{number}") for _ in range(copies)],
                     lambda answers: self.settle_close(number, answers))

    def settle_close(self, number, answers):
        if any(product.category == number for product in self.was.values()):
            assert {answer.json["code"] for answer in answers} == {"category_in_use"}
        else:
            assert sorted(a.status_code for a in answers) == [204] + [404] * (len(answers) - 1)
            del self.model.categories[number]

    def race_for_a_shelf(self, dice):
        """It is closed, or gets a product: one of both."""
        bare = sorted(set(self.shelves) - {product.category for product in self.was.values()})
        product = self.any_product(dice)
        if product and bare:
            number = dice.choice(bare)
            if self.claim(("product", product.id), ("category", product.category), alone=[
                    ("edit", product.id), ("category", number), ("name", number),
                    ("shelf", self.shelves[number].lower())]):
                note(f"race: {product.id} for {number}")
                self.add(0, [self.send("DELETE", f"categories/{number}"),
                             self.send("PATCH", f"products/{product.id}",
                                       json={"category_id": number})],
                         lambda answers: self.settle_race(product, number, *answers))

    def settle_race(self, product, number, closed, moved):
        assert (closed.status_code, moved.status_code) in {(204, 422), (409, 200)}
        if moved.status_code == 200:
            product.category = number
        else:
            del self.model.categories[number]

    # Everything else

    def leave(self, dice):
        """A buyer's account is deleted."""
        user = dice.choice(sorted(self.model.users))
        if self.claim(alone=[("leave", user)]):
            note(f"leave: {user}")
            self.leaving.add(user)
            self.add(3, [self.send("DELETE", f"users/{user}")],
                     lambda answers: self.settle_leave(user, *answers))

    def settle_leave(self, user, answer):
        model = self.model
        assert answer.status_code == 204
        del model.users[user]
        model.keys = {key: kept for key, kept in model.keys.items() if key[0] != user}
        for sale in model.sales.values():
            if sale.user == user:
                sale.user = None
        model.users |= [self.shop.person("user")]

    def upkeep(self, dice):
        note("upkeep")
        app = self.shop.nodes[next(self.turn)].app
        self.add(0, [lambda: tidy(app)], lambda _: None)

    def look(self, dice):
        """Somebody reads meanwhile, and has it kept."""
        paths = ["products", "categories", *(f"products/{number}" for number in self.was)]
        for path in dice.sample(paths, min(len(paths), 2)):
            self.add(0, [self.send("GET", path)], lambda answers: None)


# The rules


THINGS = ["buy", "buy", "buy", "buy", "refund", "refund", "refund", "create", "create", "edit",
          "edit", "rush", "contend", "delete", "bring", "open_shelf", "rename", "close_shelf",
          "race_for_a_shelf", "leave", "upkeep", "look"]
thing = st.tuples(st.sampled_from(THINGS), st.integers(0, 2**16))


class Machine(RuleBasedStateMachine):
    """What may come next, and what holds after it.

    Nothing that Hypothesis draws depends on the model: who wins a race differs from run to run.
    """

    def __init__(self, shop):
        super().__init__()
        shop.empty()
        self.shop, self.model, self.steps = shop, Model(), 0
        self.turn = itertools.cycle([0, 1])
        self.admin = shop.person("admin")
        self.model.users |= [shop.person("user") for _ in range(3)]
        for number in range(9):
            self.do(("create" if number % 3 else "open_shelf", number))

    @rule(things=st.lists(thing, min_size=1, max_size=12))
    def one_by_one(self, things):
        for one in things:
            self.do(one)

    @rule(things=st.lists(thing, min_size=2, max_size=12))
    def at_once(self, things):
        self.do(*things)

    @rule(days=st.sampled_from([1, 1, 2, 7, 31]), seal=st.booleans())
    def nights(self, days, seal):
        self.shop.sql(f"UPDATE clock.ahead SET days = days + {days}")
        self.model.keys.clear()  # they are kept for a day
        if seal:
            self.do(("upkeep", 0))

    def do(self, *things):
        batch = Batch(self.shop, self.model, self.admin, self.turn)
        for thing, seed in things:
            if len(batch.calls) <= MOST_CALLS - 8:
                getattr(batch, thing)(random.Random(seed))
        batch.run()

    @invariant()
    def agree(self):
        self.steps += 1  # most of them after one that asked the same of the same version
        self.dice = random.Random(self.steps)
        version = f"/api/{'v1' if self.steps % 4 else 'v2'}"
        self.agree_on_products(version)
        self.agree_on_categories(version)
        self.agree_on_sales(version)
        self.agree_on_reports(version)
        result = self.shop.plain.app.test_cli_runner().invoke(args=["db", "check"])
        assert result.exit_code == 0, result.output

    def ask(self, path, query=None, token=None, node=None):
        response = (node or self.shop.nodes[next(self.turn)]).app.test_client().get(
            path, query_string=query,
            headers={"Authorization": f"Bearer {token}"} if token else None)
        assert response.status_code == 200, response.text
        return response

    def ask_all(self, path, **query):
        """What both nodes say, and the one without a cache: the same."""
        answers = [self.ask(path, query, node=node) for node in (*self.shop.nodes, self.shop.plain)]
        assert len({answer.data for answer in answers}) == 1
        assert len({answer.headers["ETag"] for answer in answers}) == 1
        self.shop.seen.update(answer.headers["X-Cache"] for answer in answers[:2])
        return answers[0].json

    def agree_on_products(self, version):
        model = self.model
        for number in model.gone[-5:]:
            for node in self.shop.nodes:
                assert node.get(f"{version}/products/{number}").status_code == 404
        def folded(product):
            return product.name.lower(), product.id
        lists = [
            ({}, model.listed(reverse=True)),
            ({"sort": "price"}, model.listed(key=lambda p: (p.price, p.id))),
            ({"sort": "name", "order": "desc"}, model.listed(key=folded, reverse=True)),
            ({"in_stock": "true"}, model.listed(lambda p: p.stock, reverse=True)),
            ({"in_stock": "false", "order": "asc"}, model.listed(lambda p: not p.stock)),
            ({"min_price": "0.07", "max_price": "1.10", "order": "asc", "limit": 1},
             model.listed(lambda p: Decimal("0.07") <= p.price <= Decimal("1.10"))),
            ({"search": "TEA", "order": "asc", "limit": 2},
             model.listed(lambda p: "tea" in f"{p.name} {p.sku}".lower())),
        ]
        for number in model.categories:  # so short that it has to be counted
            lists.append(({"category_id": number, "max_price": "19.99", "limit": 1}, model.listed(
                lambda p, number=number: p.category == number and p.price < 20, reverse=True)))
        shelves = [[number] for number in model.categories]
        for numbers in (*shelves, sorted(model.categories)[:2]):
            if numbers:
                lists.append(({"category_id": numbers}, model.listed(
                    lambda p, numbers=numbers: p.category in numbers, reverse=True)))
        asked_all = [0, *self.dice.sample(range(1, len(lists)), 2)]
        for place, (query, expected) in enumerate(lists):
            query = {"limit": 100} | query
            page = self.ask_all(f"{version}/products", **query) if place in asked_all \
                else self.ask(f"{version}/products", query).json
            assert page["pagination"]["total"] == len(expected)
            assert len(page["data"]) == min(query["limit"], len(expected))
            for shown, product in zip(page["data"], expected, strict=False):
                fits(shown, product)
            for product in page["data"] if place == 0 else ():
                for node in self.shop.nodes:
                    path = f"{version}/products/{product['id']}"
                    assert self.ask(path, node=node).json == product
        page = self.ask_all(f"{version}/products", limit=3, page=2, sort="price")
        assert page["pagination"]["total"] == len(model.products)
        assert [p["id"] for p in page["data"]] == [p["id"] for p in lists[1][1][3:6]]
        walked, cursor = [], {}
        while cursor is not None:
            page = self.ask(f"{version}/products", {"limit": 5, "count": "none"} | cursor).json
            walked += [product["id"] for product in page["data"]]
            following = page["pagination"]["next_cursor"]
            cursor = {"cursor": following} if following else None
        assert walked == [product["id"] for product in lists[0][1]]

    def agree_on_categories(self, version):
        model = self.model
        found = self.ask_all(f"{version}/categories")["data"]
        assert {category["id"] for category in found} == set(model.categories)
        for category in found:
            fits(category, model.shown_category(category["id"]))
            assert self.ask_all(f"{version}/categories/{category['id']}") == category

    def agree_on_sales(self, version):
        model, admin = self.model, self.admin[1]
        sales = sorted(model.sales.values(), key=lambda sale: (sale.created, sale.id), reverse=True)
        asked = [(admin, {}, sales), *(
            (token, {}, [sale for sale in sales if sale.user == user])
            for user, token in model.users.items())]
        start, end = self.window()
        asked += [(admin, {"status": "refunded"}, [sale for sale in sales if sale.refunded]),
                  (admin, {"from": start.isoformat(), "to": end.isoformat()},
                   [sale for sale in sales if start <= sale.created < end])]
        for token, query, expected in asked:
            page = self.ask(f"{version}/transactions", {"limit": 100} | query, token).json
            assert page["pagination"]["total"] == len(expected)
            assert len(page["data"]) == min(100, len(expected))
            for shown, sale in zip(page["data"], expected, strict=False):
                fits(shown, model.shown_sale(sale))
        for sale in self.dice.sample(sales, min(len(sales), 3)):
            fits(self.ask(f"{version}/transactions/{sale.id}", None, admin).json,
                 model.shown_sale(sale))

    def agree_on_reports(self, version):
        kinds, groups = ["json", "ndjson", "csv"], ["day", "week", "month", "category", "product"]
        self.agree_on_a_time(version, LONG_AGO, LATER, kinds, groups)
        self.agree_on_a_time(version, *self.window(), self.dice.sample(kinds, 1),
                             self.dice.sample(groups, 2))

    def agree_on_a_time(self, version, start, end, kinds, groups):
        dates = {"start_date": start.isoformat(), "end_date": end.isoformat()}
        rows = self.model.sold(start, end)
        expected = [record(sale, line) for sale, line in rows]
        for kind in kinds:
            answer = self.ask(f"{version}/reports/transactions", dates | {"format": kind},
                              self.admin[1])
            assert answer.headers["Report-Rows"] == str(len(rows))
            assert answer.headers["Report-Amount"] == str(total(line for _, line in rows))
            assert read(kind, answer.text) == (
                [defused(row) for row in expected] if kind == "csv" else expected)
        for group_by in groups:
            report = self.ask(f"{version}/reports/sales", dates | {"group_by": group_by},
                              self.admin[1]).json
            sums, everything = self.model.sums(group_by, start, end)
            assert [group["key"] for group in report["data"]] == list(sums)
            for group in report["data"]:
                *numbers, labels = sums[group["key"]]
                assert figures(group) == tuple(numbers)
                assert group["label"] in labels
            assert figures(report["total"]) == everything

    def window(self):
        """Any time between two sales, midnights, or both."""
        edges = {LONG_AGO, LATER}
        for sale in self.model.sales.values():
            midnight = sale.created.replace(hour=0, minute=0, second=0, microsecond=0)
            edges |= {sale.created, midnight, midnight + timedelta(days=1)}
        return sorted(self.dice.sample(sorted(edges), 2))


def moment(shown):
    return datetime.fromisoformat(shown["created_at"])


def fits(shown, expected):
    assert {name: shown[name] for name in expected} == expected


def figures(group):
    return group["orders"], group["items"], Decimal(group["amount"])


def record(sale, line):
    """A line of the report of everything sold."""
    return {"transaction_id": sale.id, "created_at": sale.created, "user_id": sale.user,
            "status": "refunded" if sale.refunded else "completed", "product_id": line.product,
            "product_name": line.name, "quantity": line.quantity, "unit_price": str(line.price),
            "amount": str(line.amount)}


def defused(row):
    name = row["product_name"]
    return row | {"product_name": f"'{name}" if name[0] in "=+-@" else name}


def read(kind, text):
    """A report's records, in one form for all formats."""
    if kind == "csv":
        rows = [row | {name: int(row[name]) if row[name] else None for name in (
            "transaction_id", "user_id", "product_id", "quantity")}
            for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    else:
        rows = json.loads(text)["data"] if kind == "json" else [
            json.loads(line) for line in text.splitlines()]
    return [row | {"created_at": moment(row)} for row in rows]


def run(shop, **options):
    shop.seen.clear()
    run_state_machine_as_test(lambda: Machine(shop), settings=settings(
        database=None, deadline=None, print_blob=False, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), **options))
    assert shop.seen["hit"] > shop.seen["miss"] / 4  # or nothing was said about the cache


def test_the_shop_is_what_its_model_says(shop):
    run(shop, derandomize=True, max_examples=6, stateful_step_count=8,
        phases=[Phase.generate, Phase.shrink])


@pytest.mark.long
def test_the_shop_is_what_its_model_says_at_length(shop):
    run(shop, max_examples=60, stateful_step_count=30)
