"""Passwords: argon2id, and what may be one.

A password is used exactly as sent, spaces included and never truncated, after one normalisation to
Unicode NFC, so that the same word typed on two keyboards is the same password (NIST SP 800-63B,
3.1.1.2). The rules are about length and well-known passwords: OWASP ASVS 5.0, 6.2.
"""
import os
import pathlib
import unicodedata
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

# OWASP Password Storage Cheat Sheet: 19 MiB, 2 passes, 1 lane. More memory would help those who
# want to exhaust the machine by logins.
hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)

COMMON = frozenset(
    line for line in
    pathlib.Path(__file__).with_name("common_passwords.txt").read_text().splitlines()
    if not line.startswith("#")
)
# Verified against when an account does not exist, so that the check takes just as long.
# It is written down since making one takes a twentieth of a start; its parameters are the hasher's.
NOBODY = ("$argon2id$v=19$m=19456,t=2,p=1$XgBn1rGHY5flDm/d7xEI/A"
          "$0O1TgeM7Yc975tHyrXk1Gk6uq5j4le/t7vBOkoOXUs0")


def _begin():
    """Start the process's only hashing thread: each thread that hashes would keep its 19 MiB."""
    global _hashing
    _hashing = ThreadPoolExecutor(1, "passwords")


_hashing: ThreadPoolExecutor
_begin()
os.register_at_fork(after_in_child=_begin)  # threads don't come along


def weakness(password: str, email: str | None = None) -> str | None:
    """Why a password won't do, or None."""
    word = _normal(password).lower()
    if word in COMMON:
        return "This password is among the most common ones."
    if email and word in (email.lower(), email.lower().partition("@")[0]):
        return "The password must not be the e-mail address."
    return None


def hashed(password: str) -> str:
    return _hashing.submit(hasher.hash, _normal(password)).result()


def matches(password: str, password_hash: str | None) -> bool:
    """Whether a password is the right one. Takes the same time whatever it is."""
    try:
        right = _hashing.submit(
            hasher.verify, password_hash or NOBODY, _normal(password)).result()
    except (VerificationError, InvalidHashError):
        return False
    return right and password_hash is not None


def _normal(password):
    return unicodedata.normalize("NFC", password)


def outdated(password_hash: str) -> bool:
    return hasher.check_needs_rehash(password_hash)
