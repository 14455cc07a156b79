"""PostgreSQL and Redis by TLS, as their URLs ask for; whom the URL's CA doesn't know is refused.

The PostgreSQL that comes with the tests knows no TLS: haproxy speaks it in its place, or PgBouncer.
"""
import json
import os
import pathlib
import subprocess
import sys

import psycopg
import pytest
import redis

from db.embedded import _user
from tests.cluster.parts import (
    DATABASE,
    ENV,
    Haproxy,
    Node,
    Postgres,
    Redis,
    flask,
    listens,
    port,
    program,
)
from tests.conftest import PASSWORD, ROOT, unique
from tests.faults import until
from tests.test_pooler import Bouncer

pytestmark = pytest.mark.long
REFUSED = "certificate verify failed"


class Papers:
    """A CA, a certificate for localhost, and the CA of somebody else."""

    def __init__(self, folder):
        folder.mkdir(mode=0o755)
        self.folder = folder
        self.ca, self.certificate, self.key, self.both, self.stranger = (
            folder / name for name in ("ca.pem", "shop.pem", "shop.key", "both.pem", "other.pem"))
        self._new_ca("ca")
        self._new_ca("other")
        self._ask("req", "-newkey", *self.KEY, "-subj", "/CN=localhost", "-keyout", self.key,
                  "-out", folder / "asked")
        (folder / "names").write_text("subjectAltName=DNS:localhost\n")
        self._ask("x509", "-req", "-in", folder / "asked", "-CA", self.ca, "-CAkey",
                  folder / "ca.key", "-CAcreateserial", "-days", "2", "-extfile", folder / "names",
                  "-out", self.certificate)
        self.both.write_text(self.certificate.read_text() + self.key.read_text())
        if user := _user():
            os.chown(self.key, user["user"], user["group"])

    KEY = "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"

    def _new_ca(self, name):
        self._ask("req", "-x509", "-newkey", *self.KEY, "-days", "2", "-subj", f"/CN={name}",
                  "-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.pem")

    def _ask(self, *words):
        subprocess.run([program("openssl"), *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def papers(place):
    return Papers(place / "papers")


@pytest.fixture(scope="module")
def postgres(place, parts):
    server = parts(Postgres(place / "postgres"))
    server.create()
    return server


@pytest.fixture(scope="module")
def redis_port(place, parts, papers):
    server = Redis(place / "redis", "port 0", f"tls-cert-file {papers.certificate}",
                   f"tls-key-file {papers.key}", f"tls-ca-cert-file {papers.ca}",
                   "tls-auth-clients no")
    server.options = (*server.options, f"tls-port {server.port}")
    parts(server).start()
    return server.port


@pytest.fixture(scope="module")
def front(place, parts, papers, postgres):
    return parts(Haproxy(place / "haproxy", [
        f"server postgres unix@{postgres.folder}/.s.PGSQL.5432"],
        f"ssl crt {papers.both} alpn postgresql"))


@pytest.fixture(scope="module")
def shop(papers, front, redis_port):
    """A function that gives the settings of a shop by TLS, with this CA or another."""
    def settings(database_ca=papers.ca, redis_ca=papers.ca, host="localhost"):
        return ENV | {
            "DATABASE_URL": f"postgresql://{DATABASE}@{host}:{front.port}/{DATABASE}?sslmode="
                            f"verify-full&sslrootcert={database_ca}&hostaddr=127.0.0.1"
                            "&sslnegotiation=direct",
            "REDIS_URL": f"rediss://localhost:{redis_port}/0?ssl_ca_certs={redis_ca}"}
    return settings


@pytest.fixture(scope="module")
def pooled(place, parts, papers, postgres, front, shop):
    """The settings of a shop by TLS through PgBouncer."""
    program("pgbouncer")
    number, settings = port(), shop()
    parts(Bouncer(place / "bouncer", postgres.url, listen_port=number, listen_addr="127.0.0.1",
                  client_tls_sslmode="require", client_tls_key_file=papers.key,
                  client_tls_cert_file=papers.certificate))
    url = settings["DATABASE_URL"].replace(f":{front.port}/", f":{number}/")
    return settings | {"DATABASE_URL": url.removesuffix("&sslnegotiation=direct"),
                       "DATABASE_POOLER": "transaction"}


@pytest.fixture
def serve():
    """A function that starts a node."""
    nodes = []

    def start(env):
        nodes.append(Node(env))
        nodes[-1].start()
        nodes[-1].server.wait()
        return nodes[-1]
    yield start
    for node in nodes:
        node.stop()


def log_of(node):
    return pathlib.Path(node.server.log_file.name).read_text()


@pytest.mark.parametrize("way", ["shop", "pooled"])
def test_a_shop_by_tls(request, serve, tell, way):
    settings = request.getfixturevalue(way)
    settings = settings() if callable(settings) else settings
    assert ": new" not in flask(ROOT, "db", "upgrade", **settings)
    with pytest.raises(psycopg.OperationalError):  # nothing gets in without
        psycopg.connect(settings["DATABASE_URL"].replace("verify-full", "disable")
                        .replace("&sslnegotiation=direct", ""), connect_timeout=5)
    node = serve(settings)
    until(node.ready, 10)
    token = node.call("POST", "auth/register", json={
        "email": f"{unique('u')}@example.com", "password": PASSWORD, "name": "Ada"}).json()["token"]
    statuses = [node.call("GET", path, token=token).status
                for _ in range(100) for path in ("users/me", "products", "categories")]
    assert set(statuses) == {200}
    answer = node.call("GET", "products")
    assert answer.headers["X-Cache"] == "hit"
    away = log_of(node).count("Redis is away")
    tell("requests by TLS, failed", f"{len(statuses)}, 0")
    tell("times that Redis seemed away", away)
    assert away == 0


@pytest.mark.parametrize("wrong", [{"database_ca": "stranger"}, {"host": "127.0.0.1"}])
def test_a_database_that_is_not_known_is_refused(shop, papers, serve, tell, wrong):
    settings = shop(**{name: getattr(papers, value, value) for name, value in wrong.items()})
    says = REFUSED if "database_ca" in wrong else "does not match host name"
    for command in (["flask", "db", "status"], ["gunicorn", "-b", "127.0.0.1:0"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=60,
            env=os.environ | settings | {"APP_ENV": "development"})
        tell(" ".join(command[:2]), f"exit {done.returncode}: {done.stderr.strip()}")
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    node = serve(settings)  # in production, where a database may come later
    assert node.call("GET", "/health/ready").status == 503
    assert node.call("GET", "products").status == 503
    line = next(line for line in log_of(node).splitlines() if says in line)
    tell("a node in production", f"503, and logs: {line}")
    assert json.loads(line)["level"] == "WARNING"
    assert "Traceback" not in log_of(node)


def test_a_redis_that_is_not_known_is_done_without(shop, papers, serve, tell):
    node = serve(shop(redis_ca=papers.stranger))
    assert node.call("GET", "products").status == 200
    assert node.call("GET", "/health/ready").json() == {"status": "degraded", "redis": "away"}
    lines = [line for line in log_of(node).splitlines() if "Redis is away" in line]
    tell("a node", f"degraded, and logs: {lines[0] if lines else None}")
    assert REFUSED in lines[0]


def test_redis_lets_nobody_in_without_tls(redis_port):
    assert listens(redis_port)
    with pytest.raises(redis.RedisError), redis.Redis(port=redis_port) as plain:
        plain.ping()
