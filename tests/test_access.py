"""Who may call what: what the views declare, which test_access_matrix.py takes at their word."""
import re
import signal
import time

import pytest

from extensions import openapi

# The doors, written down by hand: what the views declare is held to this.
DOORS = {
    "public": """
        POST auth/register  POST auth/login  POST auth/refresh  POST auth/password/forgot
        POST auth/password/reset  POST auth/email/verify
        GET products  GET products/{}  GET categories  GET categories/{}
        GET docs  GET openapi.json  GET /health  GET /health/live  GET /health/ready
        GET /problems/{}""",
    "user": """
        POST auth/logout  GET auth/sessions  DELETE auth/sessions/{}  POST auth/password
        POST auth/email/verification  GET users/{}  PATCH users/{}  DELETE users/{}
        POST transactions  GET transactions  GET transactions/{}""",
    "admin": """
        GET users  POST users  POST categories  PATCH categories/{}  DELETE categories/{}
        POST products  PATCH products/{}  DELETE products/{}  POST transactions/{}/refund
        GET reports/transactions  GET reports/sales""",
}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_doors_are_these_and_no_others(app, version):
    base = f"/api/{version}/"
    assert {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path).removeprefix(base), view.access)
        for path, method, view in openapi.operations(app, version)
    } == {
        (method, path, access) for access, text in DOORS.items()
        for method, path in re.findall(r"([A-Z]+) (\S+)", text)
    }


def test_the_operations_are_all_there(app):
    documented = {
        (version, path, method) for version, spec in app.extensions["documents"].items()
        for path, item in app.json.loads(spec)["paths"].items() for method in item
        if method in ("get", "post", "patch", "put", "delete")
    }
    found = {(version, path, method) for version in app.extensions["apis"]
             for path, method, _ in openapi.operations(app, version)}
    assert documented == found
    assert len(found) > 60


def test_every_route_says_who_may_call_it(app):
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        if cls := getattr(view, "view_class", None):
            views = [getattr(cls, method.lower()) for method in cls.methods]
        else:
            views = [view]
        for function in views:
            assert getattr(function, "access", None) in ("public", "user", "admin"), rule


def test_what_has_no_version_is_public(client):
    for path in ("/", "/health", "/health/live", "/health/ready", "/api/v1/openapi.json",
                 "/api/v2/docs", "/problems/forbidden"):
        assert client.get(path).status_code in (200, 302)


def test_metrics_are_for_who_has_their_token(client, admin):
    assert client.get("/metrics").status_code == 401
    assert client.get("/metrics", token=admin.token).status_code == 401
    assert client.get("/metrics", token="metrics-token-of-the-tests").status_code == 200


def test_the_figures_of_a_killed_gunicorn_go_and_those_of_a_living_one_stay(serve, tmp_path):
    def start():
        return serve(workers=1, TMPDIR=str(tmp_path))

    def folders():
        return {path.name for path in tmp_path.glob("shopfront-*")}

    living, before = start(), folders()
    killed = start()
    left = folders() - before
    assert (len(before), len(left)) == (1, 1)
    killed.stop(signal.SIGKILL)
    assert folders() == before | left
    last = start()
    assert before < folders()
    assert not left & folders()
    old, end = living.worker_pids, time.monotonic() + 30
    living.process.send_signal(signal.SIGHUP)  # reads gunicorn.conf.py once more
    while set(living.worker_pids) & set(old):
        assert time.monotonic() < end
        time.sleep(0.05)
    figures = living.call("GET", "/metrics", token="metrics-token-of-the-tests").body
    assert b"shopfront_requests_total{" in figures
    last.stop()
    assert folders() == before
    living.stop()
    assert folders() == set()
