"""Nodes are restarted and replaced one after the other while customers buy: nobody notices."""
import json
import re
import time

import pytest

from tests.cluster.parts import Postgres, Redis, flask
from tests.cluster.shop import SALES, Cluster, Download, Mixed, Pairs, all_hit
from tests.conftest import execute
from tests.faults import until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def postgres(place, parts):
    server = parts(Postgres(place / "postgres"))
    server.create()
    return server


@pytest.fixture(scope="module")
def memory(place, parts):
    server = parts(Redis(place / "redis"))
    server.start()
    return server


@pytest.fixture(scope="module")
def cluster(place, parts, postgres, memory):
    return parts(Cluster(place, memory.url, postgres.url, sales=SALES))


def told(node):
    """Seconds until a node that was told to go says so to whoever asks whether it is ready."""
    begun = time.monotonic()
    node.tell_to_go()
    until(lambda: node.call("GET", "/health/ready").status == 503, 1.8)
    return time.monotonic() - begun


def nobody_noticed(load, cluster, tell):
    tell("requests", sum(load.counts.values()))
    tell("failed requests", sum(load.failed().values()))
    tell("slowest answer, s", max(one.seconds for one in load.seen))
    tell("sales answered", len(cluster.sales))
    assert not load.crashed
    assert not load.failed(), (load.failed(), cluster.server.failures()[-5:])
    assert not load.stale
    wrong = cluster.books()
    tell("sales missing, doubled, or with wrong stock", len(wrong))
    assert wrong == {}


def test_rolling_restart(cluster, tell):
    says_so, leaves, rest = [], [], []
    with Mixed(cluster) as load:
        until(lambda: load.settled and load.counts["a download", "ok"], 30)
        for node in cluster.nodes:
            download = Download(node, cluster.admin)
            begun = time.monotonic()
            says_so.append(told(node))
            until(node.gone, 45)
            leaves.append(time.monotonic() - begun)
            assert download.whole(), download.error
            rest.append(download.ended - begun)
            cluster.replace(node)
        time.sleep(1)
    tell("503 of /health/ready after TERM, s at most", max(says_so))
    tell("downloads under way that came whole", f"{len(rest)} of {len(cluster.nodes)}")
    tell("what was left of them after TERM, s", f"{min(rest):.1f} to {max(rest):.1f}")
    tell("from TERM to a node's end, s", f"{min(leaves):.1f} to {max(leaves):.1f}")
    # Each was still being sent when its node took nobody in any more.
    assert min(rest) > int(cluster.nodes[0].env["DRAIN_SECONDS"]) + 0.5
    nobody_noticed(load, cluster, tell)


def test_what_one_node_stores_all_others_show(cluster, tell):
    until(lambda: all_hit(cluster, Pairs.LIST), 10)
    with Pairs(cluster, rounds=60) as pairs:
        pass
    tell("writes through one node, reads through the others", pairs.reads)
    tell("stale reads", len(pairs.stale))
    assert not pairs.failed
    assert pairs.reads >= 600
    assert pairs.stale == []


EXPAND = """\
ALTER TABLE products ADD COLUMN origin text;
ALTER TABLE transactions ADD COLUMN note text;
ALTER TABLE users ADD COLUMN locale text;

-- down
ALTER TABLE users DROP COLUMN locale;
ALTER TABLE transactions DROP COLUMN note;
ALTER TABLE products DROP COLUMN origin;
"""
INDEX = """\
-- no-transaction
CREATE INDEX CONCURRENTLY IF NOT EXISTS products_origin_idx ON products (origin);
CREATE INDEX CONCURRENTLY IF NOT EXISTS transactions_note_idx ON transactions (note);

-- down
DROP INDEX transactions_note_idx;
DROP INDEX products_origin_idx;
"""


@pytest.fixture
def release(copy_of_project):
    """The folder of a release to come: its code says something else, and has two migrations."""
    folder = copy_of_project / "sql/migrations"
    number = max(int(file.name[:4]) for file in folder.glob("*.sql"))
    (folder / f"{number + 1:04d}_origin.sql").write_text(EXPAND)
    (folder / f"{number + 2:04d}_origin_index.sql").write_text(INDEX)
    health = copy_of_project / "blueprints/health.py"
    text, found = re.subn(r'\{"status": "ok"\}$', '{"status": "ok", "release": 2}',
                          health.read_text(), flags=re.M)
    assert found
    health.write_text(text)
    return copy_of_project


def release_of(node):
    return json.loads(node.call("GET", "/health/live").body).get("release", 1)


def test_rolling_release(cluster, postgres, release, tell):
    with Mixed(cluster) as load:
        until(lambda: load.settled and load.counts["a download", "ok"], 30)
        begun = time.monotonic()
        said = flask(release, "db", "upgrade", DATABASE_URL=postgres.url,
                     REDIS_URL=cluster.nodes[0].env["REDIS_URL"])
        tell("flask db upgrade beside the old code's load, s", time.monotonic() - begun)
        assert "2 applied." in said
        assert execute(postgres.url, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]
        for _ in range(20):  # the old code on the new schema
            assert [node.ready() for node in cluster.nodes] == [True] * len(cluster.nodes)
            time.sleep(0.1)
        begun = time.monotonic()
        for node in cluster.nodes:
            assert release_of(node) == 1
            node.tell_to_go()
            cluster.replace(node, release)
            assert release_of(node) == 2
        tell("all nodes replaced, s", time.monotonic() - begun)
        time.sleep(1)
    nobody_noticed(load, cluster, tell)
