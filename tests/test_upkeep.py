"""What has expired is tidied away, and nothing else."""
import pytest

from extensions.behind.upkeep import tidy
from tests.conftest import Client, execute, register


@pytest.fixture(scope="module")
def shop(make_app, make_database):
    """An app of its own with ``sql(text)`` and a registered person."""
    url = make_database()

    class Shop:
        app = make_app(DATABASE_URL=url)
        client = Client(app)

        def sql(self, text):
            return execute(url, text)

        def names(self, table, column):
            return {row[0] for row in self.sql(f"SELECT {column} FROM {table}")}
    shop = Shop()
    shop.person = register(shop.client)
    return shop


def add(shop, table, columns, *rows):
    """Insert rows of SQL expressions."""
    shop.sql(f"INSERT INTO {table} ({columns}) VALUES {', '.join(f'({row})' for row in rows)}")


def test_keys_are_forgotten_after_a_day(shop):
    add(shop, "idempotency_keys", "user_id, key, request_hash, status, body, created_at", *(
        f"{shop.person.id}, '{age}', '', 201, '', now() - interval '{age}'"
        for age in ("1 second", "23 hours 59 minutes", "24 hours 1 second", "30 days")))
    tidy(shop.app)
    assert shop.names("idempotency_keys", "key") == {"1 second", "23 hours 59 minutes"}


def test_sessions_go_when_they_expire_and_open_ones_stay(shop):
    add(shop, "sessions", "user_id, address, expires_at", *(
        f"{shop.person.id}, '{when}', now() + interval '{when}'"
        for when in ("-1 second", "-30 days", "1 minute", "7 days")))
    tidy(shop.app)
    assert shop.names("sessions", "address") == {"127.0.0.1", "1 minute", "7 days"}
    assert shop.client.get("users/me", token=shop.person.token).status_code == 200


def test_failed_logins_are_forgotten_after_a_day(shop):
    add(shop, "login_failures", "account, address, failures, blocked_until, last_at", *(
        f"'', '{age}', 9, now() - interval '{age}', now() - interval '{age}'"
        for age in ("1 second", "23 hours 59 minutes", "24 hours 1 second", "30 days")))
    tidy(shop.app)
    assert shop.names("login_failures", "address") == {"1 second", "23 hours 59 minutes"}


def test_links_go_when_they_expire(shop):
    shop.sql("DELETE FROM mail_tokens")
    add(shop, "mail_tokens", "token_hash, user_id, purpose, email, expires_at", *(
        f"'{when}'::text::bytea, {shop.person.id}, 'reset', '{when}', now() + interval '{when}'"
        for when in ("-1 second", "-30 days", "1 minute", "1 day")))
    tidy(shop.app)
    assert shop.names("mail_tokens", "email") == {"1 minute", "1 day"}


def test_mails_that_nobody_took_are_given_up_after_three_days(shop):
    add(shop, "mails", "purpose, email, due_at, created_at", *(
        f"'reset', '{age}', now() + interval '1 hour', now() - interval '{age}'"
        for age in ("1 second", "71 hours 59 minutes", "72 hours 1 second", "30 days")))
    tidy(shop.app)
    assert {"1 second", "71 hours 59 minutes"} <= shop.names("mails", "email")
    assert not {"72 hours 1 second", "30 days"} & shop.names("mails", "email")


def test_what_somebody_is_at_is_left_for_the_next_time(shop, make_app):
    """Two at once neither wait for each other nor fail."""
    add(shop, "idempotency_keys", "user_id, key, request_hash, status, body, created_at", *(
        f"{shop.person.id}, '{n} old', '', 201, '', now() - interval '2 days'" for n in range(3)))
    with shop.app.extensions["db"].connection() as conn:
        conn.execute("SELECT FROM idempotency_keys WHERE key = '1 old' FOR UPDATE")
        tidy(shop.app)
        assert {key for key in shop.names("idempotency_keys", "key") if "old" in key} == {"1 old"}
    tidy(shop.app)
    assert not {key for key in shop.names("idempotency_keys", "key") if "old" in key}


def test_a_long_neglected_shop_is_tidied_bit_by_bit(shop):
    shop.sql(f"""INSERT INTO idempotency_keys (user_id, key, request_hash, status, body, created_at)
        SELECT {shop.person.id}, 'bulk ' || n, '', 201, '', now() - interval '2 days'
        FROM generate_series(1, 2500) n""")
    left = []
    for _ in range(3):
        tidy(shop.app)
        left += shop.sql("SELECT count(*) FROM idempotency_keys WHERE key LIKE 'bulk %'")[0]
    assert left == [1500, 500, 0]


def test_days_that_are_over_are_sealed(shop):
    shop.sql("UPDATE sales_sealed SET until = '1970-01-01'")
    tidy(shop.app)
    assert shop.sql("SELECT until >= (now() AT TIME ZONE 'UTC')::date - 1 FROM sales_sealed") == [
        (True,)]
