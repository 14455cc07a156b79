"""What the database keeps beside its rows is exact, whoever writes at once; and can be checked."""
import random
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from tests.conftest import execute, unique

KEPT = """SELECT category_id, sum(products)::int FROM product_counts GROUP BY 1
          HAVING sum(products) <> 0 ORDER BY 1"""
COUNTED = """SELECT category_id, count(*)::int FROM products WHERE retired_at IS NULL
             GROUP BY 1 ORDER BY 1"""


def run(app, *words):
    return app.test_cli_runner().invoke(args=words)


@pytest.fixture
def shop(make_database, make_app, make_client, tmp_path):
    """A client of a shop of its own, as its admin, with a few categories and products."""
    url = make_database()
    app = make_app(DATABASE_URL=url)
    shop = make_client(app)
    assert run(app, "db", "seed", "--users", "3", "--products", "60",
               "--transactions", "50").exit_code == 0
    shop.url, shop.file = url, tmp_path / "products.csv"
    shop.token = shop.post("auth/login", json={
        "email": "admin@example.com", "password": "password123"}).json["token"]
    return shop


def test_counts_stay_exact_under_parallel_writers(shop):
    """Creations, moves, retirements, deletions, sales and imports, all at once; none is refused."""
    def work(seed):
        dice = random.Random(seed)
        for number in range(12):
            pick, category = dice.randrange(1, 61), dice.choice([None, *range(1, 6)])
            made = shop.post("products", token=shop.token, json={
                "name": "x", "price": 1, "category_id": category, "stock": 9}).json
            answers = [
                shop.patch(f"products/{pick}", token=shop.token, json={"category_id": category}),
                shop.post("transactions", token=shop.token, json={
                    "items": [{"product_id": made["id"], "quantity": 1}]}),
                shop.delete(f"products/{made['id'] if number % 2 else pick}", token=shop.token),
            ]
            assert {answer.status_code for answer in answers} <= {200, 201, 204, 404}
            if number % 4 == 0:
                execute(shop.url, "SELECT fold_product_counts()")
    def bring(_):
        rows = [f"S{n},n,1,{random.choice(['Kitchen', 'Tools', 'Books'])}" for n in range(40)]
        random.shuffle(rows)
        shop.file.write_text("sku,name,price,category\n" + "\n".join(rows))
        assert run(shop.app, "products", "import", str(shop.file)).exit_code == 0
    with ThreadPoolExecutor(5) as pool:
        workers = [pool.submit(work, seed) for seed in range(4)]
        for turn in range(6):
            bring(turn)
        for worker in workers:
            worker.result()
    assert execute(shop.url, KEPT) == execute(shop.url, COUNTED)
    total = shop.get("products?limit=1").json["pagination"]["total"]
    assert total == sum(count for _, count in execute(shop.url, COUNTED))
    assert run(shop.app, "db", "check").exit_code == 0


def test_no_writer_waits_for_another_of_its_category(shop):
    with psycopg.connect(shop.url) as first:
        first.execute("INSERT INTO products (name, price, category_id) VALUES ('x', 1, 1)")
        second = shop.post("products", token=shop.token,
                           json={"name": unique("y"), "price": 1, "category_id": 1})
        assert second.status_code == 201
        kept = shop.get("categories/1").json["product_count"]
        first.commit()
    execute(shop.url, "SELECT fold_product_counts()")
    assert dict(execute(shop.url, KEPT))[1] == kept + 1


@pytest.mark.parametrize(("ruin", "said"), [
    ("INSERT INTO product_counts VALUES (1, 1)", "category 1"),
    ("UPDATE products SET sold = false WHERE id = (SELECT max(product_id) FROM transaction_items)",
     "product "),
    ("UPDATE transactions SET total = total + 0.01 WHERE id = 7", "sale 7"),
    ("UPDATE transaction_items SET created_at = now() WHERE transaction_id = 9", "sale 9"),
    ("UPDATE sales_days SET amount = amount - 1 WHERE day = (SELECT min(day) FROM sales_days)",
     "day "),
    ("DELETE FROM sales_product_months WHERE month = (SELECT max(month) FROM sales_product_months)",
     "month "),
], ids=lambda value: value[:24])
def test_the_check_says_what_differs(shop, ruin, said):
    assert run(shop.app, "db", "check").output.count(": ok") == 5
    execute(shop.url, ruin)
    result = run(shop.app, "db", "check")
    assert result.exit_code == 1
    assert f"  {said}" in result.output
