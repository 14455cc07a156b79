"""The code is as clean as ruff and bandit want it."""
import re
import subprocess
import sys

from tests.conftest import ROOT
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


def test_whatever_bandit_is_told_to_pass_over_has_a_reason():
    for file in python_files():
        for line in re.findall(r".*\bnosec\b.*", file.read_text()):
            assert re.search(r"  # nosec B\d{3} # \S.{5,}$", line), line
