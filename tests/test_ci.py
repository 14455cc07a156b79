"""What is run before a change lands: it is there, and says so where it goes without something."""
import importlib.util
import os
import re
import subprocess
import tomllib

import yaml

from tests.conftest import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
JOB, = WORKFLOW["jobs"].values()
HOOKS = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
         for hook in repo["hooks"] if repo["repo"] == "local"]


def test_the_workflow_calls_what_is_there_and_may_do_no_more():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["group"]
    assert JOB["timeout-minutes"] <= 60
    for step in JOB["steps"]:
        assert "run" in step or re.fullmatch(r"[\w/-]+@v\d+", step["uses"])
    last = JOB["steps"][-1]["run"]
    assert os.access(ROOT / last, os.X_OK), last


def test_the_workflow_s_python_is_the_oldest_that_the_shop_runs_on():
    target = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["target-version"]
    assert re.match(r"python:([\d.]+)-", JOB["container"])[1].replace(".", "") == target[2:]


def test_every_hook_runs_a_tool_that_is_there():
    assert [hook["id"] for hook in HOOKS] == ["ruff", "bandit", "rooms", "documents"]
    for hook in HOOKS:
        python, option, module, *words = hook["entry"].split()
        assert (python, option, hook["language"]) == (".venv/bin/python", "-m", "system")
        assert importlib.util.find_spec(module), module
        for word in words:
            assert "/" not in word or (ROOT / word).exists(), word


def test_what_can_not_be_installed_is_told(tmp_path):
    """The part of .ci/run in which it installs, as root of a machine that has no packages."""
    for name, said in (("id", "echo 0"), ("apt-get", "exit 100")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
    part = re.search(r"^while .*?^END$", (ROOT / ".ci" / "run").read_text(), re.M | re.S)[0]
    part = part.replace("/usr/sbin", "/nowhere")
    done = subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", part], text=True,
                          env={"PATH": str(tmp_path)}, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "Chromium could not be installed: the docs page's tests will be skipped.\n"
        "PgBouncer could not be installed: the tests behind it will be skipped.\n"
        "nginx could not be installed: the tests behind it will be skipped.\n")
