"""The measurements of growth run, and leave every figure and chart."""
import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.long
def test_growth_makes_every_point_and_chart(tmp_path):
    pytest.importorskip("matplotlib")
    if not shutil.which("wrk"):
        pytest.skip("wrk is not here")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "growth", "--quick", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for question in ("products", "connections", "workers"):
        assert (tmp_path / f"growth-{question}.png").read_bytes().startswith(b"\x89PNG")
        assert f"| {question} |" in done.stdout
    figures = json.loads((tmp_path / "growth.json").read_text())
    assert figures["machine"]["cores"] > 0
    points = {(p["question"], p["x"], p["workload"], p["by"]): p for p in figures["points"]}
    assert all(p["rps"] > 0 and p["p99_ms"] > 0 and not p["errors"] for p in points.values())
    catalogue = {"first page", "deep page", "deep cursor", "product", "rare term"}
    asked = {"category list", "product", "purchase"}
    expected = {("products", x): (catalogue, catalogue) for x in (1000, 3000, 9000)}
    for question, xs in (("connections", (1, 4, 16, 64, 256)), ("workers", (1, 2, 4))):
        expected |= {(question, x): (asked | {"health", "cached list"}, asked) for x in xs}
    shops = {(*at, name, "shop") for at, (names, _) in expected.items() for name in names}
    alone = {(*at, name, "postgresql") for at, (_, names) in expected.items() for name in names}
    if "pgbench is not here" in done.stdout:
        alone = set()
    assert set(points) == shops | alone
