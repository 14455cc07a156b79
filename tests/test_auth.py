"""Accounts: registration, login, sessions and their end, on every worker at once."""
import json
import logging
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import psycopg
import pytest

from extensions.http.logs import Json
from tests.conftest import PASSWORD, execute, register, unique

NEW_PASSWORD = "another long walk"


def log_in(client, person, password=PASSWORD, **kwargs):
    return client.post(
        "auth/login", json={"email": person.email, "password": password}, **kwargs
    )


def refresh(client, refresh_token):
    return client.post("auth/refresh", json={"refresh_token": refresh_token})


def code_of(response):
    return response.status_code, response.json["code"]


REVOKED = (401, "token_revoked")


# Registration


def test_registration_gives_a_user_and_a_session(client):
    email = f"{unique('New')}@Example.com"
    response = client.post("auth/register",
                           json={"email": email, "password": PASSWORD, "name": "Ada"})
    assert response.status_code == 201
    body = response.json
    assert body["user"]["email"] == email.lower()
    assert body["user"]["role"] == "user"
    assert body["token_type"] == "Bearer"
    assert body["expires_in"] == 900
    assert response.headers["Location"] == f"/api/v1/users/{body['user']['id']}"
    assert client.get("users/me", token=body["token"]).json["id"] == body["user"]["id"]


@pytest.mark.parametrize("path", ["auth/register", "auth/login", "auth/refresh"])
def test_answers_with_tokens_are_not_stored_anywhere(client, user, path):
    body = {"auth/register": {"email": f"{unique('u')}@example.com", "password": PASSWORD,
                              "name": "Ada"},
            "auth/login": {"email": user.email, "password": PASSWORD},
            "auth/refresh": {"refresh_token": user.refresh_token}}[path]
    assert client.post(path, json=body).headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("shape", [str, str.upper, str.title, lambda email: f" {email}\t"])
def test_a_known_email_is_taken_in_any_letter_case(client, user, shape):
    response = client.post("auth/register", json={
        "email": shape(user.email), "password": PASSWORD, "name": "Ada"})
    assert code_of(response) == (409, "email_taken")


def test_of_20_registrations_of_one_address_at_once_one_gets_it(client, database_url):
    email = f"{unique('race')}@example.com"

    def attempt(number):
        shaped = email.upper() if number % 2 else email
        body = {"email": shaped, "password": PASSWORD, "name": f"Ada {number}"}
        return client.post("auth/register", json=body).status_code

    with ThreadPoolExecutor(20) as threads:
        assert Counter(threads.map(attempt, range(20))) == {201: 1, 409: 19}
    assert execute(database_url, f"SELECT count(*) FROM users WHERE lower(email) = '{email}'") \
        == [(1,)]


@pytest.mark.parametrize(("field", "value"), [
    ("role", "admin"), ("role", "user"), ("id", 1), ("email_verified", True), ("is_admin", True),
    ("password_hash", "x"), ("created_at", "2020-01-01"), ("last_login", None), ("", ""),
])
def test_nothing_but_email_password_and_name_can_be_registered(client, field, value):
    response = client.post("auth/register", json={
        "email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada", field: value})
    assert code_of(response) == (422, "validation_failed")
    assert [detail["field"] for detail in response.json["details"]] == [field]


@pytest.mark.parametrize(("field", "value"), [
    ("email", "ada"), ("email", "ada@"), ("email", "@example.com"), ("email", "a b@example.com"),
    ("email", None), ("email", 7), ("email", f"{'a' * 250}@example.com"), ("email", ""),
    ("email", "ada@example.com\r\nBcc: all@example.com"), ("email", '"a\vb"@example.com'),
    ("email", '"a\x1fb"@example.com'), ("email", "ada@example.com, bob@example.com"),
    ("name", "A"), ("name", " A "), ("name", "A" * 101), ("name", None), ("name", "A\nB"),
    ("name", ["Ada"]),
])
def test_what_is_no_email_or_no_name_is_refused_by_its_field(client, field, value):
    body = {"email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada"}
    response = client.post("auth/register", json=body | {field: value})
    assert code_of(response) == (422, "validation_failed")
    assert {detail["field"] for detail in response.json["details"]} == {field}


def test_every_field_that_is_wrong_is_named(client):
    response = client.post("auth/register", json={"email": "ada", "role": "admin"})
    assert {detail["field"] for detail in response.json["details"]} == \
        {"email", "password", "name", "role"}


# Login


def test_login_sets_last_login(client, user, admin):
    before = client.get(f"users/{user.id}", token=admin.token).json["last_login"]
    response = log_in(client, user)
    assert response.status_code == 200
    assert response.json["user"]["last_login"] > before


def test_login_knows_the_address_in_any_letter_case(client, user):
    body = {"email": user.email.upper(), "password": PASSWORD}
    assert client.post("auth/login", json=body).json["user"]["id"] == user.id


def test_a_login_leaves_other_sessions_open(client, user):
    log_in(client, user)
    assert client.get("users/me", token=user.token).status_code == 200


def test_a_login_clears_the_user_s_sessions_that_are_over(client, user, database_url):
    execute(database_url, f"UPDATE sessions SET expires_at = now() WHERE user_id = {user.id}")
    log_in(client, user)
    assert execute(database_url, f"SELECT count(*) FROM sessions WHERE user_id = {user.id}") \
        == [(1,)]


def test_no_answer_holds_a_password_or_its_hash(client, user, admin):
    answers = [log_in(client, user), client.get("users/me", token=user.token),
               client.get("auth/sessions", token=user.token),
               client.get("users?limit=100", token=admin.token),
               client.get("/api/v2/users?limit=100", token=admin.token),
               client.patch("users/me", token=user.token, json={"name": "Ada"})]
    for response in answers:
        assert response.status_code == 200
        for secret in ("password", "argon2", "hash", PASSWORD):
            assert secret not in response.text


# Refresh


def test_refresh_rotates_and_a_replay_ends_the_session(client, user, database_url):
    first = refresh(client, user.refresh_token).json
    age_rotation(database_url, user)
    assert code_of(refresh(client, user.refresh_token)) == REVOKED
    assert code_of(client.get("users/me", token=first["token"])) == REVOKED
    assert code_of(refresh(client, first["refresh_token"])) == REVOKED


def age_rotation(database_url, person, by="11 s"):
    execute(database_url, f"UPDATE sessions SET rotated_at = rotated_at - interval '{by}' "
                          f"WHERE user_id = {person.id}")


def test_a_replay_leaves_the_user_s_other_sessions_open(client, user, database_url):
    elsewhere = log_in(client, user).json
    refresh(client, user.refresh_token)
    age_rotation(database_url, user)
    assert refresh(client, user.refresh_token).status_code == 401
    assert client.get("users/me", token=elsewhere["token"]).status_code == 200


def test_a_twin_within_ten_seconds_can_go_on(client, user, database_url):
    first = refresh(client, user.refresh_token).json
    age_rotation(database_url, user, "8 s")
    twin = refresh(client, user.refresh_token).json
    for pair in (first, twin):
        assert client.get("users/me", token=pair["token"]).status_code == 200
    assert refresh(client, twin["refresh_token"]).status_code == 200
    assert refresh(client, first["refresh_token"]).status_code == 200


def test_a_token_two_rotations_old_ends_the_session_at_once(client, user):
    second = refresh(client, user.refresh_token).json
    third = refresh(client, second["refresh_token"]).json
    assert code_of(refresh(client, user.refresh_token)) == REVOKED
    assert client.get("users/me", token=third["token"]).status_code == 401


def test_of_parallel_refreshes_exactly_one_rotates_and_all_can_go_on(server, user, database_url):
    def use(_):
        return server.call("POST", "auth/refresh", json={"refresh_token": user.refresh_token})

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(use, range(16)))
    assert Counter(answer.status for answer in answers) == {200: 16}
    assert execute(database_url, f"SELECT generation FROM sessions WHERE user_id = {user.id}") \
        == [(1,)]
    assert server.call("GET", "users/me", token=answers[-1].json()["token"]).status == 200
    assert server.call("POST", "auth/refresh", json={
        "refresh_token": answers[0].json()["refresh_token"]}).status == 200


def test_of_parallel_replays_none_is_answered_and_the_session_is_over(
    client, server, user, database_url
):
    latest = refresh(client, user.refresh_token).json
    age_rotation(database_url, user)

    def replay(_):
        return server.call("POST", "auth/refresh",
                           json={"refresh_token": user.refresh_token}).status

    with ThreadPoolExecutor(16) as threads:
        assert Counter(threads.map(replay, range(16))) == {401: 16}
    assert server.call("GET", "users/me", token=latest["token"]).status == 401


def test_refresh_shows_the_role_of_this_moment(client, user, admin):
    client.patch(f"users/{user.id}", token=admin.token, json={"role": "admin"})
    token = refresh(client, user.refresh_token).json["token"]
    assert client.get("users", token=token).status_code == 200


# The end of sessions, on every worker


def on_each_worker(server, call):
    """The statuses of a call made of each worker in turn, while the other ones stand still."""
    pids, statuses = server.worker_pids, []
    assert len(pids) == 2
    for stopped in pids:
        os.kill(stopped, signal.SIGSTOP)
        try:
            statuses.append(call().status)
        finally:
            os.kill(stopped, signal.SIGCONT)
    return statuses


@pytest.fixture
def each_worker(server):
    """A function: the statuses of ``GET path`` with a token, one from each worker."""
    return lambda token, path="users/me": on_each_worker(
        server, lambda: server.call("GET", path, token=token))


def test_logout_counts_on_every_worker_at_once(each_worker, server, user):
    assert each_worker(user.token) == [200, 200]
    assert server.call("POST", "auth/logout", token=user.token).status == 204
    assert each_worker(user.token) == [401, 401]


def test_deletion_counts_on_every_worker_at_once(each_worker, server, user, admin):
    assert each_worker(user.token) == [200, 200]
    assert server.call("DELETE", f"users/{user.id}", token=admin.token).status == 204
    assert each_worker(user.token) == [401, 401]


def test_promotion_and_demotion_count_on_every_worker_at_once(each_worker, server, user, admin):
    assert each_worker(user.token, "users") == [403, 403]
    for role, statuses in (("admin", [200, 200]), ("user", [403, 403])):
        server.call("PATCH", f"users/{user.id}", token=admin.token, json={"role": role})
        assert each_worker(user.token, "users") == statuses


def test_a_new_password_ends_other_sessions_on_every_worker_at_once(
    each_worker, client, server, user
):
    elsewhere = log_in(client, user).json["token"]
    assert each_worker(elsewhere) == [200, 200]
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert server.call("POST", "auth/password", token=user.token, json=body).status == 204
    assert each_worker(elsewhere) == [401, 401]
    assert each_worker(user.token) == [200, 200]


@pytest.fixture
def without_redis(make_app, make_client, tmp_path):
    return make_client(make_app(REDIS_URL=f"unix://{tmp_path}/nothing"))


def test_sessions_need_no_redis(without_redis, client):
    person = register(without_redis)
    pair = log_in(without_redis, person).json
    token = refresh(without_redis, pair["refresh_token"]).json["token"]
    assert without_redis.post("auth/logout", token=token).status_code == 204
    for shop in (without_redis, client):
        assert code_of(shop.get("users/me", token=token)) == REVOKED
        assert shop.get("users/me", token=person.token).status_code == 200


def test_without_redis_deletion_demotion_and_a_new_password_count_at_once(
    without_redis, user, other, admin
):
    shop = without_redis
    shop.patch(f"users/{user.id}", token=admin.token, json={"role": "admin"})
    assert shop.get("users", token=user.token).status_code == 200
    shop.patch(f"users/{user.id}", token=admin.token, json={"role": "user"})
    assert shop.get("users", token=user.token).status_code == 403
    elsewhere = log_in(shop, user).json["token"]
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    shop.post("auth/password", token=user.token, json=body)
    assert code_of(shop.get("users/me", token=elsewhere)) == REVOKED
    shop.delete(f"users/{other.id}", token=admin.token)
    assert code_of(shop.get("users/me", token=other.token)) == REVOKED


# Logout


def test_logout_kills_the_session_at_once(client, user):
    assert client.post("auth/logout", token=user.token).status_code == 204
    assert code_of(client.get("users/me", token=user.token)) == REVOKED
    assert code_of(refresh(client, user.refresh_token)) == REVOKED
    assert code_of(client.post("auth/logout", token=user.token)) == REVOKED


def test_logout_leaves_other_sessions_open(client, user):
    elsewhere = log_in(client, user).json
    client.post("auth/logout?everywhere=false", token=user.token)
    assert client.get("users/me", token=elsewhere["token"]).status_code == 200


def test_logout_everywhere_ends_all_of_the_user_s_sessions_and_no_other_s(client, user, other):
    elsewhere = log_in(client, user).json
    assert client.post("auth/logout?everywhere=true", token=user.token).status_code == 204
    for token in (user.token, elsewhere["token"]):
        assert code_of(client.get("users/me", token=token)) == REVOKED
    assert code_of(refresh(client, elsewhere["refresh_token"])) == REVOKED
    assert client.get("users/me", token=other.token).status_code == 200


@pytest.mark.parametrize("query", ["everywhere=maybe", "everywhere=1", "everywhere=",
                                   "everywhere=true&everywhere=true", "all=true"])
def test_a_logout_that_asks_for_something_else_ends_nothing(client, user, query):
    assert code_of(client.post(f"auth/logout?{query}", token=user.token))[0] == 422
    assert client.get("users/me", token=user.token).status_code == 200


# The list of sessions


def sessions_of(client, token):
    response = client.get("auth/sessions", token=token)
    assert response.status_code == 200
    return response.json["data"]


def test_the_list_tells_sessions_apart(make_client, app, client, user):
    phone = make_client(app, "203.0.113.9")
    token = log_in(phone, user, headers={"User-Agent": "Phone/1.0"}).json["token"]
    here, there = sorted(sessions_of(phone, token), key=lambda s: not s["current"])
    assert [here["current"], there["current"]] == [True, False]
    assert (here["user_agent"], here["address"]) == ("Phone/1.0", "203.0.113.9")
    assert there["address"] == "127.0.0.1"
    assert {s["id"] for s in sessions_of(client, user.token) if s["current"]} == {there["id"]}


def test_the_list_says_when_a_session_began_was_used_and_ends(client, user):
    [session] = sessions_of(client, user.token)
    began, used, ends = (datetime.fromisoformat(session[name])
                         for name in ("created_at", "last_used_at", "expires_at"))
    assert began <= used
    assert (ends - began).days == 7


def test_a_session_in_use_is_seen_as_used(client, user, database_url):
    execute(database_url, "UPDATE sessions SET last_used_at = now() - interval '1 hour' "
                          f"WHERE user_id = {user.id}")
    client.get("users/me", token=user.token)
    [(recent,)] = execute(database_url, "SELECT last_used_at > now() - interval '1 minute' "
                                        f"FROM sessions WHERE user_id = {user.id}")
    assert recent


def test_a_session_that_is_over_is_not_listed(client, user, database_url):
    token = log_in(client, user).json["token"]
    [current] = [s["id"] for s in sessions_of(client, token) if s["current"]]
    execute(database_url, "UPDATE sessions SET expires_at = now() "
                          f"WHERE user_id = {user.id} AND id <> {current}")
    assert [s["id"] for s in sessions_of(client, token)] == [current]


@pytest.mark.parametrize("agent", ["", "x" * 5000, "Ünïcode \x7f"])
def test_any_user_agent_will_do(client, user, agent):
    token = log_in(client, user, headers={"User-Agent": agent.encode().decode("latin-1")})
    [session] = [s for s in sessions_of(client, token.json["token"]) if s["current"]]
    assert len(session["user_agent"] or "") <= 200


def test_a_session_can_be_ended_from_another_one(client, user):
    token = log_in(client, user).json["token"]
    [session] = [s["id"] for s in sessions_of(client, user.token) if s["current"]]
    assert client.delete(f"auth/sessions/{session}", token=token).status_code == 204
    assert code_of(client.get("users/me", token=user.token)) == REVOKED
    assert client.delete(f"auth/sessions/{session}", token=token).status_code == 404


def test_someone_else_s_session_is_not_found_not_even_by_an_admin(client, user, other, admin):
    [session] = [s["id"] for s in sessions_of(client, user.token)]
    for token in (other.token, admin.token):
        assert client.delete(f"auth/sessions/{session}", token=token).status_code == 404
    assert client.get("users/me", token=user.token).status_code == 200


@pytest.mark.parametrize("session", ["0", "-1", "me", "1.0", "9223372036854775808", "٣"])
def test_what_is_no_id_is_no_session(client, user, session):
    assert client.delete(f"auth/sessions/{session}", token=user.token).status_code == 404


# Password


def test_a_new_password_takes_the_old_one_s_place(client, user):
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    assert client.post("auth/password", token=user.token, json=body).status_code == 204
    assert log_in(client, user).status_code == 401
    assert log_in(client, user, NEW_PASSWORD).status_code == 200


def test_a_new_password_ends_every_session_but_this_one(client, user):
    elsewhere = log_in(client, user).json
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    client.post("auth/password", token=user.token, json=body)
    assert code_of(refresh(client, elsewhere["refresh_token"])) == REVOKED
    assert refresh(client, user.refresh_token).status_code == 200


def test_a_new_password_takes_the_current_one(client, user):
    for current in ("a wrong password", f"{PASSWORD} "):
        body = {"current_password": current, "new_password": NEW_PASSWORD}
        response = client.post("auth/password", token=user.token, json=body)
        assert code_of(response) == (401, "invalid_credentials")
    response = client.post("auth/password", token=user.token, json={"new_password": NEW_PASSWORD})
    assert [detail["field"] for detail in response.json["details"]] == ["current_password"]
    assert log_in(client, user).status_code == 200


def test_of_new_passwords_at_once_one_is_stored(client, user):
    def change(number):
        body = {"current_password": PASSWORD, "new_password": f"new password {number}"}
        return client.post("auth/password", token=user.token, json=body).status_code

    # Four, for each counts as a try until it has shown the right password.
    with ThreadPoolExecutor(4) as threads:
        statuses = list(threads.map(change, range(4)))
    assert statuses.count(204) == 1
    assert set(statuses) <= {204, 401, 409}
    winner = f"new password {statuses.index(204)}"
    assert log_in(client, user, winner).status_code == 200


def test_a_user_who_is_deleted_while_the_password_is_checked_is_401(client, user, database_url):
    def change():
        body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
        return client.post("auth/password", token=user.token, json=body)

    with psycopg.connect(database_url) as conn, ThreadPoolExecutor(1) as threads:
        conn.execute("LOCK TABLE login_failures")
        waiting = threads.submit(change)  # past the guard, before the password
        while execute(database_url, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = "
                                    "'Lock' AND datname = current_database()") != [(1,)]:
            assert not waiting.done()
            time.sleep(0.01)
        execute(database_url, f"DELETE FROM users WHERE id = {user.id}")
        conn.rollback()
        assert code_of(waiting.result()) == REVOKED


# Security events


@pytest.fixture
def events():
    """The security log, as an operator reads it: one dict a line."""
    lines, logger = [], logging.getLogger("shopfront.security")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(Json().format(record)))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def noted(events):
    """A function: holds the one event of this name, of the MARKED request, to these facts."""
    def look(name, **facts):
        [line] = [line for line in events
                  if line["event"] == name and line["request_id"] == MARKED["X-Request-ID"]]
        assert line["address"] == "127.0.0.1"
        assert line["time"]
        assert line | facts == line, line
    return look


MARKED = {"X-Request-ID": "the-request"}


def test_a_registration_and_a_login_are_logged(client, noted):
    body = {"email": f"{unique('u')}@example.com", "password": PASSWORD}
    user_id = client.post("auth/register", json=body | {"name": "Ada"}, headers=MARKED) \
        .json["user"]["id"]
    noted("registered", user_id=user_id)
    client.post("auth/login", json=body, headers=MARKED)
    noted("logged_in", user_id=user_id)


def test_a_failed_login_and_a_lockout_are_logged(client, user, noted):
    log_in(client, user, "a wrong password", headers=MARKED)
    noted("login_failed", email=user.email)
    for _ in range(4):
        log_in(client, user, "a wrong password")
    assert log_in(client, user, headers=MARKED).status_code == 429
    noted("login_blocked", email=user.email)


def test_guessing_and_lockout_with_a_token_are_logged(client, user, noted):
    def guess(**kwargs):
        body = {"current_password": "a wrong password", "new_password": NEW_PASSWORD}
        return client.post("auth/password", token=user.token, json=body, **kwargs)

    guess(headers=MARKED)
    noted("password_check_failed", user_id=user.id)
    for _ in range(4):
        guess()
    assert guess(headers=MARKED).status_code == 429
    noted("login_blocked", email=user.email)


def test_the_re_use_of_a_refresh_token_is_logged(client, user, database_url, noted):
    refresh(client, user.refresh_token)
    age_rotation(database_url, user)
    client.post("auth/refresh", json={"refresh_token": user.refresh_token}, headers=MARKED)
    noted("refresh_token_reused", user_id=user.id)


def test_a_new_password_is_logged(client, user, noted):
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    client.post("auth/password", token=user.token, json=body, headers=MARKED)
    noted("password_changed", user_id=user.id)


def test_changes_of_role_and_address_and_deletion_are_logged_with_who_did_it(
    client, user, admin, noted
):
    body = {"role": "admin", "email": f"{unique('new')}@example.com"}
    client.patch(f"users/{user.id}", token=admin.token, json=body, headers=MARKED)
    noted("role_changed", user_id=user.id, role="admin", by=admin.id)
    noted("email_changed", user_id=user.id, by=admin.id)
    client.delete(f"users/{user.id}", token=admin.token, headers=MARKED)
    noted("user_deleted", user_id=user.id, by=admin.id)


@pytest.mark.parametrize("path", ["users", "/api/v2/users", f"transactions?user_id={2**62}"])
def test_who_may_not_do_something_and_tries_is_logged(client, user, noted, path):
    assert client.get(path, token=user.token, headers=MARKED).status_code == 403
    path = f"/api/v1/{path}" if path[0] != "/" else path
    noted("forbidden", user_id=user.id, method="GET", path=path.partition("?")[0])


def test_no_password_token_or_hash_is_ever_logged(client, events, capfd, database_url):
    logging.getLogger("shopfront").setLevel(logging.DEBUG)
    person = register(client)
    pair = log_in(client, person).json
    log_in(client, person, "a wrong password")
    newer = refresh(client, pair["refresh_token"]).json
    age_rotation(database_url, person)
    refresh(client, pair["refresh_token"])
    body = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}
    client.post("auth/password", token=person.token, json=body)
    client.get("users/me", token=f"{person.token}x")
    client.post("auth/password/forgot", json={"email": person.email})
    client.post("auth/password/reset", json={"token": "made-up-token", "password": NEW_PASSWORD})
    hashes = execute(database_url, f"SELECT password_hash FROM users WHERE id = {person.id}")
    logging.getLogger("shopfront").setLevel(logging.ERROR)
    text = capfd.readouterr().out + json.dumps(events)
    assert "logged_in" in text
    for secret in (PASSWORD, NEW_PASSWORD, "a wrong password", "argon2", "made-up-token",
                   person.token, pair["token"], pair["refresh_token"], newer["refresh_token"],
                   person.token.rpartition(".")[2], hashes[0][0]):
        assert secret not in text
