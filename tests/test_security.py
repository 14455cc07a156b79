"""What SECURITY.md promises: that its tests exist, and those that belong to no other file."""
import pytest

METRICS = "metrics-token-of-the-tests"


def test_a_made_up_method_makes_no_new_series(client):
    for word in ("BREW", "BREWA", "BREWB"):
        assert client.open(word, "/health").status_code == 405
    text = client.get("/metrics", token=METRICS).text
    assert "BREW" not in text
    assert 'method="other"' in text


@pytest.mark.parametrize("path", ["products", "/nowhere", "/api/v1/docs", "/", "users"])
def test_every_answer_s_policy_closes_what_default_src_leaves_open(client, path):
    policy = client.get(path).headers["Content-Security-Policy"].split("; ")
    for directive in ("default-src", "object-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{directive} 'none'" in policy
