"""Programs that use the shop through clients generated from its documents."""
import fcntl
import hashlib
import pathlib
import shutil
import subprocess

import pytest

CACHE = pathlib.Path.home() / ".cache" / "shopfront-node"


def installed(package):
    """A folder with what a package.json names; kept between runs. Skips where npm can't."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = CACHE / hashlib.sha256(package.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.copy(package, folder / "package.json")
            done = subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder,
                                  capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"npm can't install: {done.stderr[-300:]}")
            (folder / "done").touch()
    return folder
