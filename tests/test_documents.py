"""What README.md and docs/ tell people to type is there."""
import re

import click
import pytest

from tests.conftest import ROOT

FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPED = re.compile(r"`(flask [^`]+)`|^ {4}(?:\w+=\S+ )*(flask [^#\n]+)", re.M)
LINES = sorted({(path.name, (found[1] or found[2]).strip())
                for path in FILES for found in TYPED.finditer(path.read_text())})


@pytest.mark.parametrize(("name", "line"), LINES)
def test_a_command_is_there_with_its_options(app, name, line):
    command, context = app.cli, click.Context(app.cli)
    words = line.split()[1:]
    while isinstance(command, click.Group) and words:
        command = command.get_command(context, words.pop(0))
        assert command, line
    known = {option for param in getattr(command, "params", ()) for option in param.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_pictures_and_links_lead_somewhere():
    for path in FILES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
