"""CONTRIBUTING.md's example is true: carried out in a copy of the project, it passes the tests."""
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE = TEXT.partition("## A resource, from end to end\n")[2].partition("\n## ")[0]
STEP = re.compile(r"(?:(New file|In) `(\S+)`:\n\n)?```(\w+)\n(.*?)```\n", re.S)
# What a new resource has to pass, as far as it is quick.
GUARDS = ["test_access.py::test_the_doors_are_these_and_no_others",
          "test_access.py::test_every_route_says_who_may_call_it",
          "test_access_matrix.py::test_someone_else_s_objects_are_404",
          "test_layout.py", "test_openapi.py", "test_operations.py", "test_reviews.py",
          "test_sql.py", "test_style.py::test_mypy_has_nothing_to_say",
          "test_style.py::test_what_others_may_call_says_what_it_takes_and_gives"]
# Of the tests that call every operation in turn, only the new ones are called. Like a run of all
# tests it fails for an answer that none has received, but for the one that takes half a minute.
RUN = """
import sys
import pytest

class New:
    def pytest_collection_modifyitems(self, items):
        module = sys.modules["tests.test_operations"]
        every, module.read = module.read, lambda *of: (
            operation for operation in every(*of) if "Review" in operation.id)
        items[:] = [item for item in items if item.module is not module
                    or "operations" in item.fixturenames]

failed = pytest.main(sys.argv[1:], [New()])
from tests import contract
unseen = [answer for answer in contract.never_seen() if "Review" in answer[1]
          and answer[3] != "request_timeout"]
sys.exit(f"documented, but seen by no test: {unseen}" if unseen else failed)
"""
# Of what no review has: an admin's own routes, changes, and an end.
NOT = "not an_admin_s_is_403 and not stale_tag and not no_tag and not sunset"


def changed(text, diff):
    """A text with a diff's hunks applied, each of which fits in one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        before, after = ("\n".join(["", *(line[1:] for line in lines if line[0] != sign), ""])
                         for sign in "+-")
        assert f"\n{text}".count(before) == 1, f"not there, or not only once: {before}"
        text = f"\n{text}".replace(before, after)[1:]
    return text


def run(folder, *command, **settings):
    """What Python says in a folder, as nobody's test. All has to be well."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("PYTEST", "TEST_"))}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env | settings, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def followed(copy_of_project):
    """A copy of the project in which every step of the example is done."""
    steps = STEP.findall(EXAMPLE)
    assert len(steps) == EXAMPLE.count("```") // 2 > 10
    for how, name, kind, block in steps:
        if not how:
            assert kind == "sh"
            for line in block.splitlines():
                run(copy_of_project, *line.removeprefix("python ").split())
            continue
        number = len(list((copy_of_project / "sql" / "migrations").glob("*.sql"))) + 1
        path = copy_of_project / name.replace("NNNN", f"{number:04d}")
        assert path.exists() == (how == "In"), name
        assert (kind == "diff") == path.exists(), name
        path.write_text(changed(path.read_text(), block) if kind == "diff" else block)
    return copy_of_project


def test_whoever_follows_the_example_has_a_resource_that_passes(followed, servers):
    run(followed, "-m", "ruff", "check", "--no-cache", ".")
    run(followed, "-c", RUN, "-n", "0", "-p", "no:cacheprovider", "-m", "not long", "-k", NOT,
        *(f"tests/{guard}" for guard in GUARDS), MYPY_CACHE_DIR=str(ROOT / ".mypy_cache"),
        TEST_DATABASE_URL=servers[0], TEST_REDIS_URL=servers[1],
        PYTEST_XDIST_WORKER="gw9")  # whose numbered database of Redis no worker of ours has


@pytest.mark.parametrize(("script", "word"), list(zip(
    re.findall(r"```python\n(.*?)```", TEXT.partition("## Where a request's time goes")[2], re.S),
    ["products.py", "Index Scan"], strict=True)), ids=["profile", "explain"])
def test_a_profile_shows_what_it_promises(settings, script, word):
    assert word in run(ROOT, "-c", script, **settings)
