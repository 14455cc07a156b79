"""What SECURITY.md promises: that its tests exist, and those that belong to no other file."""
METRICS = "metrics-token-of-the-tests"


def test_a_made_up_method_makes_no_new_series(client):
    for word in ("BREW", "BREWA", "BREWB"):
        assert client.open(word, "/health").status_code == 405
    text = client.get("/metrics", token=METRICS).text
    assert "BREW" not in text
    assert 'method="other"' in text
