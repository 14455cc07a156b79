"""Users, version 1: an admin's list of them, and everybody's own account."""
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest

from tests.conftest import PASSWORD, Client, execute, register, unique

FIELDS = {"id", "email", "name", "role", "email_verified", "created_at", "updated_at", "last_login"}
HUGE = 2**63 - 1
VERSIONS = pytest.mark.parametrize("users", ["users", "/api/v2/users"])


def code_of(response):
    return response.status_code, response.json["code"]


def fields_of(response):
    """The fields that a 422 names."""
    assert code_of(response) == (422, "validation_failed"), response.text
    return [detail["field"] for detail in response.json["details"]]


def named(users, name):
    """A name as a version's body has it."""
    return {"profile": {"name": name}} if "v2" in users else {"name": name}


def page_of(client, admin, query):
    response = client.get(f"users?{query}", token=admin.token)
    assert response.status_code == 200, response.text
    return response.json


@pytest.fixture(scope="module")
def person(client):
    """A user whom no test of this file changes."""
    return register(client)


@pytest.fixture(scope="module")
def crowd(database_url):
    """Seven users: (the word that only their names have, their ids in the order of creation)."""
    word = unique("crowd")
    ids = [execute(database_url, f"""
        INSERT INTO users (email, name, password_hash, role, created_at)
        VALUES ('{(7 - n) % 4}{n}{word}@example.com', '{"ZaBzCxy"[n]}{word}', '-',
                '{"admin" if n == 3 else "user"}', '2026-01-0{n // 2 + 1}')
        RETURNING id""")[0][0] for n in range(7)]
    yield word, ids
    execute(database_url, f"DELETE FROM users WHERE name LIKE '%{word}'")


# Whom one sees


def test_a_user_has_these_fields_and_no_others(client, person, admin):
    for token in (person.token, admin.token):
        body = client.get(f"users/{person.id}", token=token).json
        assert set(body) == FIELDS
        assert (body["id"], body["email"], body["role"]) == (person.id, person.email, "user")
        assert datetime.fromisoformat(body["created_at"]).utcoffset().total_seconds() == 0


@VERSIONS
def test_me_is_an_id_wherever_an_id_is(client, user, users):
    assert client.get(f"{users}/me", token=user.token).json["id"] == user.id
    changed = client.patch(f"{users}/me", token=user.token, json=named(users, "Grace Hopper"))
    assert (changed.status_code, changed.json["id"]) == (200, user.id)
    assert client.head(f"{users}/me", token=user.token).status_code == 200
    assert client.delete(f"{users}/me", token=user.token).status_code == 204
    assert client.get(f"{users}/me", token=user.token).status_code == 401


@VERSIONS
def test_someone_else_is_not_found_whether_or_not_there_is_one(client, person, other, users):
    for user_id in (other.id, HUGE):
        for method, body in (("GET", None), ("PATCH", named(users, "Mallory")), ("DELETE", None)):
            kwargs = {"json": body} if body else {}
            response = client.open(method, f"{users}/{user_id}", token=person.token, **kwargs)
            assert code_of(response) == (404, "not_found")
            assert str(other.email) not in response.text
    assert client.get(f"{users}/me", token=other.token).status_code == 200


@VERSIONS
@pytest.mark.parametrize("user_id", ["0", "-1", "1.0", "ME", "me ", "9223372036854775808", "١"])
def test_what_is_no_id_is_not_found(client, admin, users, user_id):
    for method in ("GET", "PATCH", "DELETE"):
        assert client.open(method, f"{users}/{user_id}", token=admin.token).status_code == 404


@VERSIONS
def test_an_admin_finds_everybody_who_is_there(client, admin, person, users):
    assert client.get(f"{users}/{person.id}", token=admin.token).json["id"] == person.id
    assert client.get(f"{users}/{HUGE}", token=admin.token).status_code == 404


@VERSIONS
def test_the_list_is_an_admin_s(client, person, users):
    assert code_of(client.get(users, token=person.token)) == (403, "forbidden")
    body = {"email": "x@example.com", "password": PASSWORD} | named(users, "Eve")
    assert code_of(client.post(users, token=person.token, json=body)) == (403, "forbidden")


# The list


def test_the_list_is_paged(client, admin, crowd):
    word, ids = crowd
    first = page_of(client, admin, f"search={word}&limit=3")
    assert [row["id"] for row in first["data"]] == ids[:3:-1]
    assert all(set(row) == FIELDS for row in first["data"])
    pagination = first["pagination"]
    assert (pagination["page"], pagination["limit"]) == (1, 3)
    assert (pagination["total"], pagination["pages"]) == (7, 3)
    last = page_of(client, admin, f"search={word}&limit=3&page=3")
    assert [row["id"] for row in last["data"]] == [ids[0]]
    assert last["pagination"]["next_cursor"] is None
    assert page_of(client, admin, f"search={word}&limit=3&page=4")["data"] == []


def test_a_page_links_to_the_others(client, admin, crowd):
    response = client.get(f"users?search={crowd[0]}&limit=3&page=2", token=admin.token)
    link = ", ".join(response.headers.getlist("Link"))
    links = {name: url for url, name in re.findall(r'<([^>]+)>; rel="([\w-]+)"', link)}
    assert links.pop("successor-version") == "/api/v2/users"
    numbers = {name: client.get(url, token=admin.token).json["pagination"]["page"]
               for name, url in links.items()}
    assert numbers == {"first": 1, "prev": 1, "next": 3, "last": 3}


@pytest.mark.parametrize(("sort", "key"), [
    ("name", lambda row: row["name"].lower()), ("email", lambda row: row["email"]),
    ("created_at", lambda row: row["created_at"]),
])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_the_list_is_sorted_and_ends_in_the_id(client, admin, crowd, sort, key, order):
    query = f"search={crowd[0]}&sort={sort}&order={order}"
    rows = page_of(client, admin, query)["data"]
    assert rows == sorted(rows, key=lambda row: (key(row), row["id"]), reverse=order == "desc")
    walked, cursor = [], ""
    while cursor is not None:
        page = page_of(client, admin, f"{query}&limit=2{cursor and f'&cursor={cursor}'}")
        walked += page["data"]
        cursor = page["pagination"]["next_cursor"]
    assert walked == rows


def test_a_walk_by_cursor_counts_nothing(client, admin, crowd):
    cursor = page_of(client, admin, f"search={crowd[0]}&limit=2")["pagination"]["next_cursor"]
    pagination = page_of(client, admin, f"search={crowd[0]}&limit=2&cursor={cursor}")["pagination"]
    assert {pagination[name] for name in ("page", "total", "pages")} == {None}


def test_who_comes_or_goes_during_a_walk_makes_nobody_repeat_or_go_missing(
    client, admin, database_url
):
    word = unique("walk")
    def insert(n):
        execute(database_url, "INSERT INTO users (email, name, password_hash) VALUES "
                              f"('{word}{n}@example.com', '{n} {word}', '-')")
    for n in range(2, 8):
        insert(n)
    query = f"search={word}&sort=name&order=asc&limit=2"
    first = page_of(client, admin, query)
    insert(1)
    execute(database_url, f"DELETE FROM users WHERE name = '3 {word}'")
    second = page_of(client, admin, f"{query}&cursor={first['pagination']['next_cursor']}")
    assert [row["name"][0] for row in first["data"] + second["data"]] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(("count", "total"), [("exact", 7), ("none", None)])
def test_the_price_of_the_total_can_be_chosen(client, admin, crowd, count, total):
    pagination = page_of(client, admin, f"search={crowd[0]}&count={count}")["pagination"]
    assert pagination["total"] == total


def test_an_estimated_total_is_a_number(client, admin, crowd):
    pagination = page_of(client, admin, f"search={crowd[0]}&count=estimated")["pagination"]
    assert pagination["total"] >= 0


def test_the_list_can_be_of_one_role(client, admin, crowd):
    word, ids = crowd
    assert [row["id"] for row in page_of(client, admin, f"search={word}&role=admin")["data"]] \
        == [ids[3]]
    assert len(page_of(client, admin, f"search={word}&role=user")["data"]) == 6


@pytest.mark.parametrize(("search", "count"), [
    ("{word}", 7), ("{WORD}", 7), ("Z{word}", 2), ("{word}@EXAMPLE", 7), ("{word}%25", 0),
    ("_{word}", 0), ("%25", 0), ("{word}z", 0), ("comZ{word}", 0), ("\\", 0), (" {word}", 0),
])
def test_search_is_a_substring_of_name_or_address_in_any_letter_case(
    client, admin, crowd, search, count
):
    search = search.format(word=crowd[0], WORD=crowd[0].upper())
    rows = page_of(client, admin, f"search={search}&limit=100")["data"]
    assert len([row for row in rows if crowd[0] in row["name"]]) == count


@pytest.mark.parametrize(("query", "field"), [
    ("page=0", "page"), ("page=x", "page"), ("limit=0", "limit"), ("limit=101", "limit"),
    ("page=99999999999999999999", "page"), ("sort=password_hash", "sort"), ("sort=id", "sort"),
    ("order=up", "order"), ("role=root", "role"), ("count=many", "count"), ("search=", "search"),
    (f"search={'k' * 101}", "search"), ("cursor=x", "cursor"), ("cursor=", "cursor"),
    ("fields=id", "fields"), ("page=1&page=2", "page"), ("role=user&role=admin", "role"),
])
def test_a_query_that_the_list_does_not_know_is_refused_by_its_name(client, admin, query, field):
    response = client.get(f"users?{query}", token=admin.token)
    assert fields_of(response) == [field]
    assert response.json["details"][0]["in"] == "query"


@pytest.mark.parametrize("change", ["sort=name", "order=asc", "role=user", "search=", "page=2"])
def test_a_cursor_is_bound_to_its_list(client, admin, crowd, change):
    query = f"search={crowd[0]}&limit=2"
    cursor = page_of(client, admin, query)["pagination"]["next_cursor"]
    if change == "search=":
        query, change = "limit=2", "search=crow"
    assert client.get(f"users?{query}&{change}&cursor={cursor}", token=admin.token) \
        .status_code == 422
    spoiled = cursor[:-1] + ("A" if cursor[-1] != "A" else "B")
    assert client.get(f"users?{query}&cursor={spoiled}", token=admin.token).status_code == 422


# Creating


@VERSIONS
@pytest.mark.parametrize("role", ["user", "admin", None])
def test_an_admin_creates_users_of_any_role(client, admin, users, role):
    email = f"{unique('New')}@example.com"
    body = {"email": email, "password": PASSWORD} | named(users, "Ada") | (
        {"role": role} if role else {})
    response = client.post(users, token=admin.token, json=body)
    assert response.status_code == 201
    assert response.json["role"] == (role or "user")
    assert response.json["email"] == email.lower()
    assert response.json["email_verified"] is False
    assert client.get(response.headers["Location"], token=admin.token).json == response.json
    token = client.post("auth/login", json={"email": email, "password": PASSWORD}).json["token"]
    assert client.get(users, token=token).status_code == (200 if role == "admin" else 403)


@VERSIONS
def test_a_known_address_can_not_be_created_again(client, admin, person, users):
    body = {"email": person.email.upper(), "password": PASSWORD} | named(users, "Ada")
    assert code_of(client.post(users, token=admin.token, json=body)) == (409, "email_taken")


@VERSIONS
@pytest.mark.parametrize("extra", [
    {"id": 1}, {"email_verified": True}, {"role": "root"}, {"password_hash": "x"},
    {"last_login": None}, {"role": None}, {"role": ["admin"]},
])
def test_what_can_not_be_set_at_creation_is_refused_by_its_name(client, admin, users, extra):
    body = {"email": f"{unique('n')}@example.com", "password": PASSWORD} | named(users, "Ada")
    assert fields_of(client.post(users, token=admin.token, json=body | extra)) == list(extra)


# Changing


@VERSIONS
def test_everybody_changes_their_own_name(client, user, users):
    before = client.get(f"{users}/me", token=user.token).json
    after = client.patch(f"{users}/me", token=user.token, json=named(users, " Grace ")).json
    assert after == before | named(users, "Grace") | {"updated_at": after["updated_at"]}
    assert after["updated_at"] > before["updated_at"]
    assert client.get(f"{users}/{user.id}", token=user.token).json == after


@VERSIONS
@pytest.mark.parametrize("extra", [
    {"role": "admin"}, {"role": "user"}, {"id": 1}, {"email_verified": True},
    {"password": "x" * 9}, {"password_hash": "x"}, {"created_at": "2020-01-01"}, {"is_admin": True},
])
def test_what_a_user_can_not_change_is_refused_by_its_name(client, person, users, extra):
    response = client.patch(f"{users}/me", token=person.token, json=named(users, "Eve") | extra)
    assert fields_of(response) == list(extra)
    body = client.get(f"{users}/me", token=person.token).json
    assert "Eve" not in str(body)
    assert (body["role"], body["email_verified"]) == ("user", False)


@VERSIONS
@pytest.mark.parametrize("extra", [{"id": 1}, {"email_verified": True}, {"password": "x" * 9},
                                   {"role": "root"}])
def test_what_an_admin_can_not_change_is_refused_by_its_name(client, person, admin, users, extra):
    response = client.patch(f"{users}/{person.id}", token=admin.token, json=extra)
    assert fields_of(response) == list(extra)


@VERSIONS
@pytest.mark.parametrize("body", [{}, {"current_password": PASSWORD}])
def test_a_change_of_nothing_is_refused(client, person, users, body):
    assert client.patch(f"{users}/me", token=person.token, json=body).status_code == 422


@VERSIONS
def test_an_own_new_address_takes_the_password(client, user, users):
    body = {"email": f"{unique('n')}@example.com"}
    assert fields_of(client.patch(f"{users}/me", token=user.token, json=body)) \
        == ["current_password"]
    wrong = client.patch(f"{users}/me", token=user.token, json=body | {"current_password": "wrong"})
    assert code_of(wrong) == (401, "invalid_credentials")
    right = client.patch(f"{users}/me", token=user.token,
                         json=body | {"current_password": PASSWORD})
    assert (right.status_code, right.json["email"]) == (200, body["email"])
    assert right.json["email_verified"] is False
    login = {"email": body["email"], "password": PASSWORD}
    assert client.post("auth/login", json=login).status_code == 200


def test_an_admin_s_own_new_address_takes_the_password_too(client, admin):
    body = {"email": f"{unique('n')}@example.com"}
    assert fields_of(client.patch("users/me", token=admin.token, json=body)) == ["current_password"]


def test_the_same_address_is_no_new_one(client, user, database_url):
    execute(database_url, f"UPDATE users SET email_verified = true WHERE id = {user.id}")
    body = {"email": user.email.upper(), "name": "Grace"}
    response = client.patch("users/me", token=user.token, json=body)
    assert (response.status_code, response.json["email_verified"]) == (200, True)


def test_an_admin_changes_a_user_s_address_and_it_is_unverified(client, user, admin, database_url):
    execute(database_url, f"UPDATE users SET email_verified = true WHERE id = {user.id}")
    email = f"{unique('n')}@example.com"
    response = client.patch(f"users/{user.id}", token=admin.token, json={"email": email})
    assert (response.json["email"], response.json["email_verified"]) == (email, False)


@VERSIONS
def test_nobody_takes_someone_else_s_address(client, user, person, users):
    body = {"email": person.email.upper(), "current_password": PASSWORD}
    response = client.patch(f"{users}/me", token=user.token, json=body)
    assert code_of(response) == (409, "email_taken")
    assert client.get(f"{users}/me", token=user.token).json["email"] == user.email


@VERSIONS
def test_an_admin_sets_roles(client, user, admin, users):
    for role, status in (("admin", 200), ("user", 403)):
        response = client.patch(f"{users}/{user.id}", token=admin.token, json={"role": role})
        assert (response.status_code, response.json["role"]) == (200, role)
        assert client.get(users, token=user.token).status_code == status


# If-Match


@VERSIONS
def test_a_write_under_the_current_tag_is_stored(client, user, users):
    tag = client.get(f"{users}/me", token=user.token).headers["ETag"]
    changed = client.patch(f"{users}/me", token=user.token, headers={"If-Match": tag},
                           json=named(users, "Grace"))
    assert changed.status_code == 200
    assert changed.headers["ETag"] == client.get(f"{users}/me", token=user.token).headers["ETag"]
    deleted = client.delete(f"{users}/me", token=user.token,
                            headers={"If-Match": changed.headers["ETag"]})
    assert deleted.status_code == 204


@VERSIONS
@pytest.mark.parametrize("tag", ['"stale"', 'W/{}', '"a", "b"', "nonsense"])
def test_a_write_under_another_tag_is_refused(client, person, users, tag):
    current = client.get(f"{users}/me", token=person.token).headers["ETag"]
    headers = {"If-Match": tag.format(current)}
    for method, kwargs in (("PATCH", {"json": named(users, "Grace")}), ("DELETE", {})):
        response = client.open(method, f"{users}/me", token=person.token, headers=headers, **kwargs)
        assert code_of(response) == (412, "precondition_failed")
    assert client.get(f"{users}/me", token=person.token).headers["ETag"] == current


@pytest.mark.parametrize("tag", ["*", '"other", {}'])
def test_any_tag_of_a_list_and_the_star_match(client, user, tag):
    current = client.get("users/me", token=user.token).headers["ETag"]
    response = client.patch("users/me", token=user.token, json={"name": "Grace"},
                            headers={"If-Match": tag.format(current)})
    assert response.status_code == 200


def test_of_writers_with_one_tag_one_succeeds(client, user):
    tag = client.get("users/me", token=user.token).headers["ETag"]

    def write(number):
        return client.patch("users/me", token=user.token, json={"name": f"Ada {number}"},
                            headers={"If-Match": tag}).status_code

    with ThreadPoolExecutor(8) as threads:
        assert Counter(threads.map(write, range(8))) == {200: 1, 412: 7}


def test_if_none_match_spares_the_body(client, person):
    tag = client.get("users/me", token=person.token).headers["ETag"]
    response = client.get("users/me", token=person.token, headers={"If-None-Match": tag})
    assert (response.status_code, response.data) == (304, b"")


@VERSIONS
def test_where_it_is_required_a_write_without_if_match_is_428(make_app, make_client, users):
    client = make_client(make_app(REQUIRE_IF_MATCH="1"))
    user = register(client)
    for method, kwargs in (("PATCH", {"json": named(users, "Grace")}), ("DELETE", {})):
        response = client.open(method, f"{users}/me", token=user.token, **kwargs)
        assert code_of(response) == (428, "precondition_required")
    tag = client.get(f"{users}/me", token=user.token).headers["ETag"]
    response = client.delete(f"{users}/me", token=user.token, headers={"If-Match": tag})
    assert response.status_code == 204


# Deleting


@VERSIONS
def test_deleting_a_user_keeps_the_sales_without_the_person(
    client, user, admin, make_product, users
):
    items = {"items": [{"product_id": make_product()["id"], "quantity": 2}]}
    sale = client.post("transactions", token=user.token, json=items).json
    assert sale["user_id"] == user.id
    assert client.delete(f"{users}/{user.id}", token=admin.token).status_code == 204
    kept = client.get(f"transactions/{sale['id']}", token=admin.token).json
    assert kept == sale | {"user_id": None}
    assert client.get(f"{users}/{user.id}", token=admin.token).status_code == 404
    assert client.delete(f"{users}/{user.id}", token=admin.token).status_code == 404


def test_a_deleted_user_can_neither_log_in_nor_refresh(client, user):
    client.delete("users/me", token=user.token)
    login = {"email": user.email, "password": PASSWORD}
    assert code_of(client.post("auth/login", json=login)) == (401, "invalid_credentials")
    again = client.post("auth/refresh", json={"refresh_token": user.refresh_token})
    assert code_of(again) == (401, "token_revoked")


def test_a_deleted_user_s_address_is_free_again(client, user):
    client.delete("users/me", token=user.token)
    assert register(client, email=user.email).id != user.id


# The last admin


@pytest.fixture(scope="module")
def small_shop(make_app, make_database):
    """A client of a shop that has nobody but who registers."""
    return Client(make_app(DATABASE_URL=make_database()))


@pytest.fixture
def two_admins(small_shop):
    """(client, admin, admin) of a shop that has no other users."""
    url = small_shop.app.config["DATABASE_URL"]
    execute(url, "DELETE FROM users")
    people = register(small_shop), register(small_shop)
    execute(url, "UPDATE users SET role = 'admin'")
    return small_shop, *people


REMOVALS = pytest.mark.parametrize("removal", [
    ("DELETE", None), ("PATCH", {"role": "user"}),
], ids=["deletion", "demotion"])


def remove(client, who, whom, removal, users="users"):
    method, body = removal
    kwargs = {"json": body} if body else {}
    return client.open(method, f"{users}/{whom}", token=who.token, **kwargs).status_code


@REMOVALS
def test_the_last_admin_stays(two_admins, removal):
    client, first, second = two_admins
    assert remove(client, first, second.id, removal) in (200, 204)
    for users in ("users", "/api/v2/users"):
        assert remove(client, first, "me", removal, users) == 409
        assert remove(client, first, first.id, removal, users) == 409
    assert client.get("users/me", token=first.token).json["role"] == "admin"


def test_the_last_admin_may_change_what_is_no_role(two_admins):
    client, first, second = two_admins
    remove(client, first, second.id, ("DELETE", None))
    body = {"name": "Grace", "role": "admin"}
    assert client.patch("users/me", token=first.token, json=body).status_code == 200


def test_where_there_is_another_admin_one_may_go(two_admins):
    client, first, second = two_admins
    assert remove(client, first, "me", ("PATCH", {"role": "user"})) == 200
    assert remove(client, first, "me", ("DELETE", None)) == 204
    assert remove(client, second, "me", ("DELETE", None)) == 409


@REMOVALS
def test_of_two_admins_who_remove_each_other_at_once_one_stays(two_admins, removal):
    client, first, second = two_admins
    url = client.app.config["DATABASE_URL"]
    with psycopg.connect(url) as conn, ThreadPoolExecutor(2) as threads:
        # Both are past their guards, as admins, before either is let go on.
        conn.execute("SELECT id FROM users FOR UPDATE")
        waiting = [threads.submit(remove, client, who, whom.id, removal)
                   for who, whom in ((first, second), (second, first))]
        while execute(url, "SELECT count(*) FROM pg_stat_activity WHERE "
                           "wait_event_type = 'Lock' AND datname = current_database()") != [(2,)]:
            assert not any(future.done() for future in waiting)
            time.sleep(0.01)
        conn.rollback()
        statuses = [future.result() for future in waiting]
    assert sorted(statuses) in ([200, 409], [204, 409])
    assert execute(url, "SELECT count(*) FROM users WHERE role = 'admin'") == [(1,)]


# The end of version 1's users


def announced(response, ends="Fri, 31 Dec 2027 00:00:00 GMT"):
    """Whether an answer says that this version's users end, when, and what comes after."""
    headers = response.headers
    assert re.fullmatch(r"@\d{10}", headers["Deprecation"])
    assert int(headers["Deprecation"][1:]) < datetime.now(UTC).timestamp()
    assert headers["Sunset"] == ends
    assert '</api/v2/users>; rel="successor-version"' in ", ".join(headers.getlist("Link"))
    return True


def test_every_answer_announces_the_end(client, user, admin):
    answers = {
        200: client.get("users", token=admin.token),
        201: client.post("users", token=admin.token, json={
            "email": f"{unique('n')}@example.com", "password": PASSWORD, "name": "Ada"}),
        304: client.get("users/me", token=user.token, headers={
            "If-None-Match": client.get("users/me", token=user.token).headers["ETag"]}),
        400: client.patch("users/me", token=user.token, data="{", content_type="application/json"),
        401: client.get("users/me"), 403: client.get("users", token=user.token),
        404: client.get(f"users/{HUGE}", token=admin.token),
        "404": client.get("users/nobody"),
        405: client.delete("users", token=admin.token),
        409: client.patch("users/me", token=user.token, json={
            "email": admin.email, "current_password": PASSWORD}),
        412: client.delete("users/me", token=user.token, headers={"If-Match": '"x"'}),
        415: client.patch("users/me", token=user.token, data="x", content_type="text/plain"),
        422: client.patch("users/me", token=user.token, json={}),
        204: client.delete("users/me", token=user.token),
    }
    for status, response in answers.items():
        assert response.status_code == int(status)
        assert announced(response)


def test_a_refusal_by_the_limit_announces_the_end_too(make_app, make_client):
    client = make_client(make_app(RATE_LIMIT="1 per 15 minutes"), unique("address"))
    client.get("users")
    response = client.get("users")
    assert response.status_code == 429
    assert announced(response)


def test_nothing_else_is_announced_to_end(client, person, admin):
    for path in ("/api/v2/users/me", "products", "auth/sessions", "/api/v2/auth/sessions"):
        response = client.get(path, token=person.token)
        assert response.status_code == 200
        assert not {"Deprecation", "Sunset"} & set(response.headers.keys())


def test_the_day_is_told_in_gmt(make_app, make_client):
    client = make_client(make_app(V1_USERS_SUNSET="2028-01-01T01:30:00+02:00"))
    assert announced(client.get("users"), "Fri, 31 Dec 2027 23:30:00 GMT")


def test_once_gone_version_1_is_410_and_version_2_goes_on(make_app, make_client, person, admin):
    client = make_client(make_app(V1_USERS_GONE="1", V1_USERS_SUNSET="2025-06-30"))
    for method, path in (("GET", "users"), ("POST", "users"), ("GET", "users/me"),
                         ("PATCH", "users/me"), ("DELETE", "users/me")):
        for token in (person.token, None):
            response = client.open(method, path, token=token)
            assert code_of(response) == (410, "gone")
            assert announced(response, "Mon, 30 Jun 2025 00:00:00 GMT")
    assert client.get("/api/v2/users/me", token=person.token).status_code == 200
    assert client.get("/api/v2/users", token=admin.token).status_code == 200
    assert client.get("auth/sessions", token=person.token).status_code == 200


@pytest.mark.parametrize("switch", [
    {"V1_USERS_GONE": "1", "V1_USERS_SUNSET": "2999-01-01"},
    {"V1_USERS_GONE": "0", "V1_USERS_SUNSET": "2025-06-30"},
])
def test_version_1_goes_on_before_its_day_or_without_the_switch(
    make_app, make_client, person, switch
):
    client = make_client(make_app(**switch))
    assert client.get("users/me", token=person.token).status_code == 200
