"""Tokens: what is one, for what, and that nothing else opens a door."""
import base64
import hmac
import json
import socket
import time

import jwt
import pytest

from tests.conftest import execute, register

KEY = b"k" * 40
LONG_AGO = 1_000_000_000
HUGE = 2**63
ABSENT = object()


@pytest.fixture(scope="module")
def person(client):
    """A user that the tests of this file share; none of them ends the session."""
    return register(client)


def claims_of(token):
    return jwt.decode(token, options={"verify_signature": False})


def signed(header, claims, key=KEY, digest="sha256"):
    """A JWT by hand: a library would refuse to make most of what a forger sends."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode()
             for part in (header, claims)]
    text = b".".join(map(base64url, parts))
    signature = hmac.digest(key, text, digest) if digest else b""
    return (text + b"." + base64url(signature)).decode()


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def altered(claims, **changes):
    """A token of our own key and kind with other claims."""
    new = {k: v for k, v in (claims | changes).items() if v is not ABSENT}
    return signed({"alg": "HS256", "typ": "JWT"}, new)


FORGERIES = {
    "nothing": lambda c: "",
    "one word": lambda c: "token",
    "three dots": lambda c: "...",
    "broken base64": lambda c: "a.b.c",
    "letters of other scripts": lambda c: "ключ.ключ.ключ",
    "two parts": lambda c: signed({"alg": "HS256"}, c).rpartition(".")[0],
    "a header that is a list": lambda c: signed(["HS256"], c),
    "a body that is a list": lambda c: signed({"alg": "HS256"}, [1]),
    "a body that is not JSON": lambda c: signed({"alg": "HS256"}, b"\xff{"),
    "alg none": lambda c: signed({"alg": "none"}, c, digest=None),
    "alg None": lambda c: signed({"alg": "None"}, c, digest=None),
    "alg NONE, signed": lambda c: signed({"alg": "NONE"}, c),
    "no alg": lambda c: signed({"typ": "JWT"}, c),
    "an alg that is a list": lambda c: signed({"alg": ["HS256"]}, c),
    "HS256 without a signature": lambda c: signed({"alg": "HS256"}, c, digest=None),
    "HS384": lambda c: signed({"alg": "HS384"}, c, digest="sha384"),
    "HS512": lambda c: signed({"alg": "HS512"}, c, digest="sha512"),
    "RS256 with an HMAC": lambda c: signed({"alg": "RS256"}, c),
    "ES256 with an HMAC": lambda c: signed({"alg": "ES256"}, c),
    "another key": lambda c: signed({"alg": "HS256"}, c, key=b"x" * 40),
    "an empty key": lambda c: signed({"alg": "HS256"}, c, key=b""),
    "a key of its own in the header": lambda c: signed(
        {"alg": "HS256", "jwk": {"kty": "oct", "k": "eHg"}}, c, key=b"xx"),
    "a key id": lambda c: signed({"alg": "HS256", "kid": "../../dev/null"}, c, key=b""),
    "an unknown critical header": lambda c: signed({"alg": "HS256", "crit": ["x"], "x": 1}, c),
    "other claims under an old signature": lambda c: ".".join((
        signed({"alg": "HS256"}, c).split(".")[0],
        *signed({"alg": "HS256"}, c | {"sub": "1"}, key=b"x" * 40).split(".")[1:])),
    "another issuer": lambda c: altered(c, iss="elsewhere"),
    "another audience": lambda c: altered(c, aud="elsewhere"),
    "an audience that is a number": lambda c: altered(c, aud=1),
    "an unknown kind": lambda c: altered(c, type="id"),
    "a kind that is a list": lambda c: altered(c, type=["access", "refresh"]),
    "not valid yet": lambda c: altered(c, nbf=int(time.time()) + 3600),
    "issued tomorrow": lambda c: altered(c, iat=int(time.time()) + 86400),
    "expiry in words": lambda c: altered(c, exp="tomorrow"),
    "expiry without end": lambda c: signed(
        {"alg": "HS256"}, json.dumps(c | {"exp": 0}).replace('"exp": 0', '"exp": 1e999').encode()),
    "a user in words": lambda c: altered(c, sub="ada"),
    "a user that is a number": lambda c: altered(c, sub=int(c["sub"])),
    "a user that is a list": lambda c: altered(c, sub=[c["sub"]]),
    "a user with a point": lambda c: altered(c, sub=f"{c['sub']}.0"),
    "no user's number": lambda c: altered(c, sub="0"),
    "a negative user": lambda c: altered(c, sub="-1"),
    "a user beyond 64 bits": lambda c: altered(c, sub=str(HUGE)),
    "a user of 5000 digits": lambda c: altered(c, sub="9" * 5000),
    "another user's session": lambda c: altered(c, sub=str(int(c["sub"]) + 1)),
    "a session in words": lambda c: altered(c, sid="one"),
    "a session that is a list": lambda c: altered(c, sid=[c["sid"]]),
    "a session that is true": lambda c: altered(c, sid=True),
    "a session with a point": lambda c: altered(c, sid=c["sid"] + 0.5),
    "a session beyond 64 bits": lambda c: altered(c, sid=HUGE),
    "a session far beyond": lambda c: altered(c, sid=10**40),
    "an unknown session": lambda c: altered(c, sid=HUGE - 1),
    **{f"no {claim}": lambda c, claim=claim: altered(c, **{claim: ABSENT})
       for claim in ("exp", "iat", "nbf", "iss", "aud", "sub", "jti", "type", "sid")},
    **{f"an empty {claim}": lambda c, claim=claim: altered(c, **{claim: None})
       for claim in ("exp", "iss", "aud", "sub", "jti", "type", "sid")},
}


def refused(response):
    """A 401 that says how to authenticate, and in a code why this failed."""
    assert response.status_code == 401, response.text
    assert response.headers["WWW-Authenticate"].startswith("Bearer")
    return response.json["code"]


def test_the_builder_of_these_tests_makes_tokens_that_hold(client, person):
    token = altered(claims_of(person.token))
    assert client.get("users/me", token=token).status_code == 200
    token = altered(claims_of(person.refresh_token))
    assert client.post("auth/refresh", json={"refresh_token": token}).status_code == 200


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_no_forged_access_token_is_let_in(client, person, forge):
    token = forge(claims_of(person.token)).encode().decode("latin-1")
    headers = {"Authorization": f"Bearer {token}"}
    refused(client.get("users/me", headers=headers))


@pytest.mark.parametrize("forge", list(FORGERIES.values())[1:], ids=list(FORGERIES)[1:])
def test_no_forged_refresh_token_is_exchanged(client, person, forge):
    token = forge(claims_of(person.refresh_token))
    if len(token) < 2048:
        refused(client.post("auth/refresh", json={"refresh_token": token}))


@pytest.mark.parametrize("generation", [
    ABSENT, None, "one", [0], -1, 1.5, 2**31 - 1, HUGE - 1, HUGE, 10**40, True])
def test_a_refresh_token_without_a_sound_generation_is_refused(client, generation):
    claims = claims_of(register(client).refresh_token)
    token = altered(claims, gen=generation)
    refused(client.post("auth/refresh", json={"refresh_token": token}))


def test_a_token_of_a_node_whose_clock_is_ahead_holds(client, person):
    """By up to a minute (RFC 7519, 4.1.5)."""
    soon = int(time.time()) + 50
    claims = altered(claims_of(person.token), iat=soon, nbf=soon)
    assert client.get("users/me", token=claims).status_code == 200
    late = altered(claims_of(person.token), iat=soon + 20, nbf=soon + 20)
    refused(client.get("users/me", token=late))


def test_a_token_ends_to_the_second(client, person):
    past = altered(claims_of(person.token), exp=int(time.time()) - 1)
    assert refused(client.get("users/me", token=past)) == "token_expired"


def test_a_token_ends_with_its_time(client, person):
    expired = altered(claims_of(person.token), exp=LONG_AGO)
    response = client.get("users/me", token=expired)
    assert refused(response) == "token_expired"
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]
    expired = altered(claims_of(person.refresh_token), exp=LONG_AGO)
    assert refused(client.post("auth/refresh", json={"refresh_token": expired})) == "token_expired"


def test_tokens_live_as_long_as_the_settings_say(make_app, make_client):
    client = make_client(make_app(ACCESS_TOKEN_MINUTES="2", REFRESH_TOKEN_DAYS="3"))
    person = register(client)
    access, refresh = claims_of(person.token), claims_of(person.refresh_token)
    assert access["exp"] - access["iat"] == 120
    assert refresh["exp"] - refresh["iat"] == 3 * 86400
    answer = client.post("auth/refresh", json={"refresh_token": person.refresh_token}).json
    assert answer["expires_in"] == 120


def test_a_session_ends_with_its_time_whatever_the_token_says(client, user, database_url):
    execute(database_url, f"UPDATE sessions SET expires_at = now() WHERE user_id = {user.id}")
    assert refused(client.get("users/me", token=user.token)) == "token_revoked"
    again = client.post("auth/refresh", json={"refresh_token": user.refresh_token})
    assert refused(again) == "token_revoked"


def test_a_session_ends_after_its_longest_life_however_much_it_is_used(
    client, user, database_url
):
    execute(database_url, "UPDATE sessions SET created_at = now() - interval '89 days' "
                          f"WHERE user_id = {user.id}")
    client.post("auth/refresh", json={"refresh_token": user.refresh_token})
    [(left,)] = execute(database_url, "SELECT expires_at <= now() + interval '1 day' "
                                      f"FROM sessions WHERE user_id = {user.id}")
    assert left


def test_a_refresh_token_opens_no_route(client, person):
    assert refused(client.get("users/me", token=person.refresh_token)) == "authentication_required"


def test_an_access_token_can_not_be_exchanged(client, person):
    response = client.post("auth/refresh", json={"refresh_token": person.token})
    assert refused(response) == "authentication_required"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_has_any_letter_case(client, person, scheme):
    headers = {"Authorization": f"{scheme} {person.token}"}
    assert client.get("users/me", headers=headers).status_code == 200


@pytest.mark.parametrize("header", [
    "", "{token}", "Bearer", "Bearer ", "Bearer{token}", "Token {token}", "JWT {token}",
    "Basic {token}", "Basic YWRhOnNlY3JldA==", "Digest username=ada", "Bearer {token} {token}",
    "Bearer Bearer {token}", "Bearer {token}, Bearer {token}", "Bearer {token},Bearer {token}",
    "Basic x, Bearer {token}", "Bearer \"{token}\"", "Bearer token={token}",
])
def test_the_header_is_one_bearer_token_and_nothing_else(client, person, header):
    headers = {"Authorization": header.format(token=person.token)}
    assert refused(client.get("users/me", headers=headers)) == "authentication_required"


@pytest.mark.parametrize(("lines", "status"), [
    (["Authorization: Bearer {token}"], 200),
    (["Authorization: Bearer {token}", "Authorization: Bearer {token}"], 401),
    (["Authorization: Bearer {token}", "Authorization: Basic YWRhOng="], 401),
    (["Authorization: Basic YWRhOng=", "Authorization: Bearer {token}"], 401),
    (["Authorization:", "Authorization: Bearer {token}"], 401),
])
def test_two_authorization_headers_are_refused(server, person, lines, status):
    head = "\r\n".join(lines).format(token=person.token)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as wire:
        wire.sendall(f"GET /api/v1/users/me HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n"
                     f"{head}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    assert int(answer.split()[1]) == status


def test_a_token_counts_nowhere_but_in_the_header(client, person):
    headers = {"Cookie": f"access_token_cookie={person.token}; token={person.token}"}
    refused(client.get("users/me", headers=headers))
    refused(client.get(f"users/me?access_token={person.token}&jwt={person.token}"))
    refused(client.post("auth/logout", data={"access_token": person.token}))


def test_tokens_carry_no_personal_data(person):
    for token in (person.token, person.refresh_token):
        assert person.email not in json.dumps(claims_of(token))
        assert "Ada" not in json.dumps(claims_of(token))


def test_another_shop_s_key_opens_nothing(make_app, make_client, person):
    client = make_client(make_app(JWT_SECRET_KEY="another key of the same length 0123456789"))
    assert refused(client.get("users/me", token=person.token)) == "authentication_required"
