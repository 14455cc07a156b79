"""Reports read a replica, which lags, dies and comes back: the rest of the shop doesn't mind."""
import time

import pytest

from tests.cluster.parts import Pair, Redis
from tests.cluster.shop import SALES, SUMS, Cluster, Download, Mixed
from tests.conftest import execute, unique
from tests.faults import until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def pair(place, parts):
    return parts(Pair(place))


@pytest.fixture(scope="module")
def cluster(place, parts, pair):
    memory = parts(Redis(place / "redis"))
    memory.start()
    return parts(Cluster(place, memory.url, pair.primary.url, sales=SALES,
                         DATABASE_READ_URL=pair.standby.url))


def buy(cluster):
    answer = cluster.server.call("POST", "transactions", token=cluster.people[1]["token"],
                                 headers={"Idempotency-Key": unique("key")},
                                 json={"items": [{"product_id": 3, "quantity": 1}]})
    assert answer.status == 201, answer.body
    return answer.json()


def sums(address, cluster):
    return address.call("GET", SUMS, token=cluster.admin)


def orders(address, cluster):
    """How many sales a report knows of."""
    answer = sums(address, cluster)
    assert answer.status == 200, answer.body
    return answer.json()["total"]["orders"]


def test_a_replica_that_lags(cluster, pair, tell):
    """A report is of a moment that has been: all of it, and nothing later."""
    until(lambda: orders(cluster.server, cluster) == SALES, 10)
    execute(pair.standby.url, "SELECT pg_wal_replay_pause()")
    try:
        bought = [buy(cluster) for _ in range(5)]
        time.sleep(0.5)
        seen = {orders(node, cluster) for node in cluster.nodes}
        mine = cluster.server.call("GET", f"transactions/{bought[-1]['id']}",
                                   token=cluster.people[1]["token"])
    finally:
        execute(pair.standby.url, "SELECT pg_wal_replay_resume()")
    begun = time.monotonic()
    until(lambda: {orders(node, cluster) for node in cluster.nodes} == {SALES + 5}, 10)
    tell("sales that reports miss while it stands still", SALES + 5 - seen.pop())
    tell("reports complete again behind it, s", time.monotonic() - begun)
    assert not seen
    assert mine.status == 200  # whatever is no report comes from the primary
    cluster.old = bought[-1]["id"]


def test_a_replica_that_dies(cluster, pair, tell):
    with Mixed(cluster) as load:
        until(lambda: load.settled and load.counts["a download", "ok"], 30)
        download = Download(cluster.server, cluster.admin)
        pair.standby.kill()
        begun = time.monotonic()
        answers = []
        for node in cluster.nodes:
            asked = time.monotonic()
            answers.append(sums(node, cluster))
            tell("a report without it: status, and s until it is there",
                 f"{answers[-1].status}, {time.monotonic() - asked:.1f}")
        until(lambda: time.monotonic() - begun > 5, 6)
        assert all(node.ready() for node in cluster.nodes)
        pair.standby.start()
        begun = time.monotonic()
        until(lambda: sums(cluster.server, cluster).status == 200, 10)
        tell("reports there again behind it, s", time.monotonic() - begun)
        until(lambda: {sums(node, cluster).status for node in cluster.nodes} == {200}, 10)
        time.sleep(1)
    assert not download.whole()
    tell("a download under way says that it is not whole", repr(download.error))
    assert download.error is not None
    tell("requests that were not answered well", dict(load.failed()))
    for answer in answers:
        assert (answer.status, answer.json()["code"]) == (503, "unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    assert set(load.failed()) <= {
        ("sums", "unavailable"), ("a download", "unavailable"), ("a download", "broken")}
    assert not load.crashed
    assert not load.stale
    assert cluster.books() == {}


def test_the_primary_may_stand_in(cluster, pair, tell):
    """Where DATABASE_READ_URL names both, reports come from whichever is there."""
    node = cluster.nodes[0]
    both = (f"{pair.standby.url},{pair.primary.folder}"
            "&target_session_attrs=prefer-standby")
    node.start(DATABASE_READ_URL=both)
    node.wait()

    def readers(server):
        return execute(server.url, "SELECT count(*) FROM pg_stat_activity WHERE pid <> "
                                   "pg_backend_pid() AND application_name = 'shopfront' AND query "
                                   "LIKE '%reports.%'")[0][0]
    assert sums(node, cluster).status == 200
    assert readers(pair.standby) > 0
    assert readers(pair.primary) == 0
    pair.standby.kill()
    try:
        begun = time.monotonic()
        until(lambda: sums(node, cluster).status == 200, 10)
        tell("reports from the primary since the replica's end, s", time.monotonic() - begun)
        assert readers(pair.primary) == 1
    finally:
        pair.standby.start()
