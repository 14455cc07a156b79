"""What SECURITY.md promises: that its tests exist, and those that belong to no other file."""
import ast
import base64
import functools
import re
import socket
import ssl
import subprocess
import time
from email.message import EmailMessage

import psycopg
import pytest
from werkzeug.datastructures import Headers

from blueprints.docs import HASHES, POLICY
from extensions import jwt
from extensions.behind import mail
from extensions.http.headers import SECURITY
from tests.conftest import ENOUGH, ROOT, register
from tests.test_operations import VERSIONS, read, send
from tests.test_tokens import altered, claims_of

METRICS = "metrics-token-of-the-tests"
TEXT = (ROOT / "SECURITY.md").read_text()
# Every requirement of ASVS 5.0.0 of level 1 or 2, by section: the first and the last number.
LEVELS_1_AND_2 = """
    1.1 1-2, 1.2 1-9, 1.3 1-11, 1.4 1-3, 1.5 1-2, 2.1 1-3, 2.2 1-3, 2.3 1-4, 2.4 1-1,
    3.2 1-2, 3.3 1-4, 3.4 1-6, 3.5 1-5, 3.7 1-2, 4.1 1-3, 4.2 1-1, 4.3 1-2, 4.4 1-4,
    5.1 1-1, 5.2 1-3, 5.3 1-2, 5.4 1-3, 6.1 1-3, 6.2 1-12, 6.3 1-4, 6.4 1-4, 6.5 1-5,
    6.6 1-3, 6.8 1-4, 7.1 1-3, 7.2 1-4, 7.3 1-2, 7.4 1-5, 7.5 1-2, 7.6 1-2, 8.1 1-2,
    8.2 1-3, 8.3 1-1, 8.4 1-1, 9.1 1-3, 9.2 1-4, 10.1 1-2, 10.2 1-2, 10.3 1-4, 10.4 1-11,
    10.5 1-5, 10.6 1-2, 10.7 1-3, 11.1 1-2, 11.2 1-3, 11.3 1-3, 11.4 1-4, 11.5 1-1,
    11.6 1-1, 12.1 1-3, 12.2 1-2, 12.3 1-4, 13.1 1-1, 13.2 1-5, 13.3 1-2, 13.4 1-5,
    14.1 1-2, 14.2 1-4, 14.3 1-3, 15.1 1-3, 15.2 1-3, 15.3 1-7, 16.1 1-1, 16.2 1-5,
    16.3 1-4, 16.4 1-3, 16.5 1-3, 17.1 1-1, 17.2 1-4, 17.3 1-2
"""


# The document


def rows():
    """[(number, level, what, held by)] of the table of requirements."""
    return re.findall(r"^\| (\d+\.\d+\.\d+) \| ([12]) \| ([^|]+) \| ([^|]+) \|$", TEXT, re.M)


def left_out():
    """Numbers of chapters, sections and requirements that are said not to apply."""
    part = TEXT.partition("### Not applicable")[2].partition("\n## ")[0]
    return [number for names in re.findall(r"^- ([\d., ]+):", part, re.M)
            for number in names.split(", ")]


@functools.cache
def functions(file):
    """Names of the tests of a file."""
    return {node.name for node in ast.parse((ROOT / file).read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_the_document_names_exists():
    named = re.findall(r"(tests/\w+\.py)::(\w+)", TEXT)
    assert len(named) > 100
    missing = [f"{file}::{name}" for file, name in named if name not in functions(file)]
    assert not missing


def test_every_requirement_stands_in_the_document_once():
    numbers = [number for number, *_ in rows()]
    assert len(numbers) == len(set(numbers))
    assert len(numbers) == len(re.findall(r"^\| \d+\.", TEXT, re.M))  # no row has another form
    out = left_out()
    covered = [f"{section}.{n}" for section, first, last in
               re.findall(r"(\d+\.\d+) (\d+)-(\d+)", LEVELS_1_AND_2)
               for n in range(int(first), int(last) + 1)]
    assert len(covered) == 253
    for number in covered:
        places = numbers.count(number) + sum(f"{number}.".startswith(f"{o}.") for o in out)
        assert places == 1, number
    assert set(numbers) <= set(covered)


def reasons():
    """{number: what its last column begins with, or `tests`}."""
    return {number: "tests" if held.startswith("`tests/") else held.partition(":")[0]
            for number, *_, held in rows()}


@pytest.mark.parametrize(("number", "held"), [(number, held) for number, *_, held in rows()])
def test_every_row_has_a_test_or_a_reason(number, held):
    assert reasons()[number] in ("tests", "Design", "Document", "Operator", "Not met")
    assert re.fullmatch(r"`tests/\w+\.py::\w+`.*|[^:]+: .{10,}", held)


def test_the_document_counts_its_rows_right():
    found = list(reasons().values())
    sentence = re.search(r"(\d+)\s+apply: (\d+) are held by tests, (\d+) have another reason, "
                         r"(\d+) are not\s+met", TEXT)
    tests, unmet = found.count("tests"), found.count("Not met")
    others = len(found) - tests - unmet
    assert [int(n) for n in sentence.groups()] == [len(found), tests, others, unmet]


# The code


def python_files():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if not name.startswith("tests/")]


DANGEROUS = {"eval", "exec", "compile", "__import__", "system", "popen", "render_template_string",
             "from_string", "Markup", "md5"}
# Of commands, never of requests; every argument is their own.
STARTS_PROGRAMS = {"db/embedded.py", "db/backup.py"}


def test_nothing_runs_what_it_is_given():
    """No eval, no shell, no unsafe format, no templates, no weak hash, in what serves."""
    for file in python_files():
        name, tree = str(file.relative_to(ROOT)), ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                module = getattr(getattr(node.func, "value", None), "id", "")
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "shell" not in keywords, name
                assert called not in DANGEROUS or module == "re", (name, called)
                assert called != "sha1" or not keywords["usedforsecurity"].value, name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not modules & {"pickle", "marshal", "shelve", "yaml", "xml", "jinja2"}, name
                assert "subprocess" not in modules or name in STARTS_PROGRAMS, name


def test_the_image_takes_only_what_is_named():
    first, *lines = (ROOT / ".dockerignore").read_text().split()
    assert first == "*"
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert not taken & {".", "*", ".git", ".env", "instance", "tests"}


# What is served


def test_a_made_up_method_makes_no_new_series(client):
    for word in ("BREW", "BREWA", "BREWB"):
        assert client.open(word, "/health").status_code == 405
    text = client.get("/metrics", token=METRICS).text
    assert "BREW" not in text
    assert 'method="other"' in text


@pytest.mark.parametrize("path", ["products", "/nowhere", "/api/v1/docs", "/", "users"])
def test_every_answer_s_policy_closes_what_default_src_leaves_open(client, path):
    policy = client.get(path).headers["Content-Security-Policy"].split("; ")
    for directive in ("default-src", "object-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{directive} 'none'" in policy


def test_a_cursor_is_signed_with_sha_256(client, make_product):
    make_product()
    make_product()
    cursor = client.get("products?limit=1").json["pagination"]["next_cursor"]
    signature = cursor.rpartition(".")[2]
    assert len(base64.urlsafe_b64decode(signature + "=")) == 32


@pytest.mark.parametrize("path", [
    "/.git/HEAD", "/.git/config", "/.gitignore", "/.env", "/.svn/entries", "/app.py", "/instance/",
    "/instance/jwt_secret_key", "/docs/", "/docs", "/problems", "/static/", "/console", "/debug",
    "/server-status", "/admin", "/actuator", "/phpinfo.php", "/api/v1/metrics", "/backup.sql",
])
def test_no_file_folder_or_console_is_served(client, path):
    assert client.get(path).status_code == 404


def test_a_fault_tells_nothing_in_debug_mode_either(make_app):
    app = make_app()
    app.debug = True

    def fault():
        raise RuntimeError("a secret in /srv/shop.py")
    app.view_functions["health.ready"] = fault
    answer = app.test_client().get("/health/ready?__debugger__=yes&cmd=resource&f=style.css")
    assert answer.status_code == 500
    assert not re.search("secret|Traceback|RuntimeError|shop.py|werkzeug", answer.text)


@pytest.mark.parametrize("line", ["TRACE /api/v1/products", "TRACE /", "TRACK /",
                                  "CONNECT example.com:443", "CONNECT /"])
def test_no_request_is_echoed_or_passed_on(server, line):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(f"{line} HTTP/1.1\r\nHost: shop\r\nX-Word: sesame\r\n"
                     "Connection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert int(answer.split()[1]) in (400, 404, 405)
    assert b"sesame" not in answer


# Every kind of answer: its status, its Cache-Control, and the request, whose lines end at each |.
# A request that names its version is sent as it is; single words are shops of BROKEN.
PUBLIC, PRIVATE, HOUR = "public, no-cache", "private, no-cache", "public, max-age=3600"
NEVER = "no-store"
REPORT = "GET /api/v1/reports/{}?start_date=2026-01-01&end_date=2026-01-02|Authorization: <admin>"
ANSWERS = [
    (200, NEVER, "GET /health"), (200, NEVER, "HEAD /health"), (200, NEVER, "GET /health/ready"),
    (200, None, "GET /"), (302, None, "GET /|Accept: text/html"),
    (200, "no-cache", "GET /api/v1/docs"), (200, "no-cache", "HEAD /api/v2/docs"),
    (200, "no-cache", "GET /docs/page.js"), (200, "no-cache", "GET /docs/page.js?v=another"),
    *((200, HOUR, f"GET /docs/{name}?v={version}") for name, version in HASHES.items()),
    (206, HOUR, f"GET /docs/page.css?v={HASHES['page.css']}|Range: bytes=0-3"),
    (304, HOUR, f"GET /docs/page.css?v={HASHES['page.css']}"
                "|If-Modified-Since: Thu, 31 Dec 2099 00:00:00 GMT"),
    (200, PUBLIC, "GET /api/v1/openapi.json"),
    (304, PUBLIC, "GET /api/v1/openapi.json|If-None-Match: *"),
    (200, HOUR, "GET /problems/gone"), (200, None, "GET /metrics|Authorization: <metrics>"),
    (200, PUBLIC, "GET /api/v1/products?limit=7"), (200, PUBLIC, "GET /api/v1/products?limit=7"),
    (200, PUBLIC, "GET /api/v1/products?limit=7|Accept-Encoding: gzip"),
    (200, PUBLIC, "HEAD /api/v1/products"), (200, PUBLIC, "GET /api/v1/products/<product>"),
    (304, PUBLIC, "GET /api/v1/products|If-None-Match: *"), (200, None, "OPTIONS /api/v1/products"),
    (200, PRIVATE, "GET /api/v1/users/me|Authorization: <user>"),
    (304, PRIVATE, "GET /api/v1/users/me|Authorization: <user>|If-None-Match: *"),
    (200, PRIVATE, "GET /api/v2/users|Authorization: <admin>"),
    (200, PRIVATE, REPORT.format("sales")), (200, PRIVATE, REPORT.format("transactions")),
    (200, PRIVATE, REPORT.format("transactions") + "|Accept: text/csv|Accept-Encoding: gzip"),
    (200, NEVER, 'POST /api/v1/auth/login||{"email": "<email>", "password": "<password>"}'),
    (201, PRIVATE, 'POST /api/v1/products|Authorization: <admin>||{"name": "Tea", "price": 1}'),
    (204, None, "POST /api/v1/auth/logout|Authorization: <leaver>"),
    (400, NEVER, "GET /api/v1/products?search=%FF"), (400, NEVER, "POST /api/v1/auth/login||{"),
    (401, NEVER, "GET /api/v1/users/me"), (401, NEVER, "GET /metrics"),
    (403, NEVER, "GET /api/v1/users|Authorization: <user>"),
    (404, NEVER, "GET /nowhere"), (404, NEVER, "HEAD /nowhere"), (404, NEVER, "GET /docs/nothing"),
    (404, NEVER, "GET /api/v1/products/0"), (405, NEVER, "PUT /api/v1/products"),
    (405, NEVER, "TRACE /api/v1/products"),
    (412, NEVER, 'DELETE /api/v1/products/<product>|Authorization: <admin>|If-Match: "x"'),
    (415, NEVER, "POST /api/v1/auth/login|Content-Type: text/plain||{}"),
    (422, NEVER, "GET /api/v1/products?limit=0"), (422, NEVER, "POST /api/v1/auth/login||{}"),
    # The worker's own refusals: of what is no request, too much of one, or half of one.
    (400, NEVER, "nonsense||"), (400, NEVER, "GET / HTTP/9.9||"), (400, NEVER, "\x16\x03\x01||"),
    (400, NEVER, "GET / HTTP/1.1|A b: c||"), (431, NEVER, f"GET / HTTP/1.1|X: {'a' * 70000}||"),
    (414, NEVER, f"GET /{'a' * 70000} HTTP/1.1||"),
    (431, NEVER, f"GET / HTTP/1.1|{'X: 1|' * 500}|"),
    (400, NEVER, "POST /api/v1/auth/login HTTP/1.1|Host: x|Transfer-Encoding: chunked||x|"),
    (408, NEVER, "GET /health HTTP/1.1|X-Half: "),
    (413, NEVER, "POST /api/v1/auth/login HTTP/1.1|Host: x|Content-Length: 10485761||"),
    # Of shops where something is broken.
    (429, NEVER, "limited"), (500, NEVER, "faulty"), (503, NEVER, "away"), (504, NEVER, "locked"),
]
BROKEN = {"limited": {"RATE_LIMIT": "1 per hour"}, "faulty": {},
          "away": {"DATABASE_URL": "postgresql:///shop?host=/nowhere"},
          "locked": {"STATEMENT_TIMEOUT_MS": "100"}}


@pytest.fixture(scope="module")
def words(admin, client):
    """What stands for the words in the table."""
    person = register(client)
    product = client.post("products", token=admin.token, json={"name": "Tea", "price": 1}).json
    return {"admin": f"Bearer {admin.token}", "user": f"Bearer {person.token}",
            "leaver": f"Bearer {register(client).token}", "metrics": f"Bearer {METRICS}",
            "email": person.email, "password": person.password, "product": product["id"]}


def over_wire(server, request):
    """(status, headers) of the server's answer."""
    if re.match(r"[A-Z]+ [^ |]+(\||$)", request):
        head, _, body = request.partition("||")
        line, *headers = head.split("|")
        if body and "Content-Type" not in head:
            headers.append("Content-Type: application/json")
        request = "|".join([f"{line} HTTP/1.1", "Host: shop", "Connection: close",
                            f"Content-Length: {len(body)}", *headers, "", body])
    data = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as wire:
        wire.sendall(request.replace("|", "\r\n").encode("latin-1"))
        while b"\r\n\r\n" not in data:
            data += wire.recv(65536) or pytest.fail(f"closed behind {data}")
    first, *lines = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    return int(first.split()[1]), Headers([line.split(": ", 1) for line in lines])


def of_a_broken_shop(how, make_app, make_database):
    """(status, headers) of the second answer of a shop that can't."""
    url = make_database()
    shop = make_app(**{"DATABASE_URL": url, "CACHE_TYPE": "NullCache"} | BROKEN[how]).test_client()
    with psycopg.connect(url) as conn:
        if how == "faulty":
            conn.execute("ALTER VIEW products_v1 RENAME TO mislaid")
            conn.commit()
        elif how == "locked":
            conn.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        for _ in range(2):
            answer = shop.get("/api/v1/products/1", environ_base={"REMOTE_ADDR": "192.0.2.78"})
    return answer.status_code, answer.headers


@pytest.mark.parametrize(("status", "kept", "request_"), ANSWERS,
                         ids=[ascii(request[:60]) for *_, request in ANSWERS])
def test_every_kind_of_answer_has_its_headers(
        server, words, make_app, make_database, status, kept, request_):
    if request_ in BROKEN:
        found, headers = of_a_broken_shop(request_, make_app, make_database)
    else:
        request = re.sub("<([a-z]+)>", lambda word: str(words[word[1]]), request_)
        found, headers = over_wire(server, request)
    assert found == status
    assert headers.get("Cache-Control") == kept
    for name, value in SECURITY.items():
        page = name == "Content-Security-Policy" and re.search("/docs( |$)", request_)
        assert headers.getlist(name) == [POLICY if page else value]
    assert len(headers.getlist("Cache-Control")) == (kept is not None)
    assert [bool(re.fullmatch("[0-9a-f]{32}", value))
            for value in headers.getlist("X-Request-ID")] == [True]
    assert re.fullmatch("[a-z]*", headers.get("Server", ""))  # no version
    assert not {"Via", "X-Powered-By", "X-Runtime", "X-AspNet-Version"} & set(headers.keys())


@pytest.mark.parametrize("path", [
    "/", "/api/v1/docs", "/docs/page.js", "/docs/page.css", "/docs/swagger-ui.css", "/metrics",
    "/docs/swagger-ui-bundle.js", "reports/transactions?start_date=2026-01-01&end_date=2026-01-02"
    "&format=csv", "products", "/nowhere", "/api/v1/openapi.json"])
def test_every_body_says_what_it_is_and_text_in_which_letters(server, admin, path):
    answer = server.call("GET", path, token=METRICS if path == "/metrics" else admin.token)
    kind, _, parameters = answer.headers["Content-Type"].partition(";")
    assert answer.body
    assert "charset=utf-8" in parameters or not kind.startswith("text/")


def test_no_answer_sets_a_cookie(client, user):
    login = {"email": user.email, "password": user.password}
    answers = [client.post("auth/login", json=login), client.get("users/me", token=user.token),
               client.post("auth/refresh", json={"refresh_token": user.refresh_token}),
               client.get("/api/v1/docs"), client.post("auth/logout", token=user.token)]
    assert {answer.status_code for answer in answers} == {200, 204}
    assert not any("Set-Cookie" in answer.headers for answer in answers)


@pytest.mark.parametrize("version", VERSIONS)
def test_no_answer_that_needs_a_token_is_kept_by_others(app, client, admin, version):
    ids = {"user": admin.id}
    found = {o.path: send(client, o, ids, token=admin.token) for o in read(app, version)
             if o.method == "GET" and "401" in o.responses}
    assert len(found) == 7
    for path, answer in found.items():
        kept = answer.headers["Cache-Control"]
        assert kept == "no-store" or ("private" in kept and "Authorization" in answer.vary), path


# Where it leads


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"}, {"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-Proto": "http"},
    {"X-Forwarded-Prefix": "//evil.example"}, {"Forwarded": "host=evil.example"},
])
def test_no_header_leads_away_from_here(make_app, make_client, headers):
    shop = make_client(make_app(APP_ENV="production", TRUSTED_PROXIES="1"))
    answer = shop.get("/", headers=headers | {"Accept": "text/html"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/api/v1/docs")
    for path in ("products", "/health", "/nowhere"):
        answer = shop.get(path, headers=headers)
        assert answer.status_code in (200, 404)  # no silent way to https, which would hide a leak
        assert "evil" not in str(answer.headers) + answer.text


# Tokens and mails


def test_a_token_that_was_known_as_good_ends_with_its_time(client, user, monkeypatch):
    token = altered(claims_of(user.token), exp=int(time.time()) + 60)
    assert client.get("users/me", token=token).status_code == 200
    later = time.time() + 61
    monkeypatch.setattr(jwt.time, "time", lambda: later)
    answer = client.get("users/me", token=token)
    assert (answer.status_code, answer.json["code"]) == (401, "token_expired")


class FakeServer:
    """smtplib's, for an SMTP server that offers nothing."""

    def __init__(self, host, port, timeout, context=None):
        FakeServer.calls = [("connect", context)]

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, kwargs.get("context")))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def has_extn(self, name):
        return False


@pytest.mark.parametrize("url", ["smtps://ada:secret@mail", "smtp://ada:secret@mail:587"])
def test_a_mail_password_goes_to_a_server_that_proved_its_name(monkeypatch, url):
    monkeypatch.setattr(mail.smtplib, "SMTP", FakeServer)
    monkeypatch.setattr(mail.smtplib, "SMTP_SSL", FakeServer)
    mail.deliver(url, EmailMessage())
    names = [name for name, _ in FakeServer.calls]
    before = FakeServer.calls[:names.index("login")]
    context, = [context for _, context in before if context]
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


# Who asks too much


def test_a_list_of_the_whole_shop_takes_many_counted_requests(make_app, make_client):
    shop = make_client(make_app(RATE_LIMIT="3 per 15 minutes", LOGIN_RATE_LIMIT=ENOUGH),
                       address="192.0.2.77")
    assert shop.get("products?limit=101").status_code == 422
    statuses = [shop.get(f"products?limit=100&page={page}").status_code for page in (1, 2, 3)]
    assert statuses == [200, 200, 429]
