"""Users, version 2: another shape, and a list that is walked by cursor only."""
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.conftest import PASSWORD, execute, unique

USERS = "/api/v2/users"
FIELDS = {"id", "email", "role", "profile", "email_verified", "created_at", "updated_at",
          "last_login_at"}


@pytest.fixture(scope="module")
def crowd(database_url):
    """Seven users: (the word that only their names have, their ids in the order of creation)."""
    word = unique("throng")
    ids = [execute(database_url, f"""
        INSERT INTO users (email, name, password_hash, role, created_at)
        VALUES ('{(7 - n) % 4}{n}{word}@example.com', '{"ZaBzCxy"[n]}{word}', '-',
                '{"admin" if n == 3 else "user"}', '2026-01-0{n // 2 + 1}')
        RETURNING id""")[0][0] for n in range(7)]
    yield word, ids
    execute(database_url, f"DELETE FROM users WHERE name LIKE '%{word}'")


def walk(client, admin, query):
    """Every page of a list, following ``links.next`` to the end."""
    url = f"{USERS}?{query}"
    while url is not None:
        response = client.get(url, token=admin.token)
        assert response.status_code == 200, response.text
        yield response.json
        url = response.json["links"]["next"]


def fields_of(response):
    assert (response.status_code, response.json["code"]) == (422, "validation_failed")
    return [detail["field"] for detail in response.json["details"]]


def test_a_user_has_the_shape_of_version_2(client, user, admin):
    for path, token in (("me", user.token), (user.id, admin.token)):
        body = client.get(f"{USERS}/{path}", token=token).json
        assert set(body) == FIELDS
        assert body["profile"] == {"name": "Ada Lovelace"}
        assert body["last_login_at"]


def test_both_versions_show_the_same_user(client, user):
    old = client.get("users/me", token=user.token).json
    new = client.get(f"{USERS}/me", token=user.token).json
    assert new.pop("profile") == {"name": old.pop("name")}
    assert new.pop("last_login_at") == old.pop("last_login")
    assert new == old


def test_a_change_in_one_version_is_seen_in_the_other(client, user):
    body = {"profile": {"name": "Grace Hopper"}}
    assert client.patch(f"{USERS}/me", token=user.token, json=body).json["profile"] \
        == body["profile"]
    assert client.get("users/me", token=user.token).json["name"] == "Grace Hopper"


def test_each_version_has_its_own_tag(client, user):
    old = client.get("users/me", token=user.token).headers["ETag"]
    new = client.get(f"{USERS}/me", token=user.token).headers["ETag"]
    assert old != new
    response = client.patch(f"{USERS}/me", token=user.token, headers={"If-Match": old},
                            json={"profile": {"name": "Grace"}})
    assert response.status_code == 412


def test_the_list_has_rows_and_links_and_nothing_else(client, admin, crowd):
    word, ids = crowd
    body = client.get(f"{USERS}?search={word}", token=admin.token).json
    assert set(body) == {"data", "links"}
    assert [row["id"] for row in body["data"]] == ids[::-1]
    assert all(set(row) == FIELDS for row in body["data"])
    assert set(body["links"]) == {"self", "next"}
    assert body["links"]["next"] is None


@pytest.mark.parametrize(("sort", "key"), [
    ("name", lambda row: row["profile"]["name"].lower()), ("email", lambda row: row["email"]),
    ("created_at", lambda row: row["created_at"]),
])
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [2, 7])
def test_the_links_lead_through_the_whole_list_in_its_order(
    client, admin, crowd, sort, key, order, limit
):
    pages = list(walk(client, admin, f"search={crowd[0]}&sort={sort}&order={order}&limit={limit}"))
    rows = [row for page in pages for row in page["data"]]
    assert {row["id"] for row in rows} == set(crowd[1])
    assert rows == sorted(rows, key=lambda row: (key(row), row["id"]), reverse=order == "desc")
    assert [len(page["data"]) for page in pages] == ([2, 2, 2, 1] if limit == 2 else [7])


def test_self_leads_to_the_same_page(client, admin, crowd):
    for page in walk(client, admin, f"search={crowd[0]}&limit=3&role=user"):
        assert client.get(page["links"]["self"], token=admin.token).json == page


def test_links_keep_what_was_asked_for(client, admin, crowd):
    asked = {"search": [crowd[0]], "limit": ["2"], "sort": ["name"], "order": ["asc"],
             "role": ["user"]}
    query = "&".join(f"{name}={value[0]}" for name, value in asked.items())
    for page in walk(client, admin, query):
        for url in filter(None, page["links"].values()):
            assert urlsplit(url).path == USERS
            assert parse_qs(urlsplit(url).query) | asked == parse_qs(urlsplit(url).query)


def test_a_search_with_reserved_characters_survives_its_links(client, admin, database_url):
    word = unique("a&b=c d%+é")
    for n in range(3):
        execute(database_url, "INSERT INTO users (email, name, password_hash) VALUES "
                              f"('{n}{unique('r')}@example.com', '{word}', '-')")
    response = client.get(USERS, token=admin.token, query_string={"search": word, "limit": 2})
    after = client.get(response.json["links"]["next"], token=admin.token).json
    assert (len(response.json["data"]), len(after["data"])) == (2, 1)


@pytest.mark.parametrize(("query", "field"), [
    ("page=1", "page"), ("count=exact", "count"), ("limit=0", "limit"), ("limit=101", "limit"),
    ("sort=id", "sort"), ("order=up", "order"), ("role=root", "role"), ("cursor=x", "cursor"),
    ("search=", "search"), ("limit=1&limit=2", "limit"),
])
def test_a_query_that_the_list_does_not_know_is_refused_by_its_name(client, admin, query, field):
    assert fields_of(client.get(f"{USERS}?{query}", token=admin.token)) == [field]


def test_a_cursor_is_bound_to_its_list_and_version(client, admin, crowd):
    query = f"search={crowd[0]}&limit=2"
    new = parse_qs(urlsplit(next(walk(client, admin, query))["links"]["next"]).query)["cursor"][0]
    old = client.get(f"users?{query}", token=admin.token).json["pagination"]["next_cursor"]
    for path in (f"{USERS}?{query}&cursor={old}", f"users?{query}&cursor={new}",
                 f"{USERS}?{query}&sort=name&cursor={new}", f"{USERS}?limit=2&cursor={new}"):
        assert fields_of(client.get(path, token=admin.token)) == ["cursor"]


@pytest.mark.parametrize(("body", "fields"), [
    ({"name": "Ada"}, ["profile", "name"]), ({"profile": {}}, ["profile.name"]),
    ({"profile": {"name": "A"}}, ["profile.name"]), ({"profile": None}, ["profile"]),
    ({"profile": "Ada"}, ["profile"]), ({"profile": {"name": "Ada", "age": 7}}, ["profile.age"]),
    ({"profile": {"name": None}}, ["profile.name"]), ({"profile": [{"name": "Ada"}]}, ["profile"]),
])
def test_a_profile_that_is_none_is_refused_by_its_field(client, admin, body, fields):
    account = {"email": f"{unique('n')}@example.com", "password": PASSWORD}
    response = client.post(USERS, token=admin.token, json=account | body)
    assert sorted(fields_of(response)) == sorted(fields)


@pytest.mark.parametrize("body", [
    {"name": "Grace"}, {"profile": {}}, {"profile": {"name": "G"}}, {"profile": None}, {},
    {"profile": {"name": "Grace", "role": "admin"}}, {"last_login_at": None},
])
def test_a_change_that_is_none_is_refused(client, user, body):
    fields_of(client.patch(f"{USERS}/me", token=user.token, json=body))
    assert client.get("users/me", token=user.token).json["name"] == "Ada Lovelace"


def test_a_created_user_has_the_shape_and_a_place_in_version_2(client, admin):
    response = client.post(USERS, token=admin.token, json={
        "email": f"{unique('n')}@example.com", "password": PASSWORD, "profile": {"name": "Ada"}})
    assert set(response.json) == FIELDS
    assert response.headers["Location"] == f"{USERS}/{response.json['id']}"


def test_version_2_registers_and_logs_in_as_version_1_does(client):
    body = {"email": f"{unique('n')}@example.com", "password": PASSWORD}
    made = client.post("/api/v2/auth/register", json=body | {"name": "Ada"})
    assert made.headers["Location"] == f"{USERS}/{made.json['user']['id']}"
    token = client.post("/api/v2/auth/login", json=body).json["token"]
    for path in (f"{USERS}/me", "users/me"):
        assert client.get(path, token=token).json["id"] == made.json["user"]["id"]
