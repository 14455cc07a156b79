"""Production embeds nothing, seeds nothing, defaults no secret, and says at once what is wrong."""
import re
import shlex
import signal
import subprocess
import sys
import time

import psycopg
import pytest

from extensions import settings
from extensions.settings import SETTINGS, SettingsError
from tests.conftest import ENOUGH, ROOT, Server, execute, register

KEY = "k" * 32
GOOD = {"APP_ENV": "production", "DATABASE_URL": "postgresql://db/shop",
        "REDIS_URL": "redis://cache", "JWT_SECRET_KEY": KEY}
DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)


def complaint(**environ):
    with pytest.raises(SettingsError) as refusal:
        settings.read(GOOD | environ)
    return str(refusal.value)


@pytest.mark.parametrize("command", [["gunicorn", "-b", "127.0.0.1:0"], ["flask", "db", "status"]],
                         ids=["gunicorn", "flask"])
def test_one_message_names_everything_that_is_wrong(command, monkeypatch):
    for name, value in {"APP_ENV": "production", "JWT_SECRET_KEY": "short", "RATE_LIMIT": "lots",
                        "CACHE_TTL": "0", "ALLOWED_ORIGINS": "shop"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode != 0
    assert done.stdout == ""
    message, = done.stderr.splitlines()
    for name in ("DATABASE_URL", "REDIS_URL", "JWT_SECRET_KEY", "RATE_LIMIT", "CACHE_TTL",
                 "ALLOWED_ORIGINS"):
        assert name in message
    assert "short" not in message


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "JWT_SECRET_KEY"])
def test_what_has_no_default_must_be_set(name):
    assert complaint(**{name: ""}) == f"The settings won't do: {name} is not set."


@pytest.mark.parametrize(("key", "fits"), [("k" * 31, False), ("é" * 15, False), ("é" * 16, True),
                                           ("k" * 32, True)])
def test_a_key_has_32_bytes(key, fits):
    if fits:
        assert settings.read(GOOD | {"JWT_SECRET_KEY": key})["JWT_SECRET_KEY"] == key
    else:
        assert "JWT_SECRET_KEY has fewer than 32 bytes" in complaint(JWT_SECRET_KEY=key)


def test_a_weak_key_is_refused_in_development_too():
    with pytest.raises(SettingsError, match="JWT_SECRET_KEY"):
        settings.read({"JWT_SECRET_KEY": "short"})


@pytest.mark.parametrize("name", ["RATE_LIMIT", "LOGIN_RATE_LIMIT", "REGISTER_RATE_LIMIT"])
@pytest.mark.parametrize("value", ["", "lots", "100", "0 per minute", "-1 per minute",
                                   "5 per fortnight", "5 per minute; 9 per hour",
                                   "5 per 99999999999 years"])
def test_a_malformed_limit_is_refused(name, value):
    assert name in complaint(**{name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("APP_ENV", "prod"), ("CACHE_TYPE", "FileSystemCache"), ("LOG_LEVEL", "LOUD"),
    ("WEB_CONCURRENCY", "0"), ("WEB_THREADS", "many"), ("TRUSTED_PROXIES", "-1"),
    ("ACCESS_TOKEN_MINUTES", "1.5"), ("REFRESH_TOKEN_DAYS", "0"), ("POOL_MAX_SIZE", "1e3"),
    ("STATEMENT_TIMEOUT_MS", "99"), ("REPORT_CONCURRENCY", " 2"), ("REQUIRE_IF_MATCH", "maybe"),
    ("ALLOWED_ORIGINS", "https://shop.example.com/path"), ("ALLOWED_ORIGINS", "ftp://shop"),
    ("SMTP_URL", "mail.example.com:25"), ("SMTP_URL", "smtp://user:password@"),
    ("SMTP_URL", "smtp://mail.example.com:mail"), ("V1_USERS_SUNSET", "soon"),
])
def test_a_malformed_setting_is_refused(name, value):
    assert name in complaint(**{name: value})


def test_the_defaults_are_sound():
    assert settings.read({})["APP_ENV"] == "development"
    assert settings.read(GOOD)["RATE_LIMIT"] == "100 per 15 minutes"


def test_nothing_is_embedded_migrated_or_seeded(copy_of_project, make_database, redis_url):
    empty = make_database(empty=True)
    server = Server(GOOD | {"DATABASE_URL": empty, "REDIS_URL": redis_url, "RATE_LIMIT": ENOUGH},
                    folder=copy_of_project, workers=1)
    try:
        server.wait()
        assert server.call("GET", "/health/ready").status == 503
        assert execute(empty, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
    finally:
        server.stop()
    assert not (copy_of_project / "instance" / "embedded").exists()
    assert not (copy_of_project / "instance" / "jwt_secret_key").exists()


def test_a_migrated_shop_opens_empty(serve, make_database):
    database = make_database()
    # Not the cache that the other tests' shops fill.
    server = serve(workers=1, APP_ENV="production", DATABASE_URL=database, REDIS_PREFIX="fresh")
    assert server.call("GET", "/health/ready").json() == {"status": "ok"}
    assert server.call("GET", "products").json()["data"] == []
    with psycopg.connect(database) as conn:
        assert conn.execute("SELECT count(*) FROM users").fetchone() == (0,)


def table_of_the_readme():
    """{name: default} of the rows ``| `NAME` | `default` | …``."""
    rows = re.findall(r"^\| *`([A-Z][A-Z0-9_]+)` *\|([^|]*)\|", (ROOT / "README.md").read_text(),
                      re.M)
    return {name: default.strip() for name, default in rows}


def test_the_readme_lists_every_setting_and_no_other():
    assert sorted(table_of_the_readme()) == sorted(DEFAULTS)


def test_the_readme_gives_the_defaults():
    table = table_of_the_readme()
    for name in DEFAULTS:
        given = re.fullmatch(r"`(.*)`", table[name])
        assert (given[1] if given else "") == DEFAULTS[name], name


def example():
    """{name: value} of .env.example, with its lines switched on."""
    lines = re.findall(r"^#?([A-Z][A-Z0-9_]+=.*)$", (ROOT / ".env.example").read_text(), re.M)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def test_the_example_file_has_every_setting_and_no_other():
    for_compose = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text()))
    assert example().keys() - for_compose <= DEFAULTS.keys() <= example().keys()


def test_the_example_file_switched_on_changes_nothing():
    environ = {name: value for name, value in example().items() if name in DEFAULTS}
    own = {"WEB_CONCURRENCY": settings.read({})["WEB_CONCURRENCY"]}  # this machine's cores
    assert settings.read(environ) | own == settings.read({})


# Secrets


def test_a_secret_may_stand_in_a_file(tmp_path):
    for name in settings.SECRETS:
        file = tmp_path / name
        file.write_text(f"{GOOD.get(name, 'smtp://mail/' + 'x' * 30)}\n")
        given = {key: value for key, value in GOOD.items() if key != name}
        read = settings.read(given | {f"{name}_FILE": str(file)})
        assert read[name] == file.read_text().strip()


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    assert "JWT_SECRET_KEY_FILE can't be read: No such file" in complaint(
        JWT_SECRET_KEY="", JWT_SECRET_KEY_FILE=str(tmp_path / "none"))
    assert "REDIS_URL and REDIS_URL_FILE are both set" in complaint(REDIS_URL_FILE=__file__)


def test_a_key_is_changed_with_nobody_logged_out(make_app, make_client, make_product):
    old, new = "o" * 40, "n" * 40
    before = make_client(make_app(JWT_SECRET_KEY=old))
    person = register(before)
    for _ in range(2):
        make_product()
    cursor = before.get("products?limit=1").json["pagination"]["next_cursor"]
    after = make_client(make_app(JWT_SECRET_KEY=new, JWT_SECRET_KEY_PREVIOUS=old))
    assert after.get("users/me", token=person.token).status_code == 200
    assert after.get(f"products?limit=1&cursor={cursor}").status_code == 200
    fresh = after.post("auth/refresh", json={"refresh_token": person.refresh_token}).json
    last = make_client(make_app(JWT_SECRET_KEY=new))
    assert last.get("users/me", token=fresh["token"]).status_code == 200
    assert last.get("users/me", token=person.token).status_code == 401
    assert before.get("users/me", token=fresh["token"]).status_code == 401


def test_a_node_that_is_told_to_go_drains_first(serve):
    server = serve(workers=1, DRAIN_SECONDS="2")
    assert server.call("GET", "/health/ready").status == 200
    server.process.send_signal(signal.SIGTERM)
    begun, statuses = time.monotonic(), set()
    while time.monotonic() - begun < 1.5:
        assert server.call("GET", "/api/v1/categories").status == 200
        statuses.add(server.call("GET", "/health/ready").status)
        time.sleep(0.1)
    assert 503 in statuses
    server.process.wait(10)
    assert 1.9 < time.monotonic() - begun < 6
