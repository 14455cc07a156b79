"""A shop goes back to the moment before a mistake, by a base backup and PostgreSQL's own log."""
import time

import pytest

from db import migrations
from db.seed import PASSWORD, seed
from tests.cluster.parts import Node, Postgres, flask
from tests.conftest import ROOT, execute
from tests.faults import until

pytestmark = pytest.mark.long


@pytest.fixture
def archive(place):
    folder = place / "archive"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def primary(place, parts, archive):
    """A demo shop's PostgreSQL, which archives its log."""
    server = parts(Postgres(place / "primary"))
    server.settings = Postgres.settings | {
        "archive_mode": "on", "archive_command": f"cp %p {archive}/%f"}
    server.create()
    migrations.upgrade(server.url)
    seed(server.url, {"users": 10, "products": 50, "transactions": 2000})
    return server


def books(server):
    return execute(server.url, "SELECT max(id), count(*), sum(total) FROM transactions")


def sell(node, times):
    token = node.call("POST", "auth/login", json={
        "email": "user1@example.com", "password": PASSWORD}).json()["token"]
    product = node.call("GET", "products?in_stock=true&limit=1").json()["data"][0]["id"]
    for _ in range(times):
        item = {"product_id": product, "quantity": 1}
        answer = node.call("POST", "transactions", token=token, json={"items": [item]})
        assert answer.status == 201, answer.body


def lose_every_sale(server):
    execute(server.url, "DELETE FROM transaction_items")
    execute(server.url, "DELETE FROM transactions")
    assert books(server)[0][1] == 0
    (last,), = execute(server.url, "SELECT pg_walfile_name(pg_switch_wal())")
    until(lambda: execute(server.url, "SELECT last_archived_wal FROM pg_stat_archiver")[0][0]
          >= last, 20)
    server.kill()


def test_a_shop_goes_back_to_the_moment_before_a_mistake(primary, archive, place, parts, tell):
    other = parts(Postgres(place / "other"))
    other.do("pg_basebackup", "-D", other.data, "-d", primary.url, "-c", "fast", "--no-sync")
    node = parts(Node({"DATABASE_URL": primary.url, "REDIS_URL": "redis://127.0.0.1:1"}))
    node.start()
    node.server.wait()
    sell(node, 20)  # which only the log has
    sold = books(primary)
    (moment,), = execute(primary.url, "SELECT now()::text")
    node.stop()
    lose_every_sale(primary)

    began = time.monotonic()
    (other.data / "recovery.signal").touch()
    with open(other.data / "postgresql.auto.conf", "a") as file:
        file.write(f"restore_command = 'cp {archive}/%f %p'\n"
                   f"recovery_target_time = '{moment}'\nrecovery_target_action = 'promote'\n")
    other.start()
    until(lambda: execute(other.url, "SELECT NOT pg_is_in_recovery()")[0][0], 60)
    tell("seconds until the shop of that moment takes writes", time.monotonic() - began)
    assert books(other) == sold
    flask(ROOT, "db", "check", **node.env | {"DATABASE_URL": other.url})
