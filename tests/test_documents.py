"""What the documents tell people to type, to read and to look at is there."""
import importlib
import re
import shutil
import subprocess

import click
import pytest

from db.seed import seed
from tests.conftest import ROOT, as_role

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Without the example, whose files are there when it is carried out (tests/test_contributing.py).
EXAMPLE = re.compile(r"## A resource, from end to end\n.*?(?=\n## )", re.S)
TEXTS = {path.relative_to(ROOT).as_posix(): EXAMPLE.sub("", path.read_text()) for path in FILES}
FOLDERS = r"(?:\.ci|blueprints|db|deploy|docs|extensions|schemas|sql|tests)"


def all_of(pattern):
    """Sorted (document, what a pattern found there), without a remark behind it."""
    return sorted({(name, "".join(found).partition("#")[0].strip())
                   for name, text in TEXTS.items()
                   for found in re.findall(pattern, text, re.M)})


@pytest.mark.parametrize(("name", "line"), all_of(
    r"`(flask [^`]+)`|^ {4}(?:\w+=\S+ )*(flask [^\n]+)"))
def test_a_command_parses(app, name, line):
    command, context = app.cli, click.Context(app.cli)
    words = re.sub(r"[][]", "", line).split()[1:]
    while isinstance(command, click.Group) and words:
        command = command.get_command(context, words.pop(0))
        assert command, line
    if not isinstance(command, click.Group):
        known = {option for param in command.params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= known
        assert command.make_parser(click.Context(command)).parse_args(words)[1] == []


@pytest.mark.parametrize(("name", "line"), all_of(r"python3? -m (tests\.[^`\n]+)"))
def test_a_tool_of_the_tests_is_there_with_its_options(name, line):
    module, *words = line.split()
    tool = importlib.import_module(module)
    if words:
        text = (ROOT / "tests" / "bench" / "__main__.py").read_text()
        assert tool.__name__ == "tests.bench"
        for word in words:
            assert word == "--help" or not re.match("--|[a-z]+$", word) or f'"{word}"' in text


@pytest.mark.parametrize(("name", "line"), all_of(r"-m pytest([^`\n]*)"))
def test_a_test_that_is_to_be_run_is_there(name, line):
    for file in re.findall(r"tests/\S+", line):
        text = (ROOT / file).read_text()
        for word in re.findall(r"-k (\S+)", line):
            assert re.search(rf"^def test_\w*{word}", text, re.M)


@pytest.mark.parametrize(("name", "path"), all_of(rf"`({FOLDERS}/[\w./-]+)`"))
def test_a_file_that_is_named_is_there(name, path):
    assert (ROOT / path).exists()


def test_pictures_and_links_lead_somewhere():
    for name, text in TEXTS.items():
        for target, part in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
            path = (ROOT / name).parent / target if target else ROOT / name
            assert path.exists(), f"{name}: {target}"
            if part:
                heads = re.findall("^#+ (.*)", path.read_text(), re.M)
                assert part in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                                for head in heads], f"{name}: {target}#{part}"


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")),
                    reason="curl and jq are not both here.")
def test_the_tour_shows_what_it_says(serve, make_database, tmp_path):
    url = make_database()
    seed(url, {"users": 20, "products": 1000, "transactions": 2000})
    server = serve(DATABASE_URL=as_role(url), REDIS_PREFIX="tour")
    script, = re.findall(r"```bash\n(.*?)```", TEXTS["README.md"], re.S)
    script = script.replace("http://127.0.0.1:8000", server.base)
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = iter(done.stdout.splitlines())
    for word in ('"next_cursor"', '"user1@example.com"', " 201 ", '"completed"', " 201 ",
                 "Idempotent-Replayed: true", '"price": "99.90"', "Report-Rows: ", '"amount"',
                 '"code": "not_found"', '"meaning"'):
        assert any(word in line for line in told), f"{word} is missing in {done.stdout}"
    assert (tmp_path / "sales.csv").read_text().startswith("transaction_id,")
