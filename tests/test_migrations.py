"""Migrations: applied once each by whoever comes first, refused when files and schema don't fit."""
import itertools
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from db import migrations
from tests.conftest import ROOT, execute

ALL = 1000  # more steps back than there will ever be
TABLES = """
SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'schema_migrations'
"""
SCHEMA = """
SELECT 'column', table_name, column_name,
       concat_ws(' ', ordinal_position, data_type, numeric_precision, numeric_scale, is_nullable,
                 column_default, identity_generation, generation_expression)
FROM information_schema.columns WHERE table_schema = 'public'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL
SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL
SELECT 'view', viewname, '', definition FROM pg_views WHERE schemaname = 'public'
UNION ALL
SELECT 'function', p.oid::regprocedure::text, '', p.prosrc
FROM pg_proc p
WHERE p.pronamespace = 'public'::regnamespace
  AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
UNION ALL
SELECT 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid)
FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'option', oid::regclass::text, '', reloptions::text
FROM pg_class WHERE relnamespace = 'public'::regnamespace
ORDER BY 1, 2, 3, 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The project's migrations in a folder of the test's own, which the code reads."""
    copy = tmp_path / "migrations"
    shutil.copytree(migrations.MIGRATIONS, copy)
    monkeypatch.setattr(migrations, "MIGRATIONS", copy)
    return copy


@pytest.fixture
def write(folder):
    """A function that adds a migration file and returns its path."""
    count = itertools.count(len(migrations.files()) + 1)

    def write(name, sql):
        path = folder / f"{next(count):04d}_{name}.sql"
        path.write_text(sql)
        return path

    return write


@pytest.fixture
def empty(make_database):
    return make_database(empty=True)


def versions(url):
    return [row[0] for row in execute(url, "SELECT version FROM schema_migrations ORDER BY 1")]


def refusal(url):
    with pytest.raises(migrations.MigrationError) as refused:
        migrations.upgrade(url)
    return str(refused.value)


UPGRADE = """
import pathlib, sys
from db import migrations
migrations.MIGRATIONS = pathlib.Path(sys.argv[1])
print(migrations.upgrade(sys.argv[2]))
"""


def test_ten_at_once_apply_each_once(empty, folder, write):
    write("tally", "CREATE TABLE tally (n int);\nINSERT INTO tally VALUES (1);\n")
    write("tally_index", "-- no-transaction\n"
                         "CREATE INDEX CONCURRENTLY IF NOT EXISTS tally_idx ON tally (n);\n"
                         "INSERT INTO tally VALUES (2);\n")
    write("tally_end", "INSERT INTO tally VALUES (3);\n")
    runs = [subprocess.Popen([sys.executable, "-c", UPGRADE, folder, empty], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE) for _ in range(10)]
    applied = [run.communicate()[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0] * 10
    known = len(migrations.files())
    assert sum(map(int, applied)) == known
    assert versions(empty) == list(range(1, known + 1))
    assert execute(empty, "SELECT n FROM tally ORDER BY n") == [(1,), (2,), (3,)]
    assert execute(empty, "SELECT indisvalid FROM pg_index "
                          "WHERE indexrelid = 'tally_idx'::regclass") == [(True,)]


def test_down_and_up_again_gives_the_same_schema(make_database):
    database = make_database()
    before = execute(database, SCHEMA)
    known = len(migrations.files())
    assert migrations.downgrade(database, ALL) == known
    assert execute(database, TABLES) == []
    assert execute(database, "SELECT viewname FROM pg_views WHERE schemaname = 'public'") == []
    assert migrations.upgrade(database) == known
    assert execute(database, SCHEMA) == before
    assert len(before) > 100


def test_downgrade_takes_the_last_steps_back_only(empty, write):
    write("first", "CREATE TABLE first ();\n\n-- down\nDROP TABLE first;\n")
    write("second", "CREATE TABLE second ();\n\n-- down\nDROP TABLE second;\n")
    said = []
    known = migrations.upgrade(empty)
    assert migrations.downgrade(empty, 1, said.append) == 1
    assert said == [f"undoing {known:04d}_second"]
    assert versions(empty) == list(range(1, known))
    assert migrations.upgrade(empty) == 1


def test_a_migration_without_a_way_back_stays(empty, write):
    path = write("one_way", "CREATE TABLE one_way ();\n")
    migrations.upgrade(empty)
    with pytest.raises(migrations.MigrationError, match=f"{path.stem} has no way back"):
        migrations.downgrade(empty)
    assert len(versions(empty)) == len(migrations.files())


def test_an_edited_file_is_refused(empty, folder):
    migrations.upgrade(empty)
    path = next(folder.glob("0001_*"))
    path.write_text(path.read_text() + "\n-- a thought that came later\n")
    assert refusal(empty) == (f"Migration {path.name} was edited after it was applied. "
                              "Put the change into a new file.")


def test_a_missing_file_is_refused(empty, folder):
    migrations.upgrade(empty)
    path = next(folder.glob("0001_*"))
    path.rename(folder / "0001_another_name.sql")
    assert refusal(empty) == f"Migration {path.name} was applied but is missing."


def test_a_schema_newer_than_the_code_is_refused(empty, write):
    path = write("of_tomorrow", "CREATE TABLE tomorrow ();\n")
    migrations.upgrade(empty)
    path.unlink()
    assert re.fullmatch(r"The database is at migration \d{4}, the code knows \d{4}: the schema is "
                        r"newer than this code\. .+", refusal(empty))


@pytest.mark.parametrize("name", ["0003_gap.sql", "0001_double.sql"])
def test_numbers_with_a_gap_or_a_double_are_refused(empty, folder, name):
    for path in folder.glob("000[2-9]_*"):
        path.unlink()
    (folder / name).write_text("SELECT 1;\n")
    assert "a gap or a double" in refusal(empty)


def test_a_file_with_another_kind_of_name_is_refused(empty, folder):
    (folder / "2_short.sql").write_text("SELECT 1;\n")
    assert refusal(empty) == "2_short.sql is not named like 0001_what_it_does.sql."


@pytest.mark.parametrize("fault", ["SELECT 1 / 0", "SELECT * FROM nowhere", "SELEKT"])
def test_a_failing_migration_leaves_nothing_behind(empty, write, fault):
    good = len(migrations.files())
    path = write("half", f"CREATE TABLE half ();\n{fault};\n")
    assert refusal(empty).startswith(f"Migration {path.name} failed: ")
    assert versions(empty) == list(range(1, good + 1))
    assert execute(empty, "SELECT to_regclass('half')") == [(None,)]
    path.write_text("CREATE TABLE half ();\n")
    assert migrations.upgrade(empty) == 1


def test_a_failing_way_back_leaves_everything(empty, write):
    write("kept", "CREATE TABLE kept ();\n\n-- down\nDROP TABLE kept;\nSELECT 1 / 0;\n")
    known = migrations.upgrade(empty)
    with pytest.raises(migrations.MigrationError, match="failed"):
        migrations.downgrade(empty)
    assert versions(empty) == list(range(1, known + 1))
    assert execute(empty, "SELECT to_regclass('kept')::text") == [("kept",)]


def test_an_upgrade_waits_for_the_one_ahead(empty):
    with psycopg.connect(empty, autocommit=True) as ahead:
        ahead.execute("SELECT pg_advisory_lock(%s)", [migrations.LOCK])
        run = subprocess.Popen([sys.executable, "-c", UPGRADE, migrations.MIGRATIONS, empty],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while not execute(empty, "SELECT pid FROM pg_stat_activity "
                                 "WHERE datname = current_database() "
                                 "  AND application_name = 'shopfront' AND query = 'COMMIT'"):
            assert run.poll() is None
        assert execute(empty, TABLES) == []
    assert run.communicate()[0] == f"{len(migrations.files())}\n"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(migrations, "LOCK_SECONDS", 0.2)
    monkeypatch.setattr(migrations, "PAUSE_SECONDS", 0.2)


ALTER = "ALTER TABLE categories ADD COLUMN colour text;\n"


def test_a_table_in_use_is_waited_for_and_nobody_queues_up_behind(empty, write, impatient):
    migrations.upgrade(empty)
    write("colour", ALTER)
    said = []
    with psycopg.connect(empty) as reader, ThreadPoolExecutor(1) as pool:
        reader.execute("SELECT FROM categories")  # a download, say
        upgrade = pool.submit(migrations.upgrade, empty, said.append)
        until(lambda: len(said) > 2)
        began = time.monotonic()
        execute(empty, "SELECT FROM categories")
        waited = time.monotonic() - began
        reader.rollback()
        assert upgrade.result() == 1
    assert waited < 2
    assert said[1] == "  what it changes is in use; attempt 2 of 60 follows"
    assert execute(empty, "SELECT colour FROM categories") == []


def test_a_table_that_stays_in_use_is_left_alone(empty, write, impatient, monkeypatch):
    known = migrations.upgrade(empty)
    write("colour", ALTER)
    monkeypatch.setattr(migrations, "ATTEMPTS", 2)
    with psycopg.connect(empty) as reader:
        reader.execute("SELECT FROM categories")
        assert "lock timeout" in refusal(empty)
    assert versions(empty) == list(range(1, known + 1))
    assert migrations.upgrade(empty) == 1


def test_a_half_built_index_is_built_anew(empty, write):
    """CREATE INDEX CONCURRENTLY leaves one behind where it is broken off."""
    migrations.upgrade(empty)
    execute(empty, "INSERT INTO categories (name) VALUES ('Tea'), ('Pots')")
    path = write("index", "-- no-transaction\n"
                          "CREATE INDEX CONCURRENTLY IF NOT EXISTS whole_idx\n"
                          "    ON categories (name);\n"
                          "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS half_idx\n"
                          "    ON categories ((length(name) > 0));\n")
    assert "could not create unique index" in refusal(empty)
    valid = ("SELECT relname, indisvalid FROM pg_index JOIN pg_class c ON c.oid = indexrelid "
             "WHERE relname IN ('whole_idx', 'half_idx') ORDER BY 1")
    assert execute(empty, valid) == [("half_idx", False), ("whole_idx", True)]
    execute(empty, "DELETE FROM categories WHERE name = 'Pots'")
    assert migrations.upgrade(empty) == 1
    assert execute(empty, valid) == [("half_idx", True), ("whole_idx", True)]
    assert versions(empty)[-1] == int(path.name[:4])


def test_an_index_that_can_not_be_built_anew_is_refused(empty, write):
    path = write("index", "-- no-transaction\nCREATE INDEX tea_idx ON categories (name);\n")
    assert refusal(empty) == (f"{path.name} begins anew when it was broken off: "
                              "say CREATE INDEX CONCURRENTLY IF NOT EXISTS.")


def test_a_dry_run_shows_what_would_be_run(make_app, empty, write):
    runner = make_app(DATABASE_URL=empty).test_cli_runner()
    migrations.upgrade(empty)
    path = write("colour", f"{ALTER}\n-- down\nALTER TABLE categories DROP COLUMN colour;\n")
    done = runner.invoke(args=["db", "upgrade", "--dry-run"])
    assert (done.exit_code, done.output) == (
        0, f"-- {path.stem}\n{ALTER}\n-- 1 to be applied.\n")
    assert "colour" not in str(execute(empty, SCHEMA))
    migrations.upgrade(empty)
    assert runner.invoke(args=["db", "upgrade", "--dry-run"]).output == "-- Nothing to do.\n"


def test_a_dry_run_of_an_empty_database_makes_nothing(make_app, empty):
    runner = make_app(DATABASE_URL=empty).test_cli_runner()
    shown = runner.invoke(args=["db", "upgrade", "--dry-run"]).output
    assert shown.endswith(f"-- {len(migrations.files())} to be applied.\n")
    assert execute(empty, "SELECT relname FROM pg_class "
                          "WHERE relnamespace = 'public'::regnamespace") == []


def test_code_serves_on_the_schema_of_the_next_release(make_app, make_client, make_database, write):
    database = make_database()
    client = make_client(make_app(DATABASE_URL=database))
    write("colour", ALTER)
    assert migrations.upgrade(database) == 1
    assert client.get("/health/ready").json == {"status": "ok"}
    assert client.get("categories").status_code == 200


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_status_exits_with_0_when_the_schema_is_up_to_date(make_app, make_database):
    runner = make_app(DATABASE_URL=make_database()).test_cli_runner()
    done = runner.invoke(args=["db", "status"])
    assert done.exit_code == 0
    assert done.output.splitlines() == [f"{m.version:04d}_{m.name}: applied"
                                        for m in migrations.files()]


def test_status_exits_with_1_when_something_is_new(make_app, empty, write):
    runner = make_app(DATABASE_URL=empty).test_cli_runner()
    migrations.upgrade(empty)
    path = write("to_come", "CREATE TABLE to_come ();\n")
    done = runner.invoke(args=["db", "status"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1] == f"{path.stem}: new"


def test_status_exits_with_1_when_a_file_was_edited(make_app, empty, folder):
    runner = make_app(DATABASE_URL=empty).test_cli_runner()
    migrations.upgrade(empty)
    path = next(folder.glob("0001_*"))
    path.write_text(path.read_text() + "-- edited\n")
    done = runner.invoke(args=["db", "status"])
    assert done.exit_code == 1
    assert f"Error: Migration {path.name} was edited" in done.stderr
