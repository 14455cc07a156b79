"""Guessing passwords: after five failures for an account from an address, each try has to wait."""
import pathlib
import resource
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import PASSWORD, Client, execute, register, unique


def try_login(client, email, password="a wrong password"):
    return client.post("auth/login", json={"email": email, "password": password})


def fail(client, email, times):
    for _ in range(times):
        assert try_login(client, email).status_code == 401


def wait_of(response):
    """The seconds that a refusal asks for."""
    assert (response.status_code, response.json["code"]) == (429, "rate_limited")
    return int(response.headers["Retry-After"])


def alter(database_url, email, change="blocked_until = now()"):
    """Change what is kept of an account's failures; as it stands, its wait is over."""
    execute(database_url, f"UPDATE login_failures SET {change} "
                          f"WHERE account = sha256(convert_to('{email}', 'UTF8'))")


def test_the_sixth_try_after_five_failures_has_to_wait_even_with_the_right_password(client, user):
    fail(client, user.email, 5)
    assert 1 <= wait_of(try_login(client, user.email, PASSWORD)) <= 5


def test_four_failures_cost_nothing(client, user):
    fail(client, user.email, 4)
    assert try_login(client, user.email, PASSWORD).status_code == 200


def test_the_wait_doubles_with_each_failure_up_to_an_hour(client, user, database_url):
    fail(client, user.email, 5)
    waits = [wait_of(try_login(client, user.email))]
    for _ in range(4):
        alter(database_url, user.email)
        fail(client, user.email, 1)
        waits.append(wait_of(try_login(client, user.email)))
    assert all(limit - 2 <= wait <= limit
               for wait, limit in zip(waits, (5, 10, 20, 40, 80), strict=True))
    alter(database_url, user.email, "failures = 1000, blocked_until = now()")
    fail(client, user.email, 1)
    assert 3590 <= wait_of(try_login(client, user.email)) <= 3600


def test_trying_while_blocked_does_not_lengthen_the_wait(client, user):
    fail(client, user.email, 5)
    waits = [wait_of(try_login(client, user.email)) for _ in range(10)]
    assert waits == sorted(waits, reverse=True)


def test_after_the_wait_the_owner_gets_in_and_starts_anew(client, user, database_url):
    fail(client, user.email, 5)
    alter(database_url, user.email)
    assert try_login(client, user.email, PASSWORD).status_code == 200
    fail(client, user.email, 4)
    assert try_login(client, user.email, PASSWORD).status_code == 200


def test_a_day_without_a_try_forgets_the_failures(client, user, database_url):
    fail(client, user.email, 5)
    alter(database_url, user.email, "blocked_until = now(), last_at = now() - interval '25 hours'")
    fail(client, user.email, 5)
    assert wait_of(try_login(client, user.email)) <= 5


def test_the_owner_at_another_address_still_gets_in(app, client, user):
    fail(client, user.email, 5)
    wait_of(try_login(client, user.email))
    assert try_login(Client(app, "198.51.100.7"), user.email, PASSWORD).status_code == 200
    wait_of(try_login(client, user.email, PASSWORD))


def test_another_account_at_the_same_address_is_not_held_up(client, user, other):
    fail(client, user.email, 5)
    assert try_login(client, other.email, PASSWORD).status_code == 200


def test_other_letter_cases_of_the_address_are_the_same_account(client, user):
    for email in (user.email.upper(), user.email.title(), f" {user.email} ", user.email):
        fail(client, email, 1)
    fail(client, user.email, 1)
    wait_of(try_login(client, user.email.upper(), PASSWORD))


def test_an_unknown_account_is_throttled_alike(client, user, database_url):
    unknown = f"{unique('nobody')}@example.com"
    for email in (user.email, unknown):
        fail(client, email, 5)
    known, none = (try_login(client, email) for email in (user.email, unknown))
    assert told(known) == told(none)
    assert wait_of(known) <= 5
    assert wait_of(none) <= 5
    assert kept(database_url, user.email) == kept(database_url, unknown)


def kept(database_url, email):
    """What is kept of an account's failures: how many, and how long the last one made it wait."""
    return execute(database_url, "SELECT failures, blocked_until - last_at FROM login_failures "
                                 f"WHERE account = sha256(convert_to('{email}', 'UTF8'))")


def test_of_30_guesses_at_once_at_most_five_are_checked(server, user):
    def guess(number):
        body = {"email": user.email, "password": f"guess number {number}"}
        return server.call("POST", "auth/login", json=body).status

    with ThreadPoolExecutor(30) as threads:
        assert Counter(threads.map(guess, range(30))) == {401: 5, 429: 25}


def test_many_logins_at_once_take_the_memory_of_one(serve, user):
    """Each hash takes 19 MiB; a thread that hashed would keep them."""
    server = serve(workers=1)
    pid, = server.worker_pids
    assert server.call("POST", "/api/v1/auth/login", json={
        "email": user.email, "password": PASSWORD}).status == 200
    before = resident(pid)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: server.call("POST", "/api/v1/auth/login", json={
            "email": f"{unique()}@example.com", "password": "a wrong guess"}).status,
            range(32))) == {401}
    assert resident(pid) < before + 38 * 2**20


def resident(pid):
    """The bytes that a process has in memory."""
    pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_the_wait_holds_while_redis_is_dead(make_app, make_client, user, tmp_path):
    client = make_client(make_app(REDIS_URL=f"unix://{tmp_path}/nothing"))
    fail(client, user.email, 5)
    wait_of(try_login(client, user.email, PASSWORD))


@pytest.mark.parametrize(("method", "path", "body"), [
    ("POST", "auth/password", {"new_password": "another long walk"}),
    ("PATCH", "users/me", {"email": "new-address@example.com"}),
    ("PATCH", "/api/v2/users/me", {"email": "new-address@example.com"}),
])
def test_guessing_the_current_password_with_a_token_is_throttled_too(
    client, user, method, path, body
):
    def guess(password):
        return client.open(method, path, token=user.token,
                           json=body | {"current_password": password})

    assert [guess("a wrong password").status_code for _ in range(5)] == [401] * 5
    wait_of(guess(PASSWORD))
    wait_of(try_login(client, user.email, PASSWORD))


def told(response):
    """What an error tells, without what differs from request to request."""
    return {k: v for k, v in response.json.items() if k != "request_id"}


def test_an_unknown_address_and_a_wrong_password_are_told_alike(client, user):
    unknown = try_login(client, f"{unique('nobody')}@example.com")
    wrong = try_login(client, user.email)
    assert told(unknown) == told(wrong)
    assert unknown.json["code"] == "invalid_credentials"
    assert set(unknown.headers.keys()) == set(wrong.headers.keys())
    assert len(unknown.data) == len(wrong.data)


def test_an_unknown_address_and_a_wrong_password_take_the_same_time(app, user):
    client, times = Client(app), {user.email: [], f"{unique('nobody')}@example.com": []}
    for number in range(60):
        client.address = f"192.0.2.{number}"  # each has tries left
        for email, spent in sorted(times.items(), reverse=number % 2):
            start = time.perf_counter()
            assert try_login(client, email).status_code == 401
            spent.append(time.perf_counter() - start)
        # Fifteen tries will do. On a busy machine more may be needed: noise wanes with their
        # number, a difference doesn't.
        known, unknown = map(statistics.median, times.values())
        alike = abs(known - unknown) < max(0.010, 0.35 * min(known, unknown))
        if number >= 14 and alike:
            break
    print(f"medians: known {known * 1000:.1f} ms, unknown {unknown * 1000:.1f} ms")
    assert alike


@pytest.mark.parametrize("body", [
    {"password": PASSWORD}, {"email": "ada@example.com"}, {}, {"email": 1, "password": PASSWORD},
    {"email": "ada", "password": PASSWORD}, {"email": "ada@example.com", "password": ""},
    {"email": "ada@example.com", "password": "k" * 1025},
    {"email": "ada@example.com", "password": PASSWORD, "remember": True},
])
def test_what_is_no_login_is_422_and_counts_as_none(client, body):
    assert client.post("auth/login", json=body).status_code == 422


def test_a_login_may_come_as_a_form(client):
    person = register(client)
    response = client.post("auth/login", data={"email": person.email, "password": PASSWORD})
    assert response.status_code == 200


def test_many_right_logins_at_once_are_all_let_in(server, user):
    def log_in(_):
        return server.call("POST", "auth/login",
                           json={"email": user.email, "password": PASSWORD}).status

    with ThreadPoolExecutor(12) as threads:
        assert Counter(threads.map(log_in, range(12))) == {200: 12}
