"""``flask reports``: what the API's reports say, on the command line."""
import pytest

from db.seed import PASSWORD, seed
from tests.conftest import Client

FROM, TO = "2020-01-01", "2100-01-01"


@pytest.fixture(scope="module")
def shop(make_database, make_app):
    """A seeded shop, ``call(*args)`` of its command line, ``get(path)`` of its API."""
    url = make_database()
    seed(url, {"users": 5, "products": 60, "transactions": 300})

    class Shop:
        app = make_app(DATABASE_URL=url)
        client = Client(app)
        token = client.post("auth/login", json={"email": "admin@example.com",
                                                "password": PASSWORD}).json["token"]

        def run(self, *args):
            return self.app.test_cli_runner().invoke(args=["reports", *args])

        def call(self, *args):
            done = self.run(*args)
            assert done.exit_code == 0, done.output
            return done

        def get(self, name, **query):
            return self.client.get(f"reports/{name}", token=self.token, query_string={
                "start_date": FROM, "end_date": TO} | query)
    return Shop()


@pytest.mark.parametrize("kind", ["csv", "json", "ndjson"])
def test_a_report_is_the_api_s_byte_for_byte(shop, kind):
    done = shop.call("transactions", "--from", FROM, "--to", TO, "--format", kind)
    assert len(done.stdout_bytes) > 10_000
    assert done.stdout_bytes == shop.get("transactions", format=kind).data


def test_a_report_is_csv_unless_told_otherwise(shop):
    done = shop.call("transactions", "--from", FROM, "--to", "2020-01-02")
    assert done.stdout_bytes.startswith(b"transaction_id,")
    assert done.stdout_bytes.count(b"\n") == 1


@pytest.mark.parametrize("group_by", ["day", "week", "month", "category", "product"])
def test_sums_are_the_api_s_as_a_table(shop, group_by):
    report = shop.get("sales", group_by=group_by).json
    head, *lines = shop.call("sales", "--from", FROM, "--to", TO,
                             "--group-by", group_by).stdout.splitlines()
    assert head.split() == [group_by, "orders", "items", "amount"]
    rows = [line.rsplit(maxsplit=3) for line in lines]
    assert [[label.strip(), *(number.replace(",", "") for number in numbers)]
            for label, *numbers in rows] == [
        [group["label"], str(group["orders"]), str(group["items"]), group["amount"]]
        for group in (*report["data"], report["total"] | {"label": "total"})]
    assert len({len(line) for line in [head, *lines]}) == 1


def test_sums_of_nothing_are_a_total_of_zero(shop):
    done = shop.call("sales", "--from", "1990-01-01", "--to", "1990-01-02")
    assert done.stdout.splitlines()[1:] == [
        "total           0           0              0.00"]


@pytest.mark.parametrize("window", [
    (), ("--from", FROM), ("--from", "x", "--to", TO), ("--from", FROM, "--to", "infinity"),
    ("--from", TO, "--to", FROM), ("--from", FROM, "--to", FROM),
])
@pytest.mark.parametrize("name", ["transactions", "sales"])
def test_a_window_that_is_none_is_one_clear_line(shop, name, window):
    done = shop.run(name, *window)
    assert done.exit_code == 2
    assert "Error: " in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("group_by", ["day", "month", "category", "product"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_sums_can_be_drawn(shop, tmp_path, group_by, suffix):
    pytest.importorskip("matplotlib")
    image = tmp_path / f"sales.{suffix}"
    done = shop.call("sales", "--from", FROM, "--to", TO, "--group-by", group_by,
                     "--plot", str(image))
    assert done.stdout.endswith(f"Drawn: {image}\n")
    start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
    assert image.read_bytes().startswith(start)


def test_nothing_can_be_drawn_too(shop, tmp_path):
    pytest.importorskip("matplotlib")
    for group_by in ("month", "category"):
        shop.call("sales", "--from", "1990-01-01", "--to", "1990-01-02", "--group-by", group_by,
                  "--plot", str(tmp_path / "nothing.png"))


def test_what_can_not_be_drawn_is_one_clear_line(shop, tmp_path):
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "sales.xyz", tmp_path / "nowhere" / "sales.png"):
        done = shop.run("sales", "--from", FROM, "--to", TO, "--plot", str(path))
        assert done.exit_code in (1, 2)
        assert "Error: " in done.stderr
