"""Folders and figures for tests of a whole installation: ``-m long tests/cluster``, with ``-s``.

They want programs that not every machine has; ``tests/cluster/install`` fetches them.
"""
import shutil

import pytest

from tests.cluster.parts import Part, keeper
from tests.conftest import unique


@pytest.fixture(scope="module")
def place(run_folder):
    """A folder for a module's parts: short for sockets, open for `nobody`."""
    folder = run_folder / unique("c")
    folder.mkdir(mode=0o755)
    yield folder
    while Part.all:  # those whose owner came to nothing, too
        Part.all.pop().stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def parts(place):
    """Whatever is put on it is stopped or closed when the module ends, the last one first."""
    with keeper() as keep:
        yield keep


@pytest.fixture
def tell(request):
    """A function that shows a figure as a line of a table: ``tell("seconds", 0.5)``."""
    name = request.node.name.removeprefix("test_").replace("_", " ")
    print(f"\n\n{name} | value\n--- | ---")

    def show(figure, value):
        print(f"{figure} | {value:.2f}" if isinstance(value, float) else f"{figure} | {value}")
    return show
