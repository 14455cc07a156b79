"""Backup and restore: what was there is there again, exactly, or nothing is."""
import os
import stat

import psycopg
import pytest

import db
from db import backup
from tests.conftest import as_role, execute, migrations, register, unique

SIZES = ["--users", "30", "--products", "40", "--transactions", "500"]
TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"


@pytest.fixture(scope="module")
def flask(make_app):
    """A function that runs a flask command on a database."""
    def run(database, *args):
        runner = make_app(DATABASE_URL=database, REDIS_PREFIX=unique("backup")).test_cli_runner()
        return runner.invoke(args=list(args))
    return run


@pytest.fixture(scope="module")
def shop(flask, make_database):
    """A shop with sales, sealed days among them, and refunds."""
    database = make_database()
    assert flask(database, "db", "seed", *SIZES).exit_code == 0
    with psycopg.connect(database) as conn:
        for sale in range(50, 501, 50):
            db.load("transactions").refund(conn, id=sale)
    return database


@pytest.fixture(scope="module")
def file(flask, shop, tmp_path_factory):
    file = tmp_path_factory.mktemp("backup") / "shop backup.dump"
    done = flask(shop, "db", "backup", str(file))
    assert done.exit_code == 0, done.output
    assert done.output == f"{file}: {file.stat().st_size:,} bytes.\n"
    return file


def contents(database):
    """Every row of every table, and where numbers go on."""
    tables = [name for name, in execute(database, TABLES)]
    rows = {name: execute(database, f"SELECT t::text FROM {name} t ORDER BY 1") for name in tables}
    return rows, execute(database, "SELECT sequencename, last_value FROM pg_sequences ORDER BY 1")


def test_what_is_restored_is_what_was_there(flask, shop, file, make_database):
    database = make_database(empty=True)
    done = flask(database, "db", "restore", str(file))
    assert done.exit_code == 0, done.output
    assert done.output.startswith("Restored.")
    assert done.output.count(": ok\n") == 5
    before, after = contents(shop), contents(database)
    assert after == before
    assert len(before[0]["transactions"]) == 500
    assert flask(database, "db", "status").exit_code == 0


def test_a_restored_shop_goes_on(flask, file, make_app, make_client, make_database):
    database = make_database(empty=True)
    flask(database, "db", "restore", str(file))
    assert flask(database, "db", "grant", "shopfront_test_api").exit_code == 0
    client = make_client(make_app(DATABASE_URL=as_role(database), CACHE_TYPE="NullCache"))
    buyer = register(client)
    answer = client.post("transactions", token=buyer.token,
                         json={"items": [{"product_id": 1, "quantity": 1}]})
    assert answer.status_code == 201, answer.text
    assert flask(database, "db", "check").exit_code == 0


def test_a_filled_database_is_refused(flask, file, make_database):
    database = make_database()
    done = flask(database, "db", "restore", str(file))
    assert done.exit_code == 1
    assert done.stderr == (
        "Error: The database is not empty. Make a new one, and name that.\n")
    assert execute(database, "SELECT id FROM users") == []


def test_a_broken_file_leaves_nothing_behind(flask, file, make_database, tmp_path):
    short = tmp_path / "short.dump"
    short.write_bytes(file.read_bytes()[:-2000])
    database = make_database(empty=True)
    done = flask(database, "db", "restore", str(short))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: pg_restore: error:")
    assert execute(database, TABLES) == []


def test_a_role_that_may_make_no_tables_is_told_so(flask, file, make_database):
    database = make_database(empty=True)
    done = flask(as_role(database), "db", "restore", str(file))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ERROR:  permission denied")
    assert execute(database, TABLES) == []


@pytest.mark.parametrize("program", ["pg_restore", "psql"])
def test_a_restore_that_is_killed_is_not_called_one(flask, file, make_database, monkeypatch,
                                                    tmp_path, program):
    find, killed = backup._find, tmp_path / program
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(backup, "_find",
                        lambda name: str(killed) if name == program else find(name))
    database = make_database(empty=True)
    done = flask(database, "db", "restore", str(file))
    assert (done.exit_code, done.stderr) == (1, f"Error: {program} failed.\n")
    assert execute(database, TABLES) == []


def test_a_backup_is_for_its_owner_only(file):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_backup_that_fails_leaves_the_old_one(flask, tmp_path):
    file = tmp_path / "old.dump"
    file.write_bytes(b"old")
    done = flask(f"postgresql:///shop?host={tmp_path}", "db", "backup", str(file))
    assert (done.exit_code, os.listdir(tmp_path)) == (1, ["old.dump"])
    assert file.read_bytes() == b"old"


def test_a_folder_that_is_not_there_is_one_sentence(flask, shop, tmp_path):
    done = flask(shop, "db", "backup", str(tmp_path / "nowhere/shop.dump"))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: [Errno 2] No such file or directory")


def test_a_backup_of_an_older_release_wants_an_upgrade(flask, shop, make_database, tmp_path):
    old, new = make_database(), make_database(empty=True)
    migrations.downgrade(old)
    file = str(tmp_path / "old.dump")
    assert flask(old, "db", "backup", file).exit_code == 0
    done = flask(new, "db", "restore", file)
    assert done.exit_code == 0
    assert done.output.endswith(
        "It is of an older release: `flask db upgrade`, then `flask db check`.\n")
    assert flask(new, "db", "upgrade").exit_code == 0
    assert flask(new, "db", "check").exit_code == 0
