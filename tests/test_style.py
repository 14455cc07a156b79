"""The code is as clean as ruff and bandit want it, and its types fit as mypy reads them."""
import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.size import sources
from tests.test_security import python_files


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_bandit_has_nothing_to_say_about_what_serves():
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", *python_files()], cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("word", "form"), [
    (r"\bnosec\b", r"nosec B\d{3}"), ("type: ignore", r"type: ignore\[[a-z-]+\]"),
], ids=["bandit", "mypy"])
def test_whatever_a_checker_is_told_to_pass_over_has_a_reason(word, form):
    for file in python_files():
        for line in re.findall(f".*{word}.*", file.read_text()):
            assert re.search(rf"  # {form} # \S.{{5,}}$", line), line


def bare(path):
    """What in a file others may call, and doesn't say what it takes and what it gives."""
    tree = ast.parse(path.read_text())
    for scope in ast.walk(tree):
        if scope is not tree and (not isinstance(scope, ast.ClassDef) or scope.name[0] == "_"):
            continue
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef) or (
                    node.name[0] == "_" and node.name not in ("__init__", "__call__")):
                continue
            args = node.args
            taken = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            if not node.returns or any(
                    arg and not arg.annotation and arg.arg not in ("self", "cls") for arg in taken):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_what_others_may_call_says_what_it_takes_and_gives():
    assert [name for path, _ in sources() for name in bare(path)] == []
