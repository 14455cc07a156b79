"""The rooms: each knows those below it, and none is most of the house."""
import ast

import pytest

from tests.conftest import ROOT
from tests.size import ROOMS, python_sizes, room_of, sources

FILES = [path for path, _ in sources()]


def imported(path):
    """The files of ours that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = name.replace(".", "/")
            for file in (f"{place}.py", f"{place}/__init__.py"):
                if (ROOT / file).is_file():
                    yield file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_arrow_points_up(path):
    name = path.relative_to(ROOT).as_posix()
    here = ROOMS.index(room_of(name))
    up = [file for file in imported(path) if ROOMS.index(room_of(file)) > here]
    if name == "gunicorn.conf.py":  # names its worker; it is read before the app is there
        up = []
    assert up == []


def test_no_files_import_each_other():
    graph = {path.relative_to(ROOT).as_posix(): set(imported(path)) for path in FILES}
    graph = {name: {other for other in others if other != name and not (
        other.endswith("__init__.py") and name.startswith(other.removesuffix("__init__.py")))}
        for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_no_room_is_over_a_quarter_of_the_house():
    python = python_sizes()
    assert {room: lines for room, lines in python.items()
            if lines > sum(python.values()) / 4} == {}
