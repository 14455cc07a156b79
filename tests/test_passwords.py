"""Passwords: taken exactly as they come, held to length and to not being known."""
import unicodedata

import pytest
from argon2 import PasswordHasher

from extensions import passwords
from tests.conftest import PASSWORD, execute, register, unique

LOCAL = "ada.lovelace"
COMPOSED = unicodedata.normalize("NFC", "café société")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.fixture(scope="module")
def person(client):
    """A user whose password no test of this file changes."""
    return register(client)


def in_short(password):
    return f"{len(password)} of {password[:2]!a}"


def registered_with(client, password, email=None):
    """The answer to a registration."""
    return client.post("auth/register", json={
        "email": email or f"{unique('p')}@example.com", "password": password, "name": "Ada"})


def opens(client, email, password):
    """Whether a login with this password is let in."""
    response = client.post("auth/login", json={"email": email, "password": password})
    assert response.status_code in (200, 401), response.text
    return response.status_code == 200


def account_with(client, password):
    return register(client, password=password).email


def message_for(response, field="password"):
    assert response.status_code == 422, response.text
    [detail] = response.json["details"]
    assert (detail["field"], detail["in"]) == (field, "body")
    return detail["message"]


@pytest.mark.parametrize("near", [
    f" {PASSWORD}", f"{PASSWORD} ", PASSWORD.upper(), PASSWORD.replace(" ", ""), PASSWORD[:-1],
])
def test_a_password_counts_to_the_letter_and_the_space(client, near):
    assert not opens(client, account_with(client, PASSWORD), near)


def test_spaces_around_a_password_belong_to_it(client):
    email = account_with(client, "  a walk  ")
    assert opens(client, email, "  a walk  ")
    assert not opens(client, email, "a walk")


@pytest.mark.parametrize("length", [72, 73, 127])
def test_nothing_is_cut_off_a_long_password(client, length):
    email = account_with(client, "é" * length + "1")
    assert not opens(client, email, "é" * length)
    assert not opens(client, email, "é" * length + "2")
    assert opens(client, email, "é" * length + "1")


@pytest.mark.parametrize("password", [COMPOSED, DECOMPOSED])
def test_a_composed_and_a_decomposed_letter_are_the_same(client, password):
    email = account_with(client, password)
    assert opens(client, email, COMPOSED)
    assert opens(client, email, DECOMPOSED)


def test_a_compatible_letter_is_another_one(client):
    assert not opens(client, account_with(client, "ﬁnest hours"), "finest hours")


@pytest.mark.parametrize("password", [
    "8 chars!", "é" * 8, "e\u0301" * 8, "🔑" * 8, "k" * 128, "e\u0301" * 128, "🔑" * 128,
], ids=in_short)
def test_8_to_128_characters_will_do(client, password):
    assert opens(client, account_with(client, password), password)


@pytest.mark.parametrize("password", [
    "", "7 chars", "e\u0301" * 7, "🔑" * 7, "k" * 129, "e\u0301" * 129, "🔑" * 129,
    "a" + "\u0301\u0323" * 400, "k" * 100_000,
    "\u0958" * 65,  # becomes two characters by normalisation
], ids=in_short)
def test_fewer_than_8_and_more_than_128_will_not(client, person, password):
    message = "Length must be between 8 and 128."
    assert message_for(registered_with(client, password)) == message
    body = {"current_password": PASSWORD, "new_password": password}
    response = client.post("auth/password", token=person.token, json=body)
    assert message_for(response, "new_password") == message


@pytest.mark.parametrize("password", [None, 12345678, True, ["a long walk"], {"a": "b"}])
def test_a_password_is_text(client, password):
    assert registered_with(client, password).status_code == 422


@pytest.mark.parametrize("password", ["password", "PASSWORD123", "QwErTyUiOp", "1234567890"])
def test_a_common_password_will_not_do_in_any_letter_case(client, person, admin, password):
    assert "common" in message_for(registered_with(client, password))
    body = {"current_password": PASSWORD, "new_password": password}
    response = client.post("auth/password", token=person.token, json=body)
    assert "common" in message_for(response, "new_password")
    body = {"email": f"{unique('p')}@example.com", "name": "Ada", "password": password}
    assert "common" in message_for(client.post("users", token=admin.token, json=body))
    body = {"email": body["email"], "profile": {"name": "Ada"}, "password": password}
    assert "common" in message_for(client.post("/api/v2/users", token=admin.token, json=body))


def test_the_list_of_common_passwords_is_long_and_folded():
    assert len(passwords.COMMON) > 8000
    assert all(word == word.lower() and 8 <= len(word) <= 128 for word in passwords.COMMON)


@pytest.mark.parametrize("shape", [str, str.upper, str.title])
@pytest.mark.parametrize("part", [lambda email: email, lambda email: email.partition("@")[0]])
def test_the_email_address_or_its_local_part_is_no_password(client, shape, part):
    email = f"{unique(LOCAL)}@Example.com"
    assert "e-mail" in message_for(registered_with(client, shape(part(email)), email))
    mine = register(client, email=f"{unique(LOCAL)}@example.com")
    body = {"current_password": PASSWORD, "new_password": shape(part(mine.email))}
    response = client.post("auth/password", token=mine.token, json=body)
    assert "e-mail" in message_for(response, "new_password")


def test_who_has_no_account_is_checked_at_the_same_cost():
    assert not passwords.outdated(passwords.NOBODY)


def test_passwords_are_stored_as_argon2id_with_owasp_s_parameters(user, database_url):
    [(stored,)] = execute(database_url, f"SELECT password_hash FROM users WHERE id = {user.id}")
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert PASSWORD not in stored


def test_a_login_hashes_anew_what_was_hashed_more_weakly(client, user, database_url):
    weak = PasswordHasher(time_cost=1, memory_cost=8192, parallelism=1).hash(PASSWORD)
    stored = f"SELECT password_hash FROM users WHERE id = {user.id}"
    execute(database_url, f"UPDATE users SET password_hash = '{weak}' WHERE id = {user.id}")
    assert not opens(client, user.email, "a wrong password")
    assert execute(database_url, stored) == [(weak,)]
    assert opens(client, user.email, PASSWORD)
    [(strong,)] = execute(database_url, stored)
    assert strong.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert opens(client, user.email, PASSWORD)
    assert execute(database_url, stored) == [(strong,)]


def test_a_stored_hash_that_is_none_lets_nobody_in(client, user, database_url):
    execute(database_url, f"UPDATE users SET password_hash = 'disabled' WHERE id = {user.id}")
    assert not opens(client, user.email, PASSWORD)
    assert not opens(client, user.email, "disabled")


def test_two_users_of_one_password_have_two_hashes(user, other, database_url):
    rows = execute(database_url, "SELECT password_hash FROM users "
                                 f"WHERE id IN ({user.id}, {other.id})")
    assert len(set(rows)) == 2
