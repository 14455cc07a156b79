"""The primary of PostgreSQL or of Redis is killed under load, and another takes its place."""
import itertools
import time

import pytest

from tests.cluster.parts import Pair, Redises, flask
from tests.cluster.shop import Cluster, Mixed, Pairs, all_hit
from tests.conftest import ROOT
from tests.faults import until

pytestmark = pytest.mark.long
NOTICED = 1.0  # seconds until whoever watches over PostgreSQL is sure that the primary is gone
SPEECHLESS = {"unavailable", "request_in_progress"}


@pytest.fixture(scope="module")
def pair(place, parts):
    return parts(Pair(place / "postgres"))


@pytest.fixture(scope="module")
def redises(place, parts):
    return parts(Redises(place / "redis"))


@pytest.fixture(scope="module")
def cluster(place, parts, pair, redises):
    return parts(Cluster(place, redises.url, pair.url, STATEMENT_TIMEOUT_MS="2000"))


def wait_for_hits(cluster, redises, *paths):
    """Wait until all nodes have come back to Redis, and show these from the cache."""
    end = time.monotonic() + 20
    while not all_hit(cluster, *paths):
        assert time.monotonic() < end, (redises.marks(), [node.ready() for node in cluster.nodes])
        time.sleep(0.05)


def limits(cluster):
    """What is left of one client's limit, as each node tells in turn."""
    headers = {"X-Forwarded-For": "203.0.113.77"}
    return [int(node.call("GET", "categories", headers=headers).headers["X-RateLimit-Remaining"])
            for node in cluster.nodes]


def counts_down(left):
    return left == list(range(left[0], left[0] - len(left), -1))


def test_redis_fails_over(cluster, redises, tell):
    """At leisure, at once, and in between: reads are never stale, limits and cache come back."""
    wait_for_hits(cluster, redises, "products/2", Pairs.LIST)
    left = limits(cluster)
    assert counts_down(left)
    back = []
    with Mixed(cluster) as load, Pairs(cluster) as pairs:
        until(lambda: load.settled and pairs.reads > 50, 30)
        for after in (1.0, 0.0, 0.3):
            promoted = redises.fail_over(after)
            wait_for_hits(cluster, redises, "products/2")
            back.append(time.monotonic() - promoted)
            now = limits(cluster)
            assert counts_down(now)
            assert now[0] == left[-1] - 1
            left = now
            redises.mend()
            time.sleep(1)
    begun = time.monotonic()  # while they are changed all the time, lists are seldom kept
    wait_for_hits(cluster, redises, Pairs.LIST)
    tell("lists, too, since nobody writes any more, s", time.monotonic() - begun)
    tell("limits and cache back on all nodes since the promotion, s",
         ", ".join(f"{seconds:.1f}" for seconds in back))
    tell("failed requests", sum(load.failed().values()))
    tell("slowest write, s", max(one.seconds for one in load.seen if one.kind == "an edit"))
    tell("writes through one node, reads through the others", pairs.reads)
    tell("stale reads", len(pairs.stale) + len(load.stale))
    assert not load.crashed
    assert not load.failed()
    assert not load.stale
    assert not pairs.failed
    assert pairs.stale == []
    assert max(back) < 5
    assert cluster.books() == {}


def test_redis_fails_over_to_a_replica_that_missed_the_end(cluster, redises, tell):
    """What it doesn't know to be stale is shown by nobody."""
    paths = "products/30", Pairs.LIST
    reads, stale, failed = 0, [], []
    for turn in range(6):
        wait_for_hits(cluster, redises, *paths)
        redises.cut()
        writer, price = cluster.nodes[turn % len(cluster.nodes)], f"{2000 + turn}.00"
        answer = writer.call("PATCH", "products/30", token=cluster.admin, json={"price": price})
        assert answer.status == 200
        end = redises.fail_over(0) + 1.5
        while time.monotonic() < end:
            for node, path in itertools.product(cluster.nodes, paths):
                answer = node.call("GET", path)
                if answer.status != 200:
                    failed.append(answer.body)
                    continue
                body, reads = answer.json(), reads + 1
                shown = [one["price"] for one in body.get("data", [body]) if one["id"] == 30]
                if shown != [price]:
                    stale.append((turn, round(time.monotonic() - end + 1.5, 2), path, shown))
        redises.mend()
    tell("reads behind such failovers", reads)
    tell("stale reads", len(stale))
    assert failed == []
    assert stale == []


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_postgresql_fails_over(cluster, pair, redises, tell, how):
    """A machine that is gone refuses nobody, and says nothing any more: as if frozen.

    Behind it the marks of sales of which nobody knew whether they were stored keep lists out of the
    cache for 75 s.
    """
    pair.keep_every_sale()
    before = len(cluster.sales)
    with Mixed(cluster) as load:
        until(lambda: load.settled and len(cluster.sales) > before + 50, 30)
        until_then, killed = len(cluster.sales) - before, time.monotonic()
        pair.primary.kill() if how == "killed" else pair.primary.freeze()
        time.sleep(NOTICED)
        pair.standby.promote()
        promoted = time.monotonic()
        until(lambda: load.first_sale_answered(promoted), 20)
        tell("no sale since then, s", load.first_sale(killed))
        tell("no sale since the promotion, s", load.first_sale(promoted))
        until(lambda: all(node.ready() for node in cluster.nodes), 10)
        tell("all nodes ready since the promotion, s", time.monotonic() - promoted)
        time.sleep(2)
        pair.mend()  # from now on the first host of the URL, or the second, takes no writes
        time.sleep(2)
    wrong = cluster.books()
    tell("sales answered before it, and in all", f"{until_then}, {len(cluster.sales) - before}")
    tell("sales missing, doubled, or with wrong stock", len(wrong))
    tell("requests that were not answered well", dict(load.failed()))
    assert wrong == {}
    assert not load.crashed
    assert not load.stale
    assert {outcome for _, outcome in load.failed()} <= SPEECHLESS
    assert load.first_sale(promoted) < (3 if how == "killed" else 7)
    said = flask(ROOT, "db", "check", DATABASE_URL=pair.url, REDIS_URL=redises.url)
    assert said.count(": ok") == 5
