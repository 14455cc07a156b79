"""schemathesis against both documents, in process, as an admin and as a user: every check it has.

A bounded form runs with the suite and is the same each time; of version 2 it calls what that has of
its own. The long one, ``-m long``, goes on for minutes with fresh chances at everything.
"""
import re
from types import SimpleNamespace

import pytest
import schemathesis
from flask_jwt_extended import create_access_token
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.core.parameters import ParameterLocation
from schemathesis.engine import events, from_schema
from schemathesis.openapi.checks import RejectedPositiveData
from schemathesis.transport.wsgi import WSGITransport

from tests.conftest import execute

PHASES = {"coverage", "fuzzing", "stateful"}


@pytest.fixture
def shop(make_app, make_database):
    """A shop with something in it, which may be turned inside out."""
    url = make_database()
    execute(url, """
        INSERT INTO categories (name) VALUES ('Tea');
        INSERT INTO products (name, price, stock, category_id) VALUES ('Teapot', 20, 100000, 1);
    """)
    return SimpleNamespace(url=url, app=make_app(DATABASE_URL=url, CACHE_TYPE="SimpleCache"))


@pytest.fixture(autouse=True)
def _no_sockets(monkeypatch):
    """schemathesis 4.32 hands options of a socket to a call in process when it calls again."""
    send = WSGITransport.send

    def without(self, case, *, session=None, **kwargs):
        for name in ("max_redirects", "verify", "cert"):
            kwargs.pop(name, None)
        return send(self, case, session=session, **kwargs)
    monkeypatch.setattr(WSGITransport, "send", without)


def account(shop, role):
    """A token, and the WSGI app before each of whose calls the account is as it was.

    Among the calls are ones that log it out, lock it out and delete it.
    """
    restore = f"""
        INSERT INTO users (id, email, name, role, password_hash)
        VALUES (999999, 'caller@example.com', 'Ada Lovelace', '{role}', 'x')
        ON CONFLICT (id) DO UPDATE SET role = '{role}';
        INSERT INTO sessions (id, user_id, expires_at, address) OVERRIDING SYSTEM VALUE
        VALUES (999999, 999999, now() + interval '1 day', '127.0.0.1')
        ON CONFLICT (id) DO NOTHING;
        DELETE FROM idempotency_keys;
        DELETE FROM login_failures;
    """

    def app(environ, start_response):
        with shop.app.extensions["db"].connection() as conn:
            conn.execute(restore)
        return shop.app(environ, start_response)

    with shop.app.app_context():
        return create_access_token("999999", additional_claims={"sid": 999999}), app


# What a request can be wrong by that no JSON Schema says: how parts of it, or of the shop, go
# together.
RELATIONS = re.compile("|".join([
    "Not together with cursor", "Not a cursor of this list", "Must be after start_date",
    "Must not be less than min_price", "relevance", "Must be at most", "Send at least one field",
    "Each product may stand here once", "There is no product", "No such category",
    "Only an administrator", "Needed to change the e-mail", "This password is", "e-mail address",
]))


def is_a_fault(context, failure, case, response):
    """Whether a difference that schemathesis found is one.

    It takes a request for valid by its schema alone, and expects a header that is none to be
    refused, where HTTP has it ignored.
    """
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        details = response.json().get("details", [])
        return not details or not all(RELATIONS.search(detail["message"]) for detail in details)
    header = case.meta and case.meta.components.get(ParameterLocation.HEADER)
    if header and header.mode.is_negative:
        return not isinstance(failure, AcceptedNegativeData)
    return True


def found(shop, version, role, config, only=None):
    """(number of cases, the phases, what was wrong) of a whole run."""
    token, app = account(shop, role)
    config = SchemathesisConfig.from_dict(config | {
        "headers": {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
        "suppress-health-check": ["all"],
        "checks": {"positive_data_acceptance": {"expected-statuses": [
            "2xx", "3xx", 401, 403, 404, 409, 412]}},
    })
    schema = schemathesis.openapi.from_wsgi(f"/api/{version}/openapi.json", app, config=config)
    if only:
        schema = schema.include(path_regex=only)
    schema.hook("filter_failure")(is_a_fault)
    cases, phases, wrong = 0, set(), []
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            phases.add(event.phase.value)
            cases += len(event.recorder.interactions)
            for checks in event.recorder.checks.values():
                for check in checks:
                    if info := check.failure_info:
                        wrong.append(f"{event.recorder.label}, {event.phase.value}: {check.name}: "
                                     f"{info.failure.message}\n{info.code_sample}")
        elif isinstance(event, events.NonFatalError | events.FatalError):
            wrong.append(str(event.info if isinstance(event, events.NonFatalError)
                             else event.exception))
    return cases, phases, wrong


# hypothesis minds how schemathesis draws long text.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("role", ["admin", "user"])
@pytest.mark.parametrize("config", [
    {"seed": 1, "generation": {"deterministic": True, "no-shrink": True, "max-examples": 2},
     "phases": {"stateful": {"generation": {"max-examples": 5}, "max-steps": 6}}},
    pytest.param({"generation": {"max-examples": 200},
                  "phases": {"stateful": {"generation": {"max-examples": 100}, "max-steps": 15}}},
                 marks=pytest.mark.long),
], ids=["bounded", "long"])
def test_nothing_differs_from_the_document(shop, version, role, config):
    own = "/(users|auth)" if version == "v2" and "seed" in config else None
    cases, phases, wrong = found(shop, version, role, config, own)
    print(f"{cases:,} cases")
    assert not wrong, "\n".join(wrong)
    assert phases >= PHASES
    assert cases > 200
