"""schemathesis against both documents, as an admin and as a user: every check it has.

It calls the app in process, and a server over the wire. A bounded form runs with the suite and is
the same each time; of version 2 it calls what that has of its own, as a user of version 1 what
users call as themselves, over the wire the products. The long one, ``-m long``, goes on for minutes
with fresh chances at everything.
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

from tests.conftest import execute, unique

PHASES = {"coverage", "fuzzing", "stateful"}


@pytest.fixture
def shop(make_app, make_database):
    """A shop with something in it, which may be turned inside out."""
    url = make_database()
    execute(url, """
        INSERT INTO categories (name) VALUES ('Tea');
        INSERT INTO products (name, price, stock, category_id) VALUES ('Teapot', 20, 100000, 1);
    """)
    return SimpleNamespace(url=url, app=make_app(DATABASE_URL=url, REDIS_PREFIX=unique("fuzz")))


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
    """A token, and a function that makes its account what it was, to be called before each call.

    Among the calls are ones that log it out, lock it out and delete it.
    """
    sql = f"""
        INSERT INTO users (id, email, name, role, password_hash)
        VALUES (999999, 'caller@example.com', 'Ada Lovelace', '{role}', 'x')
        ON CONFLICT (id) DO UPDATE SET role = '{role}';
        INSERT INTO sessions (id, user_id, expires_at, address) OVERRIDING SYSTEM VALUE
        VALUES (999999, 999999, now() + interval '1 day', '127.0.0.1')
        ON CONFLICT (id) DO NOTHING;
        DELETE FROM idempotency_keys;
        DELETE FROM login_failures;
    """

    def restore():
        with shop.app.extensions["db"].connection() as conn:
            conn.execute(sql)

    with shop.app.app_context():
        return create_access_token("999999", additional_claims={"sid": 999999}), restore


# What a request can be wrong by that no JSON Schema says: how parts of it, or of the shop, go
# together.
RELATIONS = re.compile("|".join([
    "Not together with cursor", "Not a cursor of this list", "Must be after start_date",
    "Must not be less than min_price", "relevance", "Must be at most", "Send at least one field",
    "Each product may stand here once", "There is no product", "No such category",
    "Only an administrator", "Needed to change the e-mail", "This password is", "e-mail address",
    "Not an amount of money",  # of places, that is: multipleOf means nothing to a float
]))
NO_SUCH_DAY = re.compile("-(02-29|02-30|(02|04|06|09|11)-31)")  # which a date's pattern lets pass


def is_a_fault(context, failure, case, response):
    """Whether a difference that schemathesis found is one.

    It takes a request for valid by its schema alone, expects a header that is none to be refused,
    where HTTP has it ignored, and makes lines and heads that no server reads.
    """
    if response.status_code in (414, 431):
        return False
    if isinstance(failure, RejectedPositiveData) and response.status_code == 422:
        details = response.json().get("details", [])
        no_day = NO_SUCH_DAY.search(response.request.url)
        return not details or not all(
            RELATIONS.search(detail["message"]) or (no_day and "Not a date" in detail["message"])
            for detail in details)
    header = case.meta and case.meta.components.get(ParameterLocation.HEADER)
    if header and header.mode.is_negative:
        return not isinstance(failure, AcceptedNegativeData)
    return True


def events_of(schema, restore):
    """The events of a run, before each of whose calls the account is as it was."""
    spoilt = [True]

    def before_call(context, case, kwargs):
        if spoilt[0]:
            restore()
        spoilt[0] = case.method not in ("GET", "HEAD")
    schemathesis.hook(before_call)
    try:
        yield from from_schema(schema).execute()
    finally:
        schemathesis.hooks.unregister(before_call)


def is_a_user_s(operation):
    """Whether users call an operation as themselves."""
    said = operation.definition.raw
    return said["security"] != [{}] and "For administrators." not in said["description"]


def found(shop, version, role, config, base=None, **only):
    """(number of cases, the phases, what was wrong) of a whole run: over the wire with a base."""
    token, restore = account(shop, role)
    config = SchemathesisConfig.from_dict(config | {
        "headers": {"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
        "suppress-health-check": ["all"],
        "checks": {"positive_data_acceptance": {"expected-statuses": [
            "2xx", "3xx", 401, 403, 404, 409, 412]}},
    })
    path = f"/api/{version}/openapi.json"
    if base:
        schema = schemathesis.openapi.from_url(base + path, config=config)
    else:
        schema = schemathesis.openapi.from_wsgi(path, shop.app, config=config)
    if only:
        schema = schema.include(**only)
    schema.hook("filter_failure")(is_a_fault)
    cases, phases, wrong = 0, set(), []
    for event in events_of(schema, restore):
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


BOUNDED = {
    "seed": 1, "generation": {"deterministic": True, "no-shrink": True, "max-examples": 2},
    "phases": {"stateful": {"generation": {"max-examples": 5}, "max-steps": 6}},
}
LONG = pytest.param(
    {"generation": {"max-examples": 200},
     "phases": {"stateful": {"generation": {"max-examples": 100}, "max-steps": 15}}},
    marks=pytest.mark.long)


# hypothesis minds how schemathesis draws long text.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("role", ["admin", "user"])
@pytest.mark.parametrize("config", [BOUNDED, LONG], ids=["bounded", "long"])
def test_nothing_differs_from_the_document(shop, version, role, config):
    only = {}
    if "seed" in config and version == "v2":
        only["path_regex"] = "/users|/auth/register"
    elif "seed" in config and role == "user":
        only["func"] = lambda context: is_a_user_s(context.operation)
    cases, phases, wrong = found(shop, version, role, config, **only)
    print(f"{cases:,} cases")
    assert not wrong, "\n".join(wrong)
    assert phases >= PHASES
    assert cases > 200


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
@pytest.mark.parametrize("config", [BOUNDED, LONG], ids=["bounded", "long"])
def test_nothing_differs_over_the_wire(shop, serve, config):
    server = serve(DATABASE_URL=shop.url, REDIS_PREFIX=unique("fuzz"))
    pids = server.worker_pids
    only = {"path_regex": "^/api/v1/products$|^/products$"} if "seed" in config else {}
    cases, phases, wrong = found(shop, "v1", "admin", config, server.base, **only)
    print(f"{cases:,} cases")
    assert not wrong, "\n".join(wrong)
    assert phases >= PHASES
    assert cases > 200
    assert set(pids) <= set(server.worker_pids)
