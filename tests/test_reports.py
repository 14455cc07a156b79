"""Reports: the stream of every item sold, sums over it, and what both cost everybody else."""
import contextlib
import csv
import http.client
import io
import json
import re
import socket
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import psycopg
import pytest

import db
from blueprints.v1.reports import begin
from db.seed import PASSWORD, seed
from tests.conftest import Client, execute, register, unique

COLUMNS = ["transaction_id", "created_at", "status", "user_id", "product_id", "product_name",
           "quantity", "unit_price", "amount"]
TYPES = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv"}
GROUPS = ["day", "week", "month", "category", "product"]
NEVER = {"start_date": "1990-01-01", "end_date": "1990-01-02"}
EVER = {"start_date": "2000-01-01", "end_date": "2100-01-01"}
BORDER = datetime(2026, 3, 1, 12, tzinfo=UTC)  # of the sale whose window's ends are tried


class Shop:
    """A shop with a past: a database of its own, in which sales can be moved to any time."""

    def __init__(self, url, app):
        self.url, self.app, self.client = url, app, Client(app)
        self.admin = register(self.client)
        self.sql(f"UPDATE users SET role = 'admin' WHERE id = {self.admin.id}")

    def sql(self, text):
        return execute(self.url, text)

    def make(self, path, by=None, **fields):
        response = self.client.post(path, token=(by or self.admin).token, json=fields)
        assert response.status_code in (200, 201), response.text
        return response.json

    def product(self, name=None, price="10.00", category=None):
        return self.make("products", name=name or unique("Product "), price=price, stock=100_000,
                         category_id=category and category["id"])

    def sell(self, *items, at=None, buyer=None):
        """A sale of (product, quantity)s, as if it had been made at a moment."""
        sale = self.make("transactions", buyer, items=[
            {"product_id": product["id"], "quantity": quantity} for product, quantity in items])
        if at is not None:
            self.sql(f"UPDATE transactions SET created_at = '{at}' WHERE id = {sale['id']}; "
                     f"UPDATE transaction_items SET created_at = '{at}' "
                     f"WHERE transaction_id = {sale['id']}")
        return sale

    def refund(self, sale):
        return self.make(f"transactions/{sale['id']}/refund")

    def seal(self):
        return self.sql("SELECT seal_sales()")[0][0]

    def unseal(self):
        """Forget all sums, so that sales can again be moved to any time."""
        self.sql("DELETE FROM sales_days; DELETE FROM sales_product_months; "
                 "UPDATE sales_sealed SET until = '1970-01-01'")

    def report(self, start=None, end=None, name="transactions", headers=None, **query):
        window = EVER if start is None else {"start_date": start, "end_date": end}
        return self.client.get(f"reports/{name}", token=self.admin.token, headers=headers,
                               query_string=window | query)

    def records(self, *window):
        response = self.report(*window)
        assert response.status_code == 200, response.text
        return response.json["data"]

    def sums(self, group_by, *window):
        response = self.report(*window, name="sales", group_by=group_by)
        assert response.status_code == 200, response.text
        return response.json


@pytest.fixture(scope="module")
def make_shop(make_database, make_app):
    def make(**settings):
        url = make_database()
        return Shop(url, make_app(DATABASE_URL=url, **settings))
    return make


@pytest.fixture(scope="module")
def shop(make_shop):
    """A shop to which tests add no sales outside of years of their own."""
    shop = make_shop()
    tea, pen = shop.product("Tea, green; \"finest\"", "0.07"), shop.product("Pen", "19.99")
    shop.sell((tea, 3), (pen, 2), at="2026-02-27T08:00:00.000001Z")
    shop.sell((tea, 1), at=BORDER)
    shop.refund(shop.sell((pen, 7), (tea, 5), at="2026-03-02T23:59:59.999999Z"))
    return shop


# Formats


def parsed(kind, body):
    """The records of a report, as JSON has them."""
    if kind == "json":
        return json.loads(body)["data"]
    if kind == "ndjson":
        return [json.loads(line) for line in body.splitlines()]
    rows = csv.DictReader(io.StringIO(body.decode(), newline=""), strict=True)
    return [row | {name: int(row[name]) if row[name] else None for name in (
        "transaction_id", "user_id", "product_id", "quantity")} for row in rows]


@pytest.mark.parametrize("kind", TYPES)
def test_a_report_comes_in_three_formats_by_accept_or_parameter(shop, kind):
    asked = shop.report(headers={"Accept": TYPES[kind]})
    named = shop.report(format=kind)
    assert asked.mimetype == named.mimetype == TYPES[kind]
    assert asked.data == named.data
    assert len(parsed(kind, asked.data)) == 5


def test_every_format_holds_the_same_records(shop):
    records = {kind: parsed(kind, shop.report(format=kind).data) for kind in TYPES}
    assert records["json"] == records["ndjson"]
    for row, cells in zip(records["json"], records["csv"], strict=True):
        assert datetime.fromisoformat(row.pop("created_at")) == datetime.fromisoformat(
            cells.pop("created_at"))
        assert row == cells


def test_a_record_says_what_was_sold(shop):
    first, *_ = shop.records()
    [(transaction_id, tea)] = shop.sql("SELECT transaction_id, product_id FROM transaction_items "
                                       "ORDER BY created_at, line LIMIT 1")
    assert first == {
        "transaction_id": transaction_id, "created_at": "2026-02-27T08:00:00.000001+00:00",
        "status": "completed", "user_id": shop.admin.id, "product_id": tea,
        "product_name": "Tea, green; \"finest\"", "quantity": 3, "unit_price": "0.07",
        "amount": "0.21",
    }


def test_the_parameter_wins_over_accept(shop):
    answer = shop.report(format="csv", headers={"Accept": "application/json"})
    assert answer.mimetype == "text/csv"
    answer = shop.report(format="ndjson", headers={"Accept": "image/png"})
    assert answer.mimetype == "application/x-ndjson"


@pytest.mark.parametrize(("accept", "kind"), [
    ("*/*", "json"), ("application/*", "json"), ("text/*", "csv"), ("", "json"),
    ("text/csv;q=0.5, application/x-ndjson;q=0.9", "ndjson"), ("TEXT/CSV", "csv"),
    ("text/html, text/csv;q=0.1", "csv"), ("application/json;q=0, */*", "ndjson"),
])
def test_the_best_accepted_format_is_taken(shop, accept, kind):
    assert shop.report(headers={"Accept": accept}).mimetype == TYPES[kind]


@pytest.mark.parametrize("accept", ["application/pdf", "text/html", "application/json;q=0"])
def test_another_format_is_406(shop, accept):
    answer = shop.report(headers={"Accept": accept})
    assert (answer.status_code, answer.json["code"]) == (406, "not_acceptable")


@pytest.mark.parametrize("kind", ["xml", "CSV", ""])
def test_an_unknown_format_is_422(shop, kind):
    answer = shop.report(format=kind)
    assert [detail["field"] for detail in answer.json["details"]] == ["format"]


@pytest.mark.parametrize(("kind", "nothing"), [
    ("json", b'{"data": []}'), ("ndjson", b""), ("csv", ",".join(COLUMNS).encode() + b"\r\n")])
def test_a_report_of_nothing_is_whole(shop, kind, nothing):
    answer = shop.report(*NEVER.values(), format=kind)
    assert answer.data == nothing
    assert (answer.headers["Report-Rows"], answer.headers["Report-Amount"]) == ("0", "0.00")


def test_v2_serves_the_same(shop):
    for name in ("transactions", "sales"):
        old, new = (shop.client.get(f"/api/{v}/reports/{name}", token=shop.admin.token,
                                    query_string=EVER) for v in ("v1", "v2"))
        assert old.data == new.data


# CSV


def test_csv_is_rfc_4180(shop):
    body = shop.report(format="csv").data
    assert body.endswith(b"\r\n")
    assert b"\n" not in body.replace(b"\r\n", b"")
    header, *rows = csv.reader(io.StringIO(body.decode(), newline=""), strict=True)
    assert header == COLUMNS
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert b',"Tea, green; ""finest""",' in body


@pytest.mark.parametrize("name", [
    '=HYPERLINK("http://evil.example")', "+1", "-1+1|cmd", "@SUM(A1)", "=1,2",
])
def test_a_name_that_a_spreadsheet_would_run_is_defused(shop, name):
    shop.sell((shop.product(name), 1), at="2011-05-05")
    rows = parsed("csv", shop.report("2011-05-05", "2011-05-06", format="csv").data)
    assert rows[-1]["product_name"] == f"'{name}"
    assert shop.records("2011-05-05", "2011-05-06")[-1]["product_name"] == name


@pytest.mark.parametrize("name", ["a=b", "1-2", "'=1", "Tea, green", 'The "best"', "naïve ☕", "%s",
                                  "\\.", "NULL", "\\N", "a\\tb", "a\u2028b"])
def test_any_other_name_is_itself_in_every_format(shop, name):
    shop.sell((shop.product(name), 1), at="2012-05-05")
    for kind in TYPES:
        rows = parsed(kind, shop.report("2012-05-05", "2012-05-06", format=kind).data)
        assert rows[-1]["product_name"] == name


def test_a_buyer_who_is_gone_is_an_empty_cell(shop):
    buyer = register(shop.client)
    sale = shop.sell((shop.product(), 1), at="2013-05-05", buyer=buyer)
    assert sale["user_id"] == shop.records("2013-05-05", "2013-05-06")[0]["user_id"] == buyer.id
    shop.client.delete(f"users/{buyer.id}", token=shop.admin.token)
    assert shop.records("2013-05-05", "2013-05-06")[0]["user_id"] is None
    body = shop.report("2013-05-05", "2013-05-06", format="csv").text
    assert ",completed,," in body


# The window


@pytest.mark.parametrize(("start", "end", "found"), [
    ("2026-03-01T12:00:00Z", "2026-03-01T12:00:00.000001Z", True),
    ("2026-03-01T11:00:00Z", "2026-03-01T12:00:00Z", False),
    ("2026-03-01T12:00:00.000001Z", "2026-03-01T13:00:00Z", False),
    ("2026-03-01", "2026-03-02", True), ("2026-02-28", "2026-03-01", False),
    ("2026-03-02", "2026-03-02T20:00", False),
    ("2026-03-01T17:30:00+05:30", "2026-03-01T17:31+05:30", True),
    ("2026-03-01T07:00:00-05:00", "2026-03-01T12:00:01", True),
    ("2026-03-01 12:00", "2026-03-01T12:01:00z", True),
])
def test_a_window_holds_its_start_and_not_its_end(shop, start, end, found):
    assert len(shop.records(start, end)) == found
    assert shop.sums("day", start, end)["total"]["orders"] == found


@pytest.mark.parametrize("name", ["transactions", "sales"])
@pytest.mark.parametrize(("start", "end", "wrong"), [
    ("2026-03-02", "2026-03-01", "end_date"), ("2026-03-01", "2026-03-01", "end_date"),
    ("2026-03-01T01:00+02:00", "2026-02-28T23:00Z", "end_date"),
    ("2026-02-30", "2026-03-01", "start_date"), ("2026-13-01", "2027-01-01", "start_date"),
    ("2026-03-01T24:01", "2027-01-01", "start_date"), ("yesterday", "today", "start_date"),
    ("infinity", "2027-01-01", "start_date"), ("2026-01-01", "infinity", "end_date"),
    ("-infinity", "infinity", "start_date"), ("now", "2027-01-01", "start_date"),
    ("0000-01-01", "2027-01-01", "start_date"), ("0001-01-01", "2027-01-01", "start_date"),
    ("2026-01-01", "9999-12-31", "end_date"), ("2026-01-01", "20260-01-01", "end_date"),
    ("1969-12-31", "2027-01-01", "start_date"), ("", "2027-01-01", "start_date"),
    ("2026-01-01T00:00:00+99:00", "2027-01-01", "start_date"),
    ("1767225600", "2027-01-01", "start_date"), ("2026-1-1", "2027-01-01", "start_date"),
    ("2026-01-01'--", "2027-01-01", "start_date"), ("٢٠٢٦-٠١-٠١", "2027-01-01", "start_date"),
])
def test_a_window_that_is_none_is_refused_before_the_first_byte(shop, name, start, end, wrong):
    answer = shop.report(start, end, name=name)
    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")
    assert wrong in [detail["field"] for detail in answer.json["details"]]


@pytest.mark.parametrize("name", ["transactions", "sales"])
def test_both_dates_are_needed(shop, name):
    answer = shop.client.get(f"reports/{name}", token=shop.admin.token)
    assert {detail["field"] for detail in answer.json["details"]} == {"start_date", "end_date"}


@pytest.mark.parametrize(("start", "end"), [("1970-01-01", "2200-12-31"),
                                            ("1970-01-01T00:00+14:00", "2200-12-31T23:59-14:00")])
@pytest.mark.parametrize("group_by", GROUPS)
def test_the_widest_window_works(shop, start, end, group_by):
    rows = shop.records(start, end)
    assert len(rows) >= 5
    assert shop.sums(group_by, start, end)["total"] == shop.sums(group_by)["total"]


# Headers


@pytest.mark.parametrize("kind", TYPES)
def test_a_report_is_a_file_with_a_name(shop, kind):
    answer = shop.report("2026-01-01", "2026-02-01T10:30:00Z", format=kind)
    assert answer.headers["Content-Disposition"] == (
        f'attachment; filename="transactions_2026-01-01_2026-02-01.{kind}"')


@pytest.mark.parametrize("window", [
    (), ("2026-03-01", "2026-03-03"), ("2026-02-27T08:00:00.000001Z", "2026-03-02T23:59:59.999Z"),
    ("2026-03-01T13:00", "2026-03-01T14:00"),
])
def test_the_headers_tell_what_the_stream_holds(shop, window):
    answer = shop.report(*window)
    rows = answer.json["data"]
    assert answer.headers["Report-Rows"] == str(len(rows))
    assert Decimal(answer.headers["Report-Amount"]) == total(rows)
    assert re.fullmatch(r"\d+\.\d\d", answer.headers["Report-Amount"])


def test_records_come_in_the_order_of_time(shop):
    for at in ("2014-07-03", "2014-07-01", "2014-07-02", "2014-07-01"):
        shop.sell((shop.product(), 1), (shop.product(), 1), at=at)
    rows = shop.records("2014-07-01", "2014-08-01")
    order = [(row["created_at"], row["transaction_id"]) for row in rows]
    assert order == sorted(order)
    assert len(rows) == 8


@pytest.mark.parametrize("name", ["transactions", "sales"])
def test_reports_are_for_admins(shop, name):
    assert shop.client.get(f"reports/{name}", query_string=EVER).status_code == 401
    token = register(shop.client).token
    answer = shop.client.get(f"reports/{name}", token=token, query_string=EVER)
    assert (answer.status_code, answer.json["code"]) == (403, "forbidden")


def test_head_gives_the_headers_and_occupies_nothing(shop):
    for kind in ("csv", "json", "ndjson"):
        whole = shop.report(format=kind)
        for _ in range(3):
            head = shop.client.head("reports/transactions", token=shop.admin.token,
                                    query_string=EVER | {"format": kind})
            assert (head.status_code, head.data) == (200, b"")
            for header in ("Content-Type", "Content-Disposition", "Report-Rows", "Report-Amount"):
                assert head.headers[header] == whole.headers[header]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("blocks", range(4))
def test_a_reader_may_leave_behind_any_block(shop, kind, blocks):
    """Behind the last row as well, of which the database has nothing more to say."""
    with shop.app.app_context():
        held = contextlib.ExitStack()
        _, report = begin(held, kind, EVER)
        for _ in zip(range(blocks), report, strict=False):
            pass
        closing = threading.Thread(target=held.close, daemon=True)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()
        with db.reports().reading() as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)


def test_a_report_whose_client_is_gone_before_it_begins_occupies_nothing(shop):
    gone = socket.socket()
    gone.close()
    for _ in range(4):
        answer = shop.client.get("reports/transactions", token=shop.admin.token, query_string=EVER,
                                 environ_overrides={"gunicorn.socket": gone})
        assert answer.status_code == 500
    assert shop.report().status_code == 200


def test_a_refused_report_occupies_nothing(shop):
    for _ in range(4):
        assert shop.report("2026-03-02", "2026-03-01").status_code == 422
        assert shop.report(headers={"Accept": "image/png"}).status_code == 406
    assert shop.report().status_code == 200


# Sums


def total(records):
    return sum((Decimal(row["amount"]) for row in records), Decimal(0))


def label_of(group_by, row, categories):
    """The key of a record's group."""
    at = datetime.fromisoformat(row["created_at"])
    return {"day": f"{at:%Y-%m-%d}", "week": f"{at:%G-W%V}", "month": f"{at:%Y-%m}",
            "product": str(row["product_id"]), "category": categories[row["product_id"]]}[group_by]


def added_up(group_by, records, categories):
    """``{key: (orders, items, amount)}`` of a stream's records: what sums have to say."""
    groups = defaultdict(lambda: (set(), [], []))
    for row in records:
        if row["status"] == "completed":
            orders, items, amounts = groups[label_of(group_by, row, categories)]
            orders.add(row["transaction_id"])
            items.append(row["quantity"])
            amounts.append(Decimal(row["amount"]))
    return {key: (len(orders), sum(items), sum(amounts))
            for key, (orders, items, amounts) in groups.items()}


def check_sums(shop, window, categories):
    """Every sum of a window agrees with its stream to the cent; so does what the headers say."""
    answer = shop.report(*window)
    records = answer.json["data"]
    assert answer.headers["Report-Rows"] == str(len(records))
    assert Decimal(answer.headers["Report-Amount"]) == total(records)
    kept = [row for row in records if row["status"] == "completed"]
    for group_by in GROUPS:
        said = shop.sums(group_by, *window)
        found = {g["key"]: (g["orders"], g["items"], Decimal(g["amount"])) for g in said["data"]}
        assert found == added_up(group_by, records, categories), (group_by, window)
        assert len(found) == len(said["data"])
        assert said["total"] == {
            "orders": len({row["transaction_id"] for row in kept}),
            "items": sum(row["quantity"] for row in kept), "amount": f"{total(kept):.2f}"}


@pytest.fixture(scope="module")
def past(make_shop):
    """A shop with four months of sales, none of them in sums yet; and windows through them."""
    shop = make_shop()
    food, books = (shop.make("categories", name=name) for name in ("Food", "Books"))
    tea, jam = shop.product("Tea", "0.07", food), shop.product("Jam", "3.33", food)
    atlas, gift = shop.product("Atlas", "119.99", books), shop.product("Gift", "1.01")
    shop.categories = {tea["id"]: str(food["id"]), jam["id"]: str(food["id"]),
                       atlas["id"]: str(books["id"]), gift["id"]: None}
    items = [[(tea, 3), (jam, 1), (atlas, 2)], [(gift, 1), (tea, 7)], [(jam, 2)],
             [(atlas, 1), (gift, 9), (jam, 4), (tea, 1)]]
    first = datetime(2025, 11, 20, tzinfo=UTC)
    shop.sales = []
    for n in range(32):
        at = first + timedelta(days=n * 3.37, hours=0 if n % 5 else 23.999)
        shop.sales.append(shop.sell(*items[n % 4], at=at))
        if n % 7 == 3:
            shop.refund(shop.sales[-1])
    for at in ("2025-12-31T23:59:59.999999Z", "2026-01-01T00:00:00Z", "2026-01-05T00:00:00Z",
               "2026-01-31T23:59:59.999999Z"):
        shop.sales.append(shop.sell(*items[0], at=at))
    today = datetime.now(UTC).date()
    shop.sales.append(shop.sell(*items[3]))
    shop.windows = [
        (), ("2025-12-01", "2026-01-01"), ("2026-01-01", "2026-01-02"),
        ("2025-12-10T07:00", "2026-02-03T19:30"), ("2026-01-01T00:00:00.000001Z", "2026-01-31"),
        ("2025-12-15", "2025-12-20"), ("2025-12-31T12:00", "2026-01-01T12:00"),
        ("2026-01-05T08:00", "2026-01-05T09:00"), ("2025-12-31", "2026-01-31T23:59:59.999999Z"),
        ("2026-01-20T01:00+13:00", str(today + timedelta(days=1))), (str(today), "2100-01-01"),
        ("2024-01-01", "2025-01-01"), ("2090-01-01", "2090-02-02"),
    ]
    return shop


def test_sums_agree_with_the_stream_before_and_after_sealing_and_after_a_refund(past):
    def check():
        for window in past.windows:
            check_sums(past, window, past.categories)
    check()
    sums = [past.sums(group_by).items() for group_by in GROUPS]
    assert past.seal() is not None
    assert past.sql("SELECT count(*) > 20 FROM sales_days") == [(True,)]
    assert [past.sums(group_by).items() for group_by in GROUPS] == sums
    check()
    for sale in past.sales[12:16:2] + past.sales[-3:]:
        past.refund(sale)
    check()
    assert past.seal() is not None
    check()


def test_sums_stay_when_a_product_and_a_category_are_renamed_and_removed(past):
    before = [past.sums(group_by, "2025-12-01", "2026-02-01") for group_by in GROUPS[:3]]
    for path in ("products/1", "categories/1"):
        past.client.patch(path, token=past.admin.token, json={"name": unique("Renamed ")})
    past.client.delete("products/2", token=past.admin.token)
    for window in past.windows:
        check_sums(past, window, past.categories)
    assert [past.sums(g, "2025-12-01", "2026-02-01") for g in GROUPS[:3]] == before


def test_days_that_are_sealed_piece_by_piece_add_up_to_the_same(past):
    """Sealed up to any day, in the middle of a month or not, the sums are the same."""
    whole = [past.sums(group_by) for group_by in GROUPS]
    [(source,)] = past.sql("SELECT pg_get_functiondef('seal_sales'::regproc)")
    past.unseal()
    now = "now() AT TIME ZONE 'UTC' - interval '10 minutes'"
    assert now in source
    try:
        for day in ("2025-12-01", "2025-12-17", "2025-12-17", "2026-01-01", "2026-01-31"):
            past.sql(source.replace(now, f"'{day}'::timestamp"))
            assert past.seal() == date.fromisoformat(day)
            for window in past.windows[:9:2]:
                check_sums(past, window, past.categories)
            assert [past.sums(group_by) for group_by in GROUPS] == whole
    finally:
        past.sql(source)
    past.seal()
    assert [past.sums(group_by) for group_by in GROUPS] == whole


def test_groups_have_labels_and_an_order(make_shop):
    shop = make_shop()
    food = shop.make("categories", name="Food")
    cheap, dear = shop.product("Cheap", "1.00", food), shop.product("Dear", "100.00")
    shop.sell((cheap, 2), at="2026-02-02T12:00Z")
    shop.sell((dear, 1), (cheap, 1), at="2026-01-01")
    def said(group_by):
        return [(g["key"], g["label"], g["orders"]) for g in shop.sums(group_by)["data"]]
    for _ in range(2):
        assert said("day") == [("2026-01-01",) * 2 + (1,), ("2026-02-02",) * 2 + (1,)]
        assert said("week") == [("2026-W01",) * 2 + (1,), ("2026-W06",) * 2 + (1,)]
        assert said("month") == [("2026-01",) * 2 + (1,), ("2026-02",) * 2 + (1,)]
        assert said("category") == [(None, None, 1), (str(food["id"]), "Food", 2)]
        assert said("product") == [(str(dear["id"]), "Dear", 1), (str(cheap["id"]), "Cheap", 2)]
        shop.seal()


@pytest.mark.parametrize("group_by", ["year", "", "Day", "user"])
def test_an_unknown_group_is_422(shop, group_by):
    answer = shop.report(name="sales", group_by=group_by)
    assert [detail["field"] for detail in answer.json["details"]] == ["group_by"]


def test_sums_of_nothing_are_zero(shop):
    for group_by in GROUPS:
        assert shop.sums(group_by, *NEVER.values()) == {
            "data": [], "total": {"orders": 0, "items": 0, "amount": "0.00"}}


def test_many_at_once_seal_once(make_shop):
    shop = make_shop()
    product = shop.product(price="2.50")
    for day in range(1, 20):
        shop.sell((product, day), at=f"2026-01-{day:02}")
    sums = [shop.sums(group_by) for group_by in GROUPS]
    ready = threading.Barrier(5)
    def seal(_):
        ready.wait()
        return shop.seal()
    with ThreadPoolExecutor(5) as pool:
        days = set(pool.map(seal, range(5)))
    assert len(days - {None}) == 1
    assert shop.sql("SELECT count(*) FROM sales_days") == [(19,)]
    assert [shop.sums(group_by) for group_by in GROUPS] == sums


def test_refunds_while_days_are_sealed_are_taken_off(make_shop):
    shop = make_shop()
    product = shop.product(price="2.50")
    sales = [shop.sell((product, 1), at=f"2026-01-{1 + n:02}") for n in range(12)]
    with ThreadPoolExecutor(4) as pool:
        refunds = [pool.submit(shop.refund, sale) for sale in sales]
        seals = [pool.submit(shop.seal) for _ in range(6)]
        for task in refunds + seals:
            task.result()
    shop.seal()
    for group_by in GROUPS:
        assert shop.sums(group_by)["total"] == {"orders": 0, "items": 0, "amount": "0.00"}
    check_sums(shop, (), {product["id"]: None})


def test_a_buyer_who_is_deleted_changes_no_sum(make_shop):
    """What was refunded is taken off the sums once, whatever else changes in its lines."""
    shop = make_shop()
    buyer, product = register(shop.client), shop.product()
    sales = [shop.sell((product, 2), at=f"2026-01-0{day}", buyer=buyer) for day in (1, 2, 3)]
    shop.refund(sales[0])
    shop.seal()
    shop.refund(sales[1])
    before = [shop.sums(group_by) for group_by in GROUPS]
    assert shop.client.delete(f"users/{buyer.id}", token=shop.admin.token).status_code == 204
    assert [shop.sums(group_by) for group_by in GROUPS] == before
    check_sums(shop, (), {product["id"]: None})


def test_a_sale_into_a_sealed_day_is_refused(make_shop):
    shop = make_shop()
    shop.seal()
    def insert(day):
        shop.sql(f"INSERT INTO transactions (total, created_at) VALUES (0, {day})")
    with pytest.raises(psycopg.errors.RaiseException, match="sealed"):
        insert("now() - interval '2 days'")
    insert("now()")


def test_a_seeded_shop_agrees_with_itself(make_database, make_app):
    url = make_database()
    seed(url, {"users": 5, "products": 40, "transactions": 400})
    shop = Shop.__new__(Shop)
    shop.url, shop.app = url, make_app(DATABASE_URL=url)
    shop.client = Client(shop.app)
    login = {"email": "admin@example.com", "password": PASSWORD}
    token = shop.client.post("auth/login", json=login).json["token"]
    shop.admin = type("Admin", (), {"token": token})
    categories = {product: str(category) for product, category in shop.sql(
        "SELECT id, category_id FROM products")}
    now = datetime.now(UTC)
    for start in (365, 200, 33.3, 1.5):
        window = (now - timedelta(days=start)).isoformat(), now.isoformat()
        check_sums(shop, window, categories)
    check_sums(shop, (), categories)


# What a report costs others: a real server, whose reports are larger than its buffers


ROWS = 25_000


@pytest.fixture(scope="module")
def large(make_shop):
    """A shop whose whole report doesn't fit into the buffers between it and a client."""
    shop = make_shop()
    shop.sql(f"""
        INSERT INTO transactions (id, total, created_at)
        SELECT i, 1.25, '2026-01-01'::timestamptz + i * interval '1 s'
        FROM generate_series(1000, {999 + ROWS}) i;
        INSERT INTO transaction_items (transaction_id, line, quantity, product_id, created_at,
            unit_price, amount, first_in_category, product_name)
        SELECT id, 1, 1, 1, created_at, total, total, true, repeat('a long name ', 16)
        FROM transactions""")
    return shop


@pytest.fixture(scope="module")
def busy(large, serve):
    """A real server of the large shop, with one worker and two reports at once."""
    return serve(workers=1, DATABASE_URL=large.url, REPORT_CONCURRENCY="2")


PATH = "reports/transactions?start_date=2026-01-01&end_date=2100-01-01"


class Download:
    """A report that its client reads as it likes."""

    def __init__(self, server, shop, kind="json"):
        # A small window keeps what the kernel holds for the client small.
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(
            f"GET /api/v1/{PATH}&format={kind} HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: Bearer {shop.admin.token}\r\nConnection: close\r\n\r\n".encode())
        self.answer = http.client.HTTPResponse(self.socket)
        self.answer.begin()

    def read(self, *size):
        return self.answer.read(*size)

    def close(self):
        self.answer.close()
        self.socket.close()


@pytest.fixture
def download(busy, large):
    """``download()`` begins a report; the end of the test ends it."""
    begun = []
    def begin(**kwargs):
        begun.append(Download(busy, large, **kwargs))
        return begun[-1]
    yield begin
    for one in begun:
        one.close()
    free(busy, large)


def backends(shop):
    """The pids of the database's processes that are sending a report."""
    return [pid for pid, in shop.sql("""
        SELECT pid FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '/*%*/ COPY %' AND state = 'active'""")]


def free(server, shop, seconds=10):
    """Wait until both slots can be had and no report runs in the database."""
    end = time.monotonic() + seconds
    while backends(shop) or server.call("HEAD", PATH, token=shop.admin.token).status != 200:
        assert time.monotonic() < end, "a report goes on though its client has gone"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", TYPES)
def test_a_large_report_is_whole(download, kind):
    report = download(kind=kind)
    rows = parsed(kind, report.read())
    assert report.answer.headers["Report-Rows"] == str(len(rows)) == str(ROWS)
    assert Decimal(report.answer.headers["Report-Amount"]) == total(rows)


def test_past_the_budget_a_report_is_503_while_others_are_served(busy, large, download):
    first, second = download(), download()
    refused = busy.call("GET", PATH, token=large.admin.token)
    assert (refused.status, refused.json()["code"]) == (503, "unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    begun = time.monotonic()
    for path in ("/health", "products", "users/me", "transactions?limit=2"):
        assert busy.call("GET", path, token=large.admin.token).status == 200
    assert busy.call("GET", "reports/sales?start_date=2026-01-01&end_date=2026-01-02",
                     token=large.admin.token).status == 200
    assert time.monotonic() - begun < 3
    assert len(parsed("json", first.read())) == len(parsed("json", second.read())) == ROWS


@pytest.mark.parametrize("size", [0, 200_000])
def test_a_client_that_goes_away_gives_slot_and_connection_back(busy, large, download, size):
    for _ in range(3):
        gone = [download(), download()]
        for report in gone:
            report.read(size)
            report.close()
        free(busy, large)


@pytest.mark.parametrize("kind", TYPES)
def test_a_report_whose_database_ends_breaks_off_visibly(busy, large, download, kind):
    report = download(kind=kind)
    assert report.read(1000)
    [pid] = backends(large)
    large.sql(f"SELECT pg_terminate_backend({pid})")
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        report.read()
    report.close()
    free(busy, large)
    assert len(parsed(kind, download(kind=kind).read())) == ROWS


def test_a_report_is_of_one_moment(busy, large, download):
    report = download(kind="ndjson")
    report.read(1000)
    large.sql("""INSERT INTO transactions (id, total, created_at) VALUES (900, 1, now());
        INSERT INTO transaction_items (transaction_id, line, quantity, product_id, created_at,
            unit_price, amount, first_in_category, product_name)
        VALUES (900, 1, 1, 1, now(), 1, 1, true, 'late')""")
    try:
        assert b'"late"' not in report.read()
        assert report.answer.headers["Report-Rows"] == str(ROWS)
        assert b'"late"' in download(kind="ndjson").read()
    finally:
        large.sql("DELETE FROM transaction_items WHERE transaction_id = 900; "
                  "DELETE FROM transactions WHERE id = 900")
