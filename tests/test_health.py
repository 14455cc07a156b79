"""Health: for load balancers and people."""
import threading


def test_health_says_ok_since_when(client):
    body = client.get("/health").json
    assert body["status"] == "OK"
    assert body["uptime"] >= 0
    assert "T" in body["timestamp"]


def test_ready_is_ok_with_database_and_redis(client):
    assert client.get("/health/ready").json == {"status": "ok"}


def test_ready_is_degraded_without_redis(make_app, make_client, tmp_path):
    app = make_app(REDIS_URL=f"unix://{tmp_path}/nothing")
    assert make_client(app).get("/health/ready").json["status"] == "degraded"


def test_ready_is_503_without_a_database(make_app, make_client, tmp_path):
    app = make_app(DATABASE_URL=f"postgresql:///shop?host={tmp_path}")
    response = make_client(app).get("/health/ready")
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0


def test_ready_is_503_while_the_schema_is_behind(make_app, make_client, make_database):
    app = make_app(DATABASE_URL=make_database(empty=True))
    response = make_client(app).get("/health/ready")
    assert response.status_code == 503
    assert "Schema" in response.json["detail"]


def test_ready_is_503_without_a_thread_and_ok_with_one_again(client, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert client.get("/health/ready").status_code == 503
    assert client.get("/health/ready").json == {"status": "ok"}


def test_live_needs_nothing(make_app, make_client, tmp_path):
    app = make_app(DATABASE_URL=f"postgresql:///shop?host={tmp_path}",
                   REDIS_URL=f"unix://{tmp_path}/nothing")
    assert make_client(app).get("/health/live").status_code == 200
