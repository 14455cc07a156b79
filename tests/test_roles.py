"""The role that the API runs as, as `flask db grant` makes it: all tests' app is one of them."""
import psycopg
import pytest

from tests.conftest import ROLE, as_role, execute


@pytest.mark.parametrize("statement", [
    "CREATE TABLE mine ()", "ALTER TABLE products ADD COLUMN mine int", "DROP TABLE mails",
    "TRUNCATE mails", "CREATE INDEX ON products (name)", "DROP FUNCTION seal_sales()",
    "ALTER TABLE products DISABLE TRIGGER ALL", "CREATE EXTENSION hstore", "CREATE ROLE mine",
    "UPDATE schema_migrations SET checksum = ''", "DELETE FROM schema_migrations",
    "COPY users TO PROGRAM 'cat'", "SELECT pg_read_file('postgresql.conf')",
])
def test_the_api_s_role_changes_no_schema(database_url, statement):
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(as_role(database_url), statement)


def test_the_app_runs_as_that_role(app, database_url):
    with app.extensions["db"].reading() as conn:
        assert conn.execute("SELECT current_user").fetchone() == (ROLE,)
    assert execute(database_url, "SELECT rolsuper, rolcreatedb, rolcreaterole FROM pg_roles "
                                 f"WHERE rolname = '{ROLE}'") == [(False, False, False)]


def test_a_grant_holds_for_later_tables(make_database):
    database = make_database()
    execute(database, "CREATE TABLE later (id bigserial, word text)")
    execute(as_role(database), "INSERT INTO later (word) VALUES ('tea')")
    assert execute(as_role(database), "SELECT id, word FROM later") == [(1, "tea")]


@pytest.fixture
def run(make_app, make_database):
    """A function that runs ``flask db`` on a database."""
    def run(*args, empty=False):
        app = make_app(DATABASE_URL=make_database(empty))
        return app.test_cli_runner().invoke(args=["db", *args])
    return run


def test_grant_says_what_it_did(run):
    done = run("grant", ROLE)
    assert (done.exit_code, done.output) == (0, f"{ROLE} may read and write rows.\n")


def test_an_unknown_role_is_one_sentence(run):
    done = run("grant", 'no"body')
    assert done.exit_code == 1
    assert done.stderr == 'Error: There is no role no"body. CREATE ROLE makes one.\n'


def test_before_an_upgrade_there_is_nothing_to_grant(run):
    done = run("grant", ROLE, empty=True)
    assert (done.exit_code, done.stderr) == (
        1, "Error: There is no schema yet. `flask db upgrade` makes it.\n")


def test_a_start_in_development_needs_no_owner_when_nothing_is_new(serve):
    """The tests' servers all start so; a schema that is behind is refused with a sentence."""
    assert serve(workers=1).call("GET", "/health/ready").json() == {"status": "ok"}
