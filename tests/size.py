"""How large the house is: lines of code by room, without blank lines, comments and docstrings.

    python -m tests.size
"""
import ast
import io
import re
import tokenize
from collections import Counter

from tests.conftest import ROOT

# Each imports from those before it, and from itself.
ROOMS = ["db", "schemas", "extensions/http", "extensions", "extensions/front", "extensions/behind",
         "extensions/openapi", "blueprints/v1", "blueprints", ""]
SKIP = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER}


def sources():
    """(path, room) of every Python file outside of the tests."""
    for path in sorted(ROOT.glob("*.py")) + sorted(
        path for top in ("db", "schemas", "extensions", "blueprints")
        for path in (ROOT / top).rglob("*.py")
    ):
        yield path, room_of(path.relative_to(ROOT).as_posix())


def room_of(name):
    """The innermost room that a file is in."""
    return max((room for room in ROOMS if not room or name.startswith(f"{room}/")), key=len)


def python_lines(text):
    """How many lines have code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIP:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def other_lines(text):
    """How many lines of SQL or Lua have code."""
    return sum(1 for line in text.splitlines() if line.strip() and not re.match(r"\s*--", line))


def python_sizes():
    """Lines of Python by room."""
    found = Counter()
    for path, room in sources():
        found[room] += python_lines(path.read_text())
    return found


def other_sizes(top, kind):
    """Lines of the SQL or Lua below a folder, by the folder that they are in."""
    found = Counter()
    for path in (ROOT / top).rglob(f"*.{kind}"):
        found[path.parent.name] += other_lines(path.read_text())
    return found


if __name__ == "__main__":
    for kind, found in (("Python", python_sizes()), ("SQL", other_sizes("sql", "sql")),
                        ("Lua", other_sizes("extensions", "lua"))):
        print(f"{kind:24} {sum(found.values()):6}")
        for room, lines in found.items():
            print(f"  {room or 'top level':22} {lines:6}")
