"""Logs: one JSON object a line, in files that rotate themselves and lose nothing."""
import collections
import gzip
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from db.queries import SLOW_SECONDS
from extensions.http.logs import KEEP_DAYS, Json, SharedFile
from tests.conftest import PASSWORD, ROOT, Server, execute, unique
from tests.test_embedded import fresh_copy

DAY = 86400


def eventually(condition):
    """What the condition returns as soon as it is true."""
    end = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


class Site:
    """A server that logs all it can, in a copy of the project so that its mails are at hand."""

    def __init__(self, settings, folder, database_url):
        self.database_url, self.folder, self.logs = database_url, folder / "shop", folder / "logs"
        self.server = Server(
            settings | {"DATABASE_URL": database_url, "LOG_LEVEL": "DEBUG",
                        "LOG_DIR": str(self.logs)}, fresh_copy(self.folder),
        )
        self.call = self.server.call

    def lines(self, name="app.log"):
        file = self.logs / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def of(self, answer, name="app.log"):
        """What was logged of a request."""
        wanted = answer.headers["X-Request-ID"]
        return [line for line in self.lines(name) if line.get("request_id") == wanted]

    def stdout(self):
        with open(self.server.log_file.name) as file:
            return file.read()

    def mail_token(self, purpose, email):
        """The token in the mail to an address."""
        def find():
            for file in self.folder.glob(f"instance/outbox/*-{purpose}.eml"):
                if f"To: {email}\n" in (text := file.read_text()):
                    return re.search(r"^\s+([\w-]{43})$", text, re.M)
            return None
        return eventually(find)[1]


@pytest.fixture(scope="module")
def site(settings, tmp_path_factory, make_database):
    site = Site(settings, tmp_path_factory.mktemp("logs"), make_database())
    try:
        site.server.wait()
        yield site
    finally:
        site.server.stop()


@pytest.mark.parametrize(("method", "path", "data", "status"), [
    ("GET", "/health", None, 200), ("GET", "products", None, 200), ("HEAD", "products", None, 200),
    ("OPTIONS", "products", None, 204), ("GET", "openapi.json", None, 200),
    ("GET", "/nowhere", None, 404), ("PUT", "products", None, 405), ("GET", "users", None, 401),
    ("POST", "auth/login", b"{", 400), ("POST", "auth/login", b"{}", 422),
])
def test_a_request_is_one_line_with_its_id(site, method, path, data, status):
    answer = site.call(method, path, data=data, headers={"Content-Type": "application/json"})
    line, = [line for line in site.of(answer) if line["logger"] == "shopfront.access"]
    assert (line["method"], line["status"]) == (method, answer.status)
    assert line["path"] == (path if path.startswith("/") else f"/api/v1/{path}")
    assert answer.status == status or method == "OPTIONS"
    assert line["milliseconds"] > 0
    assert line["address"] == "127.0.0.1"


def test_a_request_is_logged_under_the_id_that_its_client_chose(site):
    answer = site.call("GET", "/health", headers={"X-Request-ID": "my-own.id_1"})
    assert [line["request_id"] for line in site.of(answer)] == ["my-own.id_1"]


def test_every_line_says_when_what_and_how_bad(site):
    site.call("GET", "/health")
    for line in site.lines():
        assert {"time", "level", "logger", "message"} <= line.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_a_line_break_of_a_client_forges_no_line(site):
    answer = site.call("GET", "/a%0A%7B%22forged%22%3A%20true%7D%0A%E2%80%A8")
    line, = site.of(answer)
    assert line["path"] == '/a\n{"forged": true}\n\u2028'
    assert not any("forged" in line for line in site.lines())


def test_the_files_hold_what_stdout_says(site):
    site.call("GET", "/health")

    def same():
        said = [line for line in site.stdout().splitlines() if line.startswith("{")]
        return sorted(said) == sorted((site.logs / "app.log").read_text().splitlines())

    eventually(same)  # the mail thread may be writing a line just now


@pytest.mark.parametrize(("env", "for_people"), [
    ({}, True), ({"LOG_FORMAT": "json"}, False),
    ({"APP_ENV": "production", "LOG_FORMAT": ""}, False),
    ({"APP_ENV": "production", "LOG_FORMAT": "text"}, True),
])
def test_on_a_terminal_in_development_lines_are_for_people(settings, env, for_people):
    """Run at the other end of a terminal of the test's own."""
    code = ("from app import create_app; import logging; app = create_app();"
            "app.test_client().get('/nowhere%0A', headers={'X-Request-ID': 'mine'});"
            "logging.getLogger('shopfront.x').warning('careful', extra={'who': 'a\\x1b[7mb'})")
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=theirs, check=True,
                   env=os.environ | settings | {"LOG_LEVEL": "INFO"} | env)
    os.close(theirs)
    first, second = os.read(ours, 10000).decode().splitlines()
    os.close(ours)
    if for_people:
        assert re.fullmatch(r"\d\d:\d\d:\d\d \x1b\[33m404\x1b\[0m GET /nowhere\\x0a"
                            r"\x1b\[2m \d+\.\d ms\x1b\[22m", first)
        assert re.search(r"WARNING careful\x1b\[2m who=a\\x1b\[7mb", second)
    else:
        assert (json.loads(first)["request_id"], json.loads(second)["who"]) == ("mine", "a\x1b[7mb")


def test_an_error_is_in_both_files_with_its_traceback_and_not_in_the_answer(site):
    execute(site.database_url, "ALTER VIEW transactions_v1 RENAME TO mislaid")
    try:
        token = account(site)["token"]
        answer = site.call("GET", "transactions", token=token)
    finally:
        execute(site.database_url, "ALTER VIEW mislaid RENAME TO transactions_v1")
    assert answer.status == 500
    line, = site.of(answer, "error.log")
    assert (line["level"], line["logger"]) == ("ERROR", "shopfront.errors")
    assert "UndefinedTable" in line["traceback"]
    assert line in site.of(answer)
    assert not re.search(b"Undefined|relation|transactions.sql|Traceback", answer.body)


def test_only_errors_are_in_the_error_log(site):
    site.call("GET", "/nowhere")
    assert {line["level"] for line in site.lines("error.log")} <= {"ERROR", "CRITICAL"}


def account(site):
    """A new account: its email, token, refresh_token."""
    body = {"email": f"{unique('l')}@example.com", "password": PASSWORD, "name": "Ada Lovelace"}
    answer = site.call("POST", "auth/register", json=body)
    return answer.json() | {"email": body["email"]}


def test_a_failed_login_is_an_event_with_its_address(site):
    email = account(site)["email"]
    answer = site.call("POST", "auth/login", json={"email": email, "password": "wrong again"})
    event, = [line for line in site.of(answer) if line["logger"] == "shopfront.security"]
    assert (event["event"], event["email"], event["address"]) == \
        ("login_failed", email, "127.0.0.1")


def test_no_secret_is_ever_logged(site, settings):
    wrong, other, fresh = "wrong-password-1", "second-password-2", "third-password-3"
    user = account(site)
    email, secrets = user["email"], [PASSWORD, wrong, other, fresh]

    def post(path, status, bearer=None, **body):
        answer = site.call("POST", path, token=bearer, json=body)
        assert answer.status == status, answer.body
        if answer.body:
            secrets.extend(v for k, v in answer.json().items() if k.endswith("token"))
        return answer

    post("auth/email/verify", 204, token=site.mail_token("verify", email))
    post("auth/login", 200, email=email, password=PASSWORD)
    post("auth/login", 401, email=email, password=wrong)
    post("auth/login", 422, email=email, password=wrong, unknown=wrong)
    post("auth/refresh", 200, refresh_token=user["refresh_token"])
    post("auth/refresh", 401, refresh_token=user["refresh_token"][:-2])
    post("auth/password", 204, user["token"], current_password=PASSWORD, new_password=other)
    post("auth/password/forgot", 202, email=email)
    post("auth/password/reset", 204, token=site.mail_token("reset", email), password=fresh)
    post(f"auth/login?password={wrong}", 422, email=email, password=wrong)
    assert site.call("POST", "auth/login", headers={"Content-Type": "application/json"},
                     data=f'{{"password": "{wrong}"'.encode()).status == 400
    site.call("GET", "/metrics", token=settings["METRICS_TOKEN"])
    site.call("GET", "users/me", token=f"{user['token']}x")

    secrets += [user["token"], user["refresh_token"], settings["METRICS_TOKEN"],
                settings["JWT_SECRET_KEY"], site.mail_token("verify", email),
                site.mail_token("reset", email)]
    secrets += [row[0] for row in execute(site.database_url, "SELECT password_hash FROM users")]
    written = site.stdout() + "".join(file.read_text() for file in site.logs.glob("*.log"))
    assert email in written
    for secret in secrets:
        assert len(secret) > 10
        assert secret not in written
        assert secret.rpartition(".")[2] not in written  # a token's signature


# Traces, and slow queries

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
WELL_FORMED = [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00", f"cc-{TRACE}-{PARENT}-01",
               f"cc-{TRACE}-{PARENT}-01-what-is-to-come"]
MALFORMED = [
    "", "00", TRACE, f"00-{TRACE}", f"00-{TRACE}-{PARENT}", f"0-{TRACE}-{PARENT}-01",
    f"ff-{TRACE}-{PARENT}-01", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-{PARENT}-01", f"00-{TRACE[1:]}-{PARENT}-01", f"00-{TRACE}0-{PARENT}-01",
    f"00-{TRACE[1:]}g-{PARENT}-01", f"00-{TRACE}-{PARENT}-1", f"00-{TRACE}-{PARENT}-01-more",
    f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01", f'00-{TRACE}-{PARENT}-01", "forged": "yes',
]


def traces(site, traceparent):
    """The trace_id of each line of a request: of the access log, and of a failed login."""
    body = {"email": f"{unique('t')}@example.com", "password": "wrong again"}
    answer = site.call("POST", "auth/login", json=body, headers={"traceparent": traceparent})
    lines = site.of(answer)
    assert {"shopfront.access", "shopfront.security"} <= {line["logger"] for line in lines}
    assert not any("forged" in line for line in lines)
    return {line.get("trace_id") for line in lines}


@pytest.mark.parametrize("traceparent", WELL_FORMED)
def test_each_line_of_a_request_has_its_client_s_trace(site, traceparent):
    assert traces(site, traceparent) == {TRACE}


@pytest.mark.parametrize("traceparent", MALFORMED)
def test_a_malformed_traceparent_is_no_trace(site, traceparent):
    assert traces(site, traceparent) == {None}


def test_a_slow_query_has_its_name_in_the_log_and_while_it_runs_in_postgresql(site):
    token = account(site)["token"]
    with ThreadPoolExecutor(1) as thread, psycopg.connect(site.database_url) as locker:
        locker.execute("LOCK TABLE transactions")
        asked = thread.submit(site.call, "GET", "transactions", token=token)
        (name,), = eventually(lambda: execute(  # upkeep's queries may wait for the lock too
            site.database_url, r"SELECT substring(query FROM '^/\* (transactions\.\w+) \*/ ') "
            "FROM pg_stat_activity WHERE application_name = 'shopfront' AND datname = "
            r"current_database() AND wait_event_type = 'Lock' AND query ~ '^/\* transactions\.'"))
        time.sleep(SLOW_SECONDS + 0.1)
        locker.rollback()
    answer = asked.result()
    assert answer.status == 200
    slow, = [line for line in site.of(answer) if line["logger"] == "shopfront.sql"]
    assert (slow["level"], slow["query"]) == ("WARNING", name)
    assert SLOW_SECONDS < slow["seconds"] < 5


WRITER = """
import logging, sys, time
from extensions.http.logs import Json, SharedFile

handler = SharedFile(sys.argv[1], max_bytes=100_000)
handler.setFormatter(Json())
log = logging.Logger("shopfront")
log.addHandler(handler)
for n in range(3000):
    log.info("%s", "x" * (n % 300), extra={"writer": sys.argv[2], "n": n})
    time.sleep(0.001)  # so that files are packed while others are being written
"""


def test_four_processes_lose_and_tear_no_line_while_their_file_rotates(tmp_path):
    path = tmp_path / "app.log"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(n)], cwd=ROOT,
                                stderr=subprocess.PIPE, text=True) for n in range(4)]
    for writer in writers:
        assert writer.communicate()[1] == ""
        assert writer.returncode == 0
    packed = [*tmp_path.glob("app-*.log.gz")]
    assert {file.name for file in tmp_path.iterdir()} == \
        {"app.log", "app.lock", *(file.name for file in packed)}
    assert len(packed) > 10
    text = path.read_text() + "".join(map(unpacked, packed))
    seen = collections.Counter(
        (line["writer"], line["n"]) for line in map(json.loads, text.splitlines())
    )
    assert seen == {(str(writer), n): 1 for writer in range(4) for n in range(3000)}


def unpacked(file):
    return gzip.decompress(file.read_bytes()).decode()


@pytest.fixture
def write(tmp_path):
    """A function that writes one line to app.log through a handler with these arguments."""
    def write(**kwargs):
        handler = SharedFile(tmp_path / "app.log", **kwargs)
        handler.setFormatter(Json())
        handler.emit(logging.makeLogRecord({"msg": "hello", "levelname": "INFO"}))
    return write


def test_without_its_folder_a_log_writes_into_nothing_else(tmp_path):
    (tmp_path / "logs").mkdir()
    handler = SharedFile(tmp_path / "logs/app.log")
    handler.write(b"before\n")
    (tmp_path / "logs").rename(tmp_path / "moved")
    time.sleep(1.1)  # it looks once a second
    with pytest.raises(FileNotFoundError):
        handler.write(b"lost\n")
    with open(tmp_path / "other", "wb"):  # which has the lowest descriptor that is free
        handler.write(b"stray\n")
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "moved/app.log").read_bytes() == b"before\nstray\n"


def leave(path, days):
    path.write_text("before\n")
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def test_files_older_than_14_days_go_and_younger_ones_stay(tmp_path, write):
    assert KEEP_DAYS == 14
    old = [leave(tmp_path / name, 15) for name in (
        "app-2020-01-01T000000.000000.log.gz",
        "app-2020-01-02T000000.000000.log",  # whose process was killed before it packed it
        "app-2020-01-03T000000.000000.log.gz.new",
    )]
    kept = [leave(tmp_path / "app-2020-02-01T000000.000000.log.gz", 13),
            leave(tmp_path / "error-2020-01-01T000000.000000.log.gz", 15),
            leave(tmp_path / "app-notes.txt", 15)]
    write(max_bytes=10)
    eventually(lambda: not any(file.exists() for file in old))
    assert all(file.exists() for file in kept)


def test_yesterdays_file_is_packed_by_todays_first_line(tmp_path, write):
    leave(tmp_path / "app.log", 1)
    write()
    eventually(lambda: len([*tmp_path.glob("app-*.log.gz")]) == 1)
    packed, = tmp_path.glob("app-*.log.gz")
    first, second = unpacked(packed).splitlines()
    assert (first, json.loads(second)["message"]) == ("before", "hello")
    assert (tmp_path / "app.log").read_text() == ""
    eventually(lambda: not [*tmp_path.glob("app-*.log")])


def test_a_file_below_its_size_is_left_alone(tmp_path, write):
    write()
    write()
    assert len((tmp_path / "app.log").read_text().splitlines()) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"app.log"}
