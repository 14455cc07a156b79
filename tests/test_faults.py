"""Parts fail under load: every answer is a documented one, comes in time, and nothing is lost."""
import re

import pytest

from tests.conftest import ROOT, unique
from tests.contract import Contract
from tests.faults import FAULTS, Rig, strike

# The mail server that is stopped leaves its clients' sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def rig(run_folder, serve):
    rig = Rig(run_folder / unique("f"), serve)
    yield rig
    rig.close()


@pytest.mark.parametrize("hold", [None, pytest.param(30, marks=pytest.mark.long)],
                         ids=["short", "long"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_survived(rig, app, fault, hold):
    if not fault.possible(rig):
        pytest.skip("No file system may be mounted here, so none can be filled.")
    result = strike(rig, fault, hold)
    assert not result.load.crashed
    assert {outcome for _, outcome in result.outcomes} <= {"ok", *fault.seen}
    if "broken" not in fault.seen:  # what the cache has is there without the database
        assert ("a kept product", "unavailable") not in result.outcomes
    assert result.slowest.seconds < fault.answer
    assert result.healed < fault.healed
    assert not result.load.stale
    assert rig.books() == {}
    for answer in result.load.kept:
        Contract(app).check(*answer)


def test_the_document_tells_of_each_fault():
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text.partition("## When a part fails")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", table, re.M)[1:]
    assert [row for row in rows if row != "---"] == [fault.name for fault in FAULTS]
