"""What gunicorn says by itself: one sentence where it can't start, lines like all others else."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

from tests.conftest import ROOT


def start(port, **env):
    """(exit code, output) of a gunicorn that can't start."""
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}"], cwd=ROOT, timeout=20,
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def test_a_taken_port_is_one_sentence(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = start(port, **settings)
    assert (code, said) == (1, f"Can't listen on 127.0.0.1 port {port}: Address already in use.\n")


def test_a_database_that_is_not_there_is_one_sentence(settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = free.getsockname()[1]
        code, said = start(0, **settings | {
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{nowhere}/shop"})
    assert code == 1
    assert said.startswith("The database can't be reached: ")
    assert said.count("\n") == 1


def test_a_wrong_setting_is_one_sentence(settings):
    code, said = start(0, **settings | {"WEB_THREADS": "many"})
    assert code == 1
    assert said == "The settings won't do: WEB_THREADS must be a whole number from 1 to 256.\n"


def test_why_there_is_no_connection_is_a_line_like_all_others(serve, tmp_path):
    server = serve(workers=1, APP_ENV="production", LOG_DIR=str(tmp_path), CACHE_TYPE="NullCache",
                   DATABASE_URL="postgresql://postgres@127.0.0.1:1/shop")
    assert server.call("GET", "products").status == 503
    assert "\nerror connecting" not in server.log
    lines = map(json.loads, (tmp_path / "app.log").read_text().splitlines())
    said = [line for line in lines if "refused" in line["message"]]
    assert {(line["level"], line["logger"]) for line in said} == {("WARNING", "psycopg.pool")}


def test_a_killed_worker_is_a_line_like_all_others(serve):
    server = serve(workers=1, LOG_LEVEL="WARNING")
    os.kill(server.worker_pids[0], signal.SIGKILL)
    end = time.monotonic() + 10
    while "SIGKILL" not in server.log:
        assert time.monotonic() < end, server.log
        time.sleep(0.05)
    line, = (line for line in server.log.splitlines() if "SIGKILL" in line)
    fields = json.loads(line)
    assert (fields["level"], fields["logger"]) == ("ERROR", "shopfront.gunicorn")
    assert "Traceback" not in server.log
