"""``flask products import`` and ``export``: the catalogue as a file, all of it or nothing."""
import codecs
import csv
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import Client, execute, register, unique

COLUMNS = ["sku", "name", "description", "price", "stock", "category"]


@pytest.fixture(scope="module")
def url(make_database):
    """A database of its own: an export holds the whole catalogue."""
    return make_database()


@pytest.fixture(scope="module")
def app(make_app, url):
    return make_app(DATABASE_URL=url)


@pytest.fixture(scope="module")
def client(app):
    return Client(app)


@pytest.fixture(scope="module")
def admin(client, url):
    person = register(client)
    execute(url, f"UPDATE users SET role = 'admin' WHERE id = {person.id}")
    return person


@pytest.fixture(scope="module")
def food(client, admin):
    return client.post("categories", token=admin.token, json={"name": "Food & Drink"}).json


@pytest.fixture
def load(app, tmp_path):
    """``load(text, *options)`` imports a file with this content."""
    def run(content, *options):
        file = tmp_path / "products.csv"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return app.test_cli_runner().invoke(args=["products", "import", str(file), *options])
    return run


@pytest.fixture
def export(app):
    def run():
        done = app.test_cli_runner().invoke(args=["products", "export"])
        assert done.exit_code == 0, done.output
        return done.stdout_bytes
    return run


@pytest.fixture
def find(client):
    """The product of a SKU, or None."""
    def by(sku):
        found = client.get("products", query_string={"search": sku, "limit": 100}).json["data"]
        return next((product for product in found if product["sku"] == sku), None)
    return by


def test_an_import_creates_and_changes_by_sku(load, find, food):
    old, new = unique("OLD"), unique("NEW")
    assert load(f"sku,name,price\n{old},Tea,1\n").output == "1 created, 0 changed.\n"
    first = find(old)
    done = load(f"sku,name,description,price,stock,category\n{old},Green tea,Fine,2.50,7,"
                f"food & drink\n{new},Jam,,0.99,0,\n")
    assert (done.exit_code, done.output) == (0, "1 created, 1 changed.\n")
    changed = find(old)
    assert changed.pop("updated_at") > first.pop("updated_at")
    assert changed == first | {"name": "Green tea", "description": "Fine", "price": "2.50",
                               "stock": 7, "category_id": food["id"],
                               "category_name": food["name"]}
    made = find(new)
    assert (made["name"], made["price"], made["stock"], made["category_id"]) == (
        "Jam", "0.99", 0, None)


def test_a_dry_run_says_what_would_be_and_changes_nothing(load, find, url):
    sku, other = unique("DRY"), unique("DRY")
    load(f"sku,name,price\n{sku},Tea,1\n")
    before = execute(url, "SELECT * FROM products ORDER BY id")
    done = load(f"sku,name,price\n{sku},Coffee,2\n{other},Jam,3\n", "--dry-run")
    assert (done.exit_code, done.output) == (
        0, "1 created, 1 changed, had this not been a dry run.\n")
    assert execute(url, "SELECT * FROM products ORDER BY id") == before
    assert find(sku)["name"] == "Tea"
    assert load("sku,name,price\n,,\n", "--dry-run").exit_code == 1


WRONG = {
    "sku is missing": ["", "Tea", "", "1", "0", ""],
    "sku is not valid": ["S" * 65, "Tea", "", "1", "0", ""],
    "name is missing": ["W1", "", "", "1", "0", ""],
    "name is not valid": ["W2", "n" * 201, "", "1", "0", ""],
    "description is not valid": ["W3", "Tea", "d" * 10_001, "1", "0", ""],
    "price is missing": ["W4", "Tea", "", "", "0", ""],
    "price is not an amount with at most two decimal places": ["W5", "Tea", "", "1.999", "0", ""],
    "stock is missing": ["W8", "Tea", "", "1", "", ""],
    "stock is not a whole number": ["W6", "Tea", "", "1", "-1", ""],
    "there is no such category": ["W7", "Tea", "", "1", "0", "Nowhere"],
}


def written(*rows, columns=COLUMNS):
    file = io.StringIO()
    csv.writer(file).writerows([columns, *rows])
    return file.getvalue()


def test_every_wrong_row_is_reported_with_its_line_and_nothing_is_changed(load, find, url):
    sku = unique("GOOD")
    before = execute(url, "SELECT count(*) FROM products")
    done = load(written([sku, "Tea", "two\nlines", "1", "0", ""], *WRONG.values()))
    assert done.exit_code == 1
    for line, reason in enumerate(WRONG, 4):  # behind the header and a row of two lines
        assert f"line {line}: {reason}\n" in done.output
    assert f"{len(WRONG)} mistakes. Nothing was changed." in done.output
    assert find(sku) is None
    assert execute(url, "SELECT count(*) FROM products") == before


def test_everything_that_is_wrong_in_a_row_is_reported(load):
    done = load(written(["", "", "", "x", "y", "z"]))
    assert done.output.count("line 2: ") == 5


@pytest.mark.parametrize("price", ["-1", "1,50", "1e3", "NaN", "Infinity", "10000000000", "1.",
                                   ".5", "0x1", "£1", "١"])
def test_a_price_is_an_amount_as_the_api_has_it(load, price):
    done = load(written(["S", "Tea", "", price, "0", ""]))
    assert "line 2: price is not an amount" in done.output


@pytest.mark.parametrize("stock", ["1.5", "2147483648", "99999999999", "many", "1e3", "+1"])
def test_a_stock_is_a_whole_number(load, stock):
    done = load(written(["S", "Tea", "", "1", stock, ""]))
    assert "line 2: stock is not a whole number" in done.output


def test_the_largest_values_are_taken(load, find):
    sku = unique("S" * 40)
    sku += "x" * (64 - len(sku))
    row = [sku, "n" * 200, "d" * 10_000, "9999999999.99", "2147483647", ""]
    assert load(written(row)).output == "1 created, 0 changed.\n"
    product = find(sku)
    assert [product[name] for name in ("sku", "name", "description", "price")] == row[:4]
    assert product["stock"] == 2147483647


def test_a_sku_stands_in_a_file_once(load):
    done = load(written(["S", "A", "", "1", "0", ""], [" S ", "B", "", "1", "", ""]))
    for line in (2, 3):
        assert f"line {line}: sku stands in the file twice" in done.output


def test_rows_of_another_length_are_all_reported(load):
    done = load("sku,name,price\nS1,Tea\nS2,Tea,1\nS3,Tea,1,2\n,Tea,1\n")
    assert done.exit_code == 1
    for line in ("line 2: 2 cells, where the header has 3", "line 4: 4 cells, where the header has",
                 "line 5: sku is missing", "3 mistakes. Nothing was changed."):
        assert line in done.output


@pytest.mark.parametrize(("header", "said"), [
    ("name,price", "Missing columns: sku."), ("sku", "Missing columns: name, price."),
    ("", "Missing columns: name, price, sku."), ("sku,name,price,sku", "twice"),
    ("sku,name,price,colour", "Unknown columns: colour"), ("sku;name;price", "Unknown columns"),
])
def test_a_header_names_known_columns_once_and_the_needed_ones(load, header, said):
    done = load(f"{header}\n")
    assert (done.exit_code, said in done.output) == (1, True), done.output


def test_a_header_may_have_any_order_letter_case_and_spaces(load, find):
    sku = unique("ANY")
    assert load(f" Price , NAME,Sku \n3,Tea,{sku}\n").exit_code == 0
    assert find(sku)["price"] == "3.00"


def test_a_header_alone_and_empty_lines_are_nothing(load):
    assert load("sku,name,price").output == "0 created, 0 changed.\n"
    assert load("sku,name,price\r\n\r\n\n").output == "0 created, 0 changed.\n"


@pytest.mark.parametrize("text", [
    'The "best"', "a, b; c", "two\nlines", "two\r\nlines", "tab\there", "\\N", "\\.", "naïve ☕",
    "a\n\n\nb", "'quoted'", "%s %(x)s", "=1+1", "\\x41",
])
def test_a_description_arrives_as_it_was_written(load, find, text):
    sku = unique("TEXT")
    assert load(written([sku, "Tea", text, "1", "0", ""])).exit_code == 0
    assert find(sku)["description"] == text


@pytest.mark.parametrize("content", [
    codecs.BOM_UTF8 + b"sku,name,price\nBOM1,Tea,1\n",
    codecs.BOM_UTF8 + b'"sku","name","price"\r\n"BOM1","Tea","1"\r\n',
])
def test_a_byte_order_mark_is_no_part_of_the_header(load, find, content):
    assert load(content).exit_code == 0
    assert find("BOM1")["name"] == "Tea"


@pytest.mark.parametrize("content", [
    b"sku,name,price\nS,T\xe9,1\n", b'sku,name,price\nS,"Tea,1\n', b"sku,name,price\nS,a\0b,1\n",
    "sku,name,price\nS,Tea,1\n".encode("utf-16"), b'sku,name,price\nS,"a"b,1\n',
    b"sku,name,price\nS," + b"x" * 200_000 + b",1\n",
])
def test_what_is_no_csv_in_utf8_is_one_clear_line(load, content):
    done = load(content)
    assert done.exit_code == 1
    assert "line " in done.output or "columns" in done.output
    assert "Traceback" not in done.output


def test_columns_that_a_file_lacks_stay_as_they_are(load, find, food):
    sku = unique("KEPT")
    load(written([sku, "Tea", "Fine", "1", "9", food["name"]]))
    load(f"sku,name,price\n{sku},Black tea,2\n")
    product = find(sku)
    assert (product["name"], product["price"]) == ("Black tea", "2.00")
    assert (product["description"], product["stock"], product["category_id"]) == (
        "Fine", 9, food["id"])
    load(f"sku,name,price,description,category\n{sku},Black tea,2,,\n")
    product = find(sku)
    assert (product["description"], product["stock"], product["category_id"]) == ("", 9, None)


def test_the_sku_of_a_retired_product_makes_a_new_one(load, find, client, admin):
    sku = unique("GONE")
    load(f"sku,name,price,stock\n{sku},Tea,1,5\n")
    old = find(sku)
    client.post("transactions", token=admin.token,
                json={"items": [{"product_id": old["id"], "quantity": 1}]})
    client.delete(f"products/{old['id']}", token=admin.token)
    assert load(f"sku,name,price\n{sku},Tea,1\n").output == "1 created, 0 changed.\n"
    assert find(sku)["id"] != old["id"]
    assert client.get(f"products/{old['id']}").status_code == 404


def test_what_is_exported_imports_as_it_was(load, export, url, client, admin, food):
    for text in ('The "best", \\N', "two\nlines\r\nthree", "\\.", "☕"):
        client.post("products", token=admin.token, json={
            "sku": unique("TRIP "), "name": text.split("\n")[0], "description": text,
            "price": "0.10", "stock": 3, "category_id": food["id"]})
    def stored():
        return execute(url, "SELECT id, sku, name, description, price, stock, category_id "
                            "FROM products WHERE retired_at IS NULL ORDER BY id")
    before, file = stored(), export()
    rows = list(csv.DictReader(io.StringIO(file.decode(), newline=""), strict=True))
    assert list(rows[0]) == COLUMNS
    assert len(rows) == len(before)
    assert load(file).output == f"0 created, {len(rows)} changed.\n"
    assert stored() == before
    assert export() == file


def test_an_export_tells_of_products_that_no_import_could_find(load, export, app, client, admin):
    name = unique("Nameless ")
    path = client.post("products", token=admin.token,
                       json={"name": name, "price": 1}).headers["Location"]
    try:
        done = app.test_cli_runner().invoke(args=["products", "export"])
        assert name not in done.stdout
        assert done.stderr == "1 without a SKU left out.\n"
        assert load(export()).exit_code == 0
    finally:
        client.delete(path, token=admin.token)


def test_after_an_import_no_list_and_no_product_is_stale(load, find, client, food):
    sku = unique("STALE")
    load(written([sku, "Tea", "", "1", "5", food["name"]]))
    paths = [f"products/{find(sku)['id']}", "products", f"products?category_id={food['id']}",
             f"products?search={sku}", "categories", f"categories/{food['id']}",
             f"products?search={sku}&count=estimated", f"products?in_stock=true&search={sku}"]
    def read():
        return [client.get(path).data for path in paths]
    before = read()
    assert read() == before
    load(f"sku,name,price,category\n{sku},Coffee,2,\n")
    for path, old, new in zip(paths, before, read(), strict=True):
        assert new != old or "count" in path, path
    assert client.get(paths[0]).json["name"] == "Coffee"


def test_a_dry_run_leaves_the_cache_alone(load, client):
    client.get("products?limit=3")
    assert client.get("products?limit=3").headers["X-Cache"] == "hit"
    load(f"sku,name,price\n{unique('DRY')},Tea,1\n", "--dry-run")
    assert client.get("products?limit=3").headers["X-Cache"] == "hit"


def test_sales_during_an_import_never_fail(load, find, client, admin):
    """A file names products in any order; sales lock them in one."""
    skus = [unique("LOCK") for _ in range(30)]
    rows = [[sku, "Tea", "1"] for sku in skus]
    load(written(*([*row, "100000"] for row in rows), columns=["sku", "name", "price", "stock"]))
    items = [{"product_id": find(sku)["id"], "quantity": 1} for sku in skus]
    done, sold = threading.Event(), []
    def buy():
        while not done.is_set():
            sold.append(client.post("transactions", token=admin.token,
                                    json={"items": items}).status_code)
    with ThreadPoolExecutor(3) as pool:
        buyers = [pool.submit(buy) for _ in range(3)]
        try:
            for _ in range(25):
                again = load(written(*rows[::-1], columns=["sku", "name", "price"]))
                assert again.exit_code == 0, again.exception
        finally:
            done.set()
        for buyer in buyers:
            buyer.result()
    assert set(sold) == {201}
    assert find(skus[0])["stock"] == 100_000 - len(sold)
