"""The command line: what fills and empties a shop, and what an operator does without the API."""
import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import click
import psycopg
import pytest
from click.testing import CliRunner

from db import migrations
from db import seed as seeds
from tests.conftest import PASSWORD, ROOT, Client, execute, unique

SIZES = {"users": 25, "products": 30, "transactions": 205}
COUNTS = """
SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM products),
       (SELECT count(*) FROM transactions)
"""


@pytest.fixture(scope="module")
def make_shop(make_app, make_database):
    """A function that gives a shop of its own: run(…) runs a command, client calls its API."""
    def make(database_url=None, **overrides):
        url = database_url or make_database()
        app = make_app(DATABASE_URL=url, **overrides)
        return SimpleNamespace(
            app=app, url=url, client=Client(app), counts=lambda: execute(url, COUNTS)[0],
            run=lambda *args, **kwargs: app.test_cli_runner().invoke(args=args, **kwargs),
        )
    return make


@pytest.fixture
def shop(make_shop):
    return make_shop()


@pytest.fixture(scope="module")
def small_blocks():
    """Blocks so small that a test's seed takes several of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeds, "BLOCK", {"users": 10, "products": 10, "transactions": 100})
        yield


@pytest.fixture(scope="module")
def seeded(make_shop, small_blocks):
    shop = make_shop()
    shop.output = succeed(seed(shop, **SIZES))
    return shop


@pytest.fixture(scope="module")
def run(app):
    """Runs a command on the shop of ``client``."""
    return lambda *args, **kwargs: app.test_cli_runner().invoke(args=args, **kwargs)


def seed(shop, *flags, **sizes):
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    return shop.run("db", "seed", *options, *flags)


def succeed(done):
    assert done.exit_code == 0, done.output
    return done.stdout


def refuse(done):
    """The one clear line of a command that refuses."""
    assert done.exit_code == 1, done.output
    line, = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def login(client, email, password=PASSWORD):
    response = client.post("auth/login", json={"email": email, "password": password})
    return response.json.get("token") if response.status_code == 200 else None


# The help

def walk(command, words):
    """(words, command) of a command, and of every one below it."""
    yield words, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, [*words, word])


def test_every_help_ends_with_an_example_that_parses(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("products.csv", "shop.dump"):
        (tmp_path / file).touch()
    theirs = {"openapi"}  # flask-smorest's
    for group in app.cli.commands.keys() - theirs:
        for words, command in walk(app.cli.commands[group], ["flask", group]):
            told = command.get_help(click.Context(command, info_name=" ".join(words)))
            kind, _, example = told.splitlines()[-1].strip().partition(" ")
            assert kind == "Example:", words
            typed = shlex.split(example.partition(" > ")[0])
            assert typed[:len(words)] == words
            command, typed = app.cli, typed[1:]
            while isinstance(command, click.Group):
                command = command.commands[typed.pop(0)]
            with CliRunner().isolation(f"{PASSWORD}\n" * 2):  # for who is asked for one
                command.make_context(command.name, typed)


# Filling a shop

@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 1, 1), (20, 30, 101), (3, 0, 5)], ids=str)
def test_a_seed_has_exactly_the_sizes_asked_for(shop, small_blocks, sizes):
    users, products, transactions = sizes
    succeed(seed(shop, users=users, products=products, transactions=transactions))
    # Beside the users there is the admin; where there are no products, there are no sales.
    assert shop.counts() == (users + 1, products, transactions if products else 0)


BOOKS = {
    "the total of a sale is the sum of its lines": """
        SELECT id FROM transactions t WHERE total IS DISTINCT FROM
            (SELECT sum(amount) FROM transaction_items WHERE transaction_id = t.id)""",
    "an amount is the price times the quantity": """
        SELECT transaction_id FROM transaction_items WHERE amount <> unit_price * quantity""",
    "lines are numbered from 1": """
        SELECT transaction_id FROM transaction_items GROUP BY 1
        HAVING min(line) <> 1 OR max(line) <> count(DISTINCT line)""",
    "a sale has each product once": """
        SELECT transaction_id FROM transaction_items GROUP BY 1
        HAVING count(DISTINCT product_id) <> count(*)""",
    "a line says what the product is": """
        SELECT i.transaction_id
        FROM transaction_items i
        LEFT JOIN products p ON p.id = i.product_id
        LEFT JOIN categories c ON c.id = p.category_id
        WHERE (product_name, unit_price, i.category_id, category_name)
              IS DISTINCT FROM (p.name, p.price, p.category_id, c.name)""",
    "a line repeats its sale": """
        SELECT t.id FROM transactions t JOIN transaction_items i ON i.transaction_id = t.id
        WHERE (i.created_at, i.user_id, i.refunded)
              IS DISTINCT FROM (t.created_at, t.user_id, t.refunded_at IS NOT NULL)""",
    "a category counts an order once": """
        SELECT transaction_id FROM transaction_items GROUP BY transaction_id, category_id
        HAVING count(*) FILTER (WHERE first_in_category) <> 1""",
    "a sold product is marked as sold, no other is": """
        SELECT id FROM products p WHERE sold IS DISTINCT FROM
            EXISTS (SELECT FROM transaction_items WHERE product_id = p.id)""",
    "somebody has bought": "SELECT id FROM transactions WHERE user_id IS NULL",
    "nothing is of tomorrow": """
        SELECT created_at FROM users WHERE created_at > now()
        UNION ALL SELECT created_at FROM products WHERE created_at > now()
        UNION ALL SELECT created_at FROM transactions WHERE created_at > now()""",
}


@pytest.mark.parametrize("rule", BOOKS)
def test_the_books_of_a_seed_are_right(seeded, rule):
    assert execute(seeded.url, BOOKS[rule]) == []


def test_a_seeded_shop_goes_on_selling(seeded):
    token = login(seeded.client, "user1@example.com", seeds.PASSWORD)
    product = seeded.client.get("products?in_stock=true").json["data"][0]
    sold = seeded.client.post("transactions", token=token, json={
        "items": [{"product_id": product["id"], "quantity": 1}]})
    assert sold.status_code == 201, sold.text
    assert sold.json["id"] == SIZES["transactions"] + 1


def test_two_seeds_make_the_same_shop(seeded, make_shop):
    twin = make_shop()
    succeed(seed(twin, **SIZES))
    names = "SELECT array_agg((sku, name, price, stock, category_id) ORDER BY id) FROM products"
    sales = "SELECT sum(amount), count(*) FROM transaction_items WHERE transaction_id <= 205"
    assert execute(twin.url, sales) == execute(seeded.url, sales)
    before_sales = names.replace("stock, ", "")
    assert execute(twin.url, before_sales) == execute(seeded.url, before_sales)


@pytest.mark.parametrize("email", ["admin@example.com", "user1@example.com", "user25@example.com"])
def test_the_password_of_a_seed_and_no_other_opens_its_accounts(seeded, email):
    assert login(seeded.client, email, "password123")
    for wrong in ("password124", "Password123", "password123 ", "password12"):
        assert login(seeded.client, email, wrong) is None


def test_the_admin_of_a_seed_is_one_and_the_users_are_not(seeded):
    roles = execute(seeded.url, "SELECT email, role FROM users WHERE email ~ '^(admin|user1)@'")
    assert dict(roles) == {"admin@example.com": "admin", "user1@example.com": "user"}
    assert execute(seeded.url, "SELECT count(*) FROM users WHERE role = 'admin'") == [(1,)]


def test_a_shop_that_is_not_empty_is_left_alone(seeded):
    before = seeded.counts()
    for flags in ([], ["--force"]):
        assert "not empty" in refuse(seed(seeded, *flags, users=1, products=1, transactions=1))
    assert seeded.counts() == before


def test_of_two_seeds_at_once_one_fills_the_shop(make_database):
    url = make_database()

    def fill(_):
        try:
            seeds.seed(url, SIZES)
        except seeds.NotEmpty:
            return "not empty"
        return "filled"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(fill, range(2))) == ["filled", "not empty"]
    assert execute(url, COUNTS) == [(26, 30, 205)]


def test_a_seed_that_breaks_leaves_the_shop_empty(make_database):
    url = make_database()

    def interrupt(name, done, size):
        if name == "transactions":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seeds.seed(url, SIZES, interrupt)
    assert execute(url, COUNTS) == [(0, 0, 0)]


def test_production_is_seeded_by_force_only(make_shop):
    shop = make_shop(APP_ENV="production")
    sizes = {"users": 1, "products": 1, "transactions": 1}
    assert "--force" in refuse(seed(shop, **sizes))
    assert shop.counts() == (0, 0, 0)
    succeed(seed(shop, "--force", **sizes))
    assert shop.counts() == (2, 1, 1)


def test_progress_is_plain_lines_where_nobody_watches(seeded):
    assert seeded.output.splitlines() == [
        "users: 10 of 25", "users: 20 of 25", "users: 25 of 25",
        "products: 10 of 30", "products: 20 of 30", "products: 30 of 30",
        "transactions: 100 of 205", "transactions: 200 of 205", "transactions: 205 of 205",
    ]


def on_a_terminal(settings, url, *words, typed=""):
    """(exit code, screen) of a flask command, whoever sits there having typed ahead."""
    terminal, end = pty.openpty()
    os.write(terminal, typed.encode())
    run = subprocess.Popen(
        [sys.executable, "-m", "flask", *words], cwd=ROOT, stdin=end, stdout=end, stderr=end,
        env=os.environ | settings | {"DATABASE_URL": url, "TERM": "xterm"},
    )
    os.close(end)
    shown = b""
    with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # EIO: the end
        while part := screen.read(1000):
            shown += part
    return run.wait(), shown.decode()


FEW = ["db", "seed", "--users", "2", "--products", "2", "--transactions", "2"]


def test_progress_is_a_bar_on_a_terminal(settings, make_database):
    code, shown = on_a_terminal(settings, make_database(), *FEW)
    assert code == 0, shown
    for name in ("users", "products", "transactions"):
        assert re.search(rf"{name} +\[#+\] +100%", shown)


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 0), ("n", 1)])
def test_on_a_terminal_a_seed_offers_to_upgrade(settings, make_database, answer, code):
    url = make_database(empty=True)
    done, shown = on_a_terminal(settings, url, *FEW, typed=f"{answer}\n")
    assert "The schema is not up to date. Upgrade it? [Y/n]" in shown
    assert done == code, shown
    made = execute(url, "SELECT to_regclass('products') IS NOT NULL")[0][0]
    assert made == (code == 0)
    assert not made or execute(url, COUNTS) == [(3, 2, 2)]


@pytest.mark.parametrize("behind", ["all", "one"])
def test_without_a_terminal_a_seed_says_what_to_run(make_shop, make_database, behind):
    shop = make_shop(make_database(empty=behind == "all"))
    if behind == "one":
        succeed(shop.run("db", "downgrade"))
    said = "The schema is not up to date: run `flask db upgrade`."
    assert refuse(shop.run(*FEW, input="y\n")) == said
    assert succeed(shop.run(*FEW, "--yes")).startswith("applying ")
    assert shop.counts() == (3, 2, 2)


# Emptying a shop

def test_reset_asks_before_it_empties_the_shop(shop):
    succeed(seed(shop, users=2, products=2, transactions=2))
    for answer in ("n\n", "\n", ""):
        done = shop.run("db", "reset", input=answer)
        assert done.exit_code == 1
        assert "Drop every table" in done.output
        assert shop.counts() == (3, 2, 2)
    assert "The shop is empty." in succeed(shop.run("db", "reset", input="y\n"))
    assert shop.counts() == (0, 0, 0)
    succeed(shop.run("db", "status"))
    succeed(seed(shop, users=1, products=1, transactions=1))


def test_reset_can_do_without_an_answer(shop):
    succeed(seed(shop, users=1, products=0, transactions=0))
    succeed(shop.run("db", "reset", "--yes"))
    assert shop.counts() == (0, 0, 0)


@pytest.mark.parametrize("flags", [[], ["--yes"]], ids=str)
def test_reset_refuses_in_production(make_shop, flags):
    shop = make_shop(APP_ENV="production")
    succeed(seed(shop, "--force", users=1, products=0, transactions=0))
    assert refuse(shop.run("db", "reset", *flags, input="y\n")) == "Not in production."
    assert shop.counts() == (2, 0, 0)


def test_no_cached_answer_outlives_a_reset_or_a_seed(shop):
    def listed():
        return [category["name"] for category in shop.client.get("categories").json["data"]]
    succeed(shop.run("db", "reset", "--yes"))
    assert listed() == []
    succeed(seed(shop, users=0, products=10, transactions=0))
    assert "Kitchen" in listed()
    succeed(shop.run("db", "reset", "--yes"))
    assert listed() == []


# The schema

def test_upgrade_and_downgrade_say_what_they_do(make_shop, make_database):
    shop = make_shop(make_database(empty=True))
    names = [f"{m.version:04d}_{m.name}" for m in migrations.files()]
    steps = [f"applying {name}" for name in names]
    assert succeed(shop.run("db", "upgrade")).splitlines() == [*steps, f"{len(names)} applied."]
    assert succeed(shop.run("db", "upgrade")) == "Nothing to do.\n"
    assert succeed(shop.run("db", "downgrade")) == f"undoing {names[-1]}\n1 undone.\n"
    back = succeed(shop.run("db", "downgrade", "--steps", "99")).splitlines()
    assert back == [*(f"undoing {name}" for name in names[-2::-1]), f"{len(names) - 1} undone."]
    assert succeed(shop.run("db", "downgrade")) == "Nothing to do.\n"


@pytest.mark.parametrize("command", [
    ["users", "list"], ["users", "promote", "a@example.com"], ["mail", "send"],
], ids=" ".join)
def test_without_a_schema_a_command_says_so(make_shop, make_database, command):
    shop = make_shop(make_database(empty=True))
    assert refuse(shop.run(*command)) == "There is no schema yet. `flask db upgrade` makes it."


@pytest.mark.parametrize("command", [
    ["db", "upgrade"], ["db", "downgrade"], ["db", "status"], ["db", "seed"],
    ["db", "reset", "--yes"], ["users", "list"], ["mail", "send"],
], ids=" ".join)
def test_without_a_database_a_command_says_so(make_shop, tmp_path, command):
    done = make_shop(f"postgresql:///shop?host={tmp_path}").run(*command)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert isinstance(done.exception, SystemExit)


# Accounts

def test_a_created_user_can_log_in(run, client):
    email = f"{unique('c')}@example.com"
    said = succeed(run("users", "create", email.upper(), "--name", "Grace Hopper",
                       "--password", PASSWORD))
    assert re.fullmatch(rf"Created user \d+, {re.escape(email)}\.\n", said)
    token = login(client, email)
    me = client.get("users/me", token=token).json
    assert (me["name"], me["role"], me["email_verified"]) == ("Grace Hopper", "user", True)


def test_an_admin_is_created_when_asked_for(run, client):
    email = f"{unique('c')}@example.com"
    succeed(run("users", "create", email, "--admin", "--password", PASSWORD))
    assert client.get("users", token=login(client, email)).status_code == 200


def test_a_password_is_asked_for_twice_and_not_shown(run, client):
    email = f"{unique('c')}@example.com"
    done = run("users", "create", email, input=f"{PASSWORD}\n{PASSWORD}\n")
    assert PASSWORD not in succeed(done)
    assert login(client, email)
    mistyped = run("users", "create", f"{unique('c')}@example.com", input=f"{PASSWORD}\nother\n")
    assert mistyped.exit_code == 1


@pytest.mark.parametrize(("password", "why"), [
    ("short", "8"), ("x" * 129, "128"), ("password123", "common"), ("PASSWORD123", "common"),
    ("{email}", "e-mail"), ("e\u0301" * 7, "8"),
])
def test_a_weak_password_is_refused(run, client, password, why):
    email = f"{unique('c')}@example.com"
    done = run("users", "create", email, "--password", password.format(email=email))
    assert why in refuse(done)
    assert "No account" in refuse(run("users", "promote", email))


@pytest.mark.parametrize("email", [
    "", "ada", "ada@", "@example.com", "a b@example.com", "ada@example.com\nBcc: b@example.com",
    f"{'a' * 300}@example.com",
], ids=range(7))
def test_a_bad_address_is_refused(run, email):
    assert refuse(run("users", "create", email, "--password", PASSWORD)).startswith("email: ")


def test_a_bad_name_is_refused(run):
    assert refuse(run("users", "create", f"{unique('c')}@example.com", "--name", "A",
                      "--password", PASSWORD)).startswith("name: ")


def test_a_taken_address_is_refused(run, user):
    assert refuse(run("users", "create", user.email.upper(), "--password", PASSWORD)) == \
        "E-mail address taken."


def test_the_list_shows_who_there_is(run, user, admin):
    lines = succeed(run("users", "list", "--limit", "1000000")).splitlines()
    line, = [line for line in lines if user.email in line]
    seen = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(rf" *{user.id}  user   {user.email} +{seen}  Ada Lovelace", line)
    admins = succeed(run("users", "list", "--role", "admin", "--limit", "1000000"))
    assert admin.email in admins
    assert user.email not in admins
    assert len(succeed(run("users", "list", "--limit", "1")).splitlines()) == 1


def test_a_promotion_and_a_demotion_count_from_the_next_request_on(run, client, user, admin):
    assert client.get("users", token=user.token).status_code == 403
    assert succeed(run("users", "promote", user.email)) == f"{user.email} is admin now.\n"
    assert client.get("users", token=user.token).status_code == 200
    succeed(run("users", "demote", user.email))
    assert client.get("users", token=user.token).status_code == 403


def test_the_last_admin_stays(shop):
    for name, flags in (("first", ["--admin"]), ("second", ["--admin"]), ("third", [])):
        succeed(shop.run("users", "create", f"{name}@example.com", *flags, "--password", PASSWORD))
    succeed(shop.run("users", "demote", "first@example.com"))
    assert refuse(shop.run("users", "demote", "second@example.com")) == \
        "This is the last administrator."
    succeed(shop.run("users", "demote", "third@example.com"))  # who is none
    assert execute(shop.url, "SELECT email FROM users WHERE role = 'admin'") == \
        [("second@example.com",)]


@pytest.mark.parametrize("command", ["promote", "demote", "password", "sessions", "revoke"])
def test_an_unknown_address_is_named(run, command):
    flags = ["--password", PASSWORD] if command == "password" else []
    assert refuse(run("users", command, "nobody@example.org", *flags)) == \
        "No account has the address nobody@example.org."


def test_a_new_password_ends_every_session(run, client, user):
    succeed(run("users", "password", user.email, "--password", "another long walk"))
    assert client.get("users/me", token=user.token).json["code"] == "token_revoked"
    assert login(client, user.email) is None
    assert login(client, user.email, "another long walk")


def test_a_weak_new_password_changes_nothing(run, client, user):
    for weak in ("short", "password123", user.email):
        refuse(run("users", "password", user.email, "--password", weak))
    assert client.get("users/me", token=user.token).status_code == 200
    assert login(client, user.email)


def test_sessions_are_listed_and_revoked_one_by_one_or_all(run, client, user):
    second = login(client, user.email)
    lines = succeed(run("users", "sessions", user.email)).splitlines()
    assert len(lines) == 2
    newest = lines[0].split()[0]
    assert succeed(run("users", "revoke", user.email, "--session", newest)) == "1 ended.\n"
    assert client.get("users/me", token=second).json["code"] == "token_revoked"
    assert client.get("users/me", token=user.token).status_code == 200
    assert succeed(run("users", "revoke", user.email)) == "1 ended.\n"
    assert client.get("users/me", token=user.token).json["code"] == "token_revoked"
    assert succeed(run("users", "sessions", user.email)) == ""


def test_another_users_session_is_not_revoked(run, client, user, other):
    theirs = succeed(run("users", "sessions", other.email)).split()[0]
    assert succeed(run("users", "revoke", user.email, "--session", theirs)) == "0 ended.\n"
    assert client.get("users/me", token=other.token).status_code == 200


# The mail queue

def queue(shop):
    succeed(shop.run("users", "create", "ada@example.com", "--password", PASSWORD))
    with psycopg.connect(shop.url) as conn:
        conn.execute("INSERT INTO mails (purpose, email) VALUES ('reset', 'ada@example.com'), "
                     "('verify', 'ada@example.com'), ('reset', 'nobody@example.com')")


def test_mail_send_empties_the_queue(shop):
    queue(shop)
    assert succeed(shop.run("mail", "send")) == "2 sent, 0 failed.\n"
    assert succeed(shop.run("mail", "send")) == "0 sent, 0 failed.\n"
    assert execute(shop.url, "SELECT count(*) FROM mails") == [(0,)]


def test_mail_send_exits_with_1_when_a_mail_stays_behind(make_shop):
    shop = make_shop(SMTP_URL="smtp://127.0.0.1:1")
    queue(shop)
    done = shop.run("mail", "send")
    assert (done.exit_code, done.stdout) == (1, "0 sent, 2 failed.\n")
    assert execute(shop.url, "SELECT count(*) FROM mails") == [(2,)]
