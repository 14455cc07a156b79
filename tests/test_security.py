"""What SECURITY.md promises: that its tests exist, and those that belong to no other file."""
import base64

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


def test_a_cursor_is_signed_with_sha_256(client, make_product):
    make_product()
    make_product()
    cursor = client.get("products?limit=1").json["pagination"]["next_cursor"]
    signature = cursor.rpartition(".")[2]
    assert len(base64.urlsafe_b64decode(signature + "=")) == 32
