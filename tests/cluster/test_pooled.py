"""Four nodes behind nginx and in front of PgBouncer, which lends a server to each transaction."""
import time

import pytest

from tests.cluster.parts import Postgres, Redis, flask, program
from tests.cluster.shop import SALES, Cluster, Download, Mixed
from tests.cluster.test_rolling import nobody_noticed, release  # noqa: F401 - a fixture
from tests.conftest import execute
from tests.faults import until
from tests.test_pooler import Bouncer

pytestmark = pytest.mark.long
SERVERS = 8  # of PostgreSQL's, for all nodes together: they may have 4 * 9


def test_behind_pgbouncer(place, parts, tell, release):  # noqa: F811
    program("pgbouncer")
    postgres, memory = parts(Postgres(place / "postgres")), parts(Redis(place / "redis"))
    postgres.create()
    memory.start()
    bouncer = parts(Bouncer(place / "bouncer", postgres.url, default_pool_size=SERVERS))
    pooled = bouncer.url(postgres.url)
    cluster = parts(Cluster(place, memory.url, pooled, postgres.url, sales=SALES,
                            DATABASE_POOLER="transaction"))
    with Mixed(cluster) as load:
        until(lambda: load.settled and load.counts["a download", "ok"], 30)
        download = Download(cluster.server, cluster.admin)
        begun = time.monotonic()
        said = flask(release, "db", "upgrade", DATABASE_URL=pooled, REDIS_URL=memory.url,
                     DATABASE_POOLER="transaction")
        tell("flask db upgrade through it, beside the load, s", time.monotonic() - begun)
        assert "2 applied." in said
        for node in cluster.nodes:
            node.tell_to_go()
            cluster.replace(node, release)
        assert download.whole(), download.error
        tell("lines of a download through it", download.lines)
        time.sleep(2)
    tell("servers in use for all nodes", execute(
        postgres.url, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = "
                      "'client backend' AND pid <> pg_backend_pid()")[0][0])
    nobody_noticed(load, cluster, tell)
