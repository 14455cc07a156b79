"""The oldest PostgreSQL that the shop says it runs on."""
import pathlib

import pytest

from db.seed import PASSWORD
from tests.cluster.parts import DATABASE, Node, Postgres, flask
from tests.conftest import ROOT, execute

pytestmark = pytest.mark.long
PROGRAMS = pathlib.Path("/usr/lib/postgresql/15/bin")
SIZES = ["--users", "5", "--products", "50", "--transactions", "500"]
PATHS = ["products?search=tea&sort=relevance", "products?in_stock=false", "users/me",
         "reports/sales?start_date=2020-01-01&end_date=2100-01-01"]


class Older(Postgres):
    """Debian 12's."""

    @property
    def programs(self):
        if not PROGRAMS.exists():
            pytest.skip("PostgreSQL 15 is not installed; tests/cluster/install does that.")
        return PROGRAMS

    def create(self):
        self.do("initdb", "-D", self.data, "-U", DATABASE, "-A", "trust", "-E", "UTF8",
                "--locale=C.UTF-8", "--no-sync", "--no-instructions")
        with open(self.data / "postgresql.conf", "a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in self.settings.items())
        self.start()
        for name in (DATABASE, "restored"):
            execute(self.at("postgres"), f"CREATE DATABASE {name}")


def test_a_shop_on_the_oldest_postgresql_sells_and_comes_back(place, parts, redis_url, tmp_path):
    server = parts(Older(place / "older"))
    server.create()
    node = parts(Node({"DATABASE_URL": server.url, "REDIS_URL": redis_url}))
    restored = node.env | {"DATABASE_URL": server.at("restored")}
    flask(ROOT, "db", "upgrade", **node.env)
    flask(ROOT, "db", "seed", "--force", *SIZES, **node.env)
    node.start()
    node.wait()
    token = node.call("POST", "auth/login", json={
        "email": "admin@example.com", "password": PASSWORD}).json()["token"]
    for path in PATHS:
        assert node.call("GET", path, token=token).status == 200, path
    sale = {"items": [{"product_id": 1, "quantity": 1}]}
    assert node.call("POST", "transactions", token=token, json=sale).status == 201
    flask(ROOT, "db", "backup", str(tmp_path / "shop.dump"), **node.env)
    flask(ROOT, "db", "restore", str(tmp_path / "shop.dump"), **restored)  # and checks it
    assert execute(server.at("restored"), "SELECT count(*) FROM transactions") == [(501,)]
