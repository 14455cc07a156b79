"""Clients generated from the documents, as a consumer would make them, shop at a real server."""
import importlib
import json
import subprocess
import sys

import pytest

from tests import clients, golden
from tests.conftest import unique

VERSIONS = ["v1", "v2"]
ROOT = golden.FOLDER.parent


@pytest.fixture
def products(make_product):
    return [make_product()["id"] for _ in range(3)]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_python_client_shops(version, server, admin, products, tmp_path, monkeypatch):
    package = f"shop_{version}"
    (tmp_path / "config.yaml").write_text("post_hooks: []")
    subprocess.run([
        sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning",
        f"--path={golden.FOLDER / version}.json", f"--output-path={tmp_path / package}",
        "--meta=none", f"--config={tmp_path / 'config.yaml'}",
    ], check=True, capture_output=True)
    monkeypatch.syspath_prepend(tmp_path)

    def call(name, token=None, **kwargs):
        shop = importlib.import_module(package)
        client = shop.AuthenticatedClient(server.base, token) if token else shop.Client(server.base)
        with client:
            answer = importlib.import_module(f"{package}.api.{name}").sync(client=client, **kwargs)
        assert not isinstance(answer, models.Problem), answer
        return answer
    models = importlib.import_module(f"{package}.models")

    me = {"email": f"{unique('py')}@example.com", "password": "a long walk home"}
    call("auth.register", body=models.Registration(**me, name="Ada"))
    token = call("auth.log_in", body=models.Login(**me)).token
    found, cursor = [], {}
    while cursor is not None:
        page = call("products.list_products", limit=2, **cursor)
        found += [product.id for product in page.data]
        cursor = page.pagination.next_cursor and {"cursor": page.pagination.next_cursor}
    assert set(products) <= set(found)
    items = [models.NewItem(product_id=products[0], quantity=2)]
    sale = call("transactions.create_transaction", token, body=models.NewTransaction(items=items))
    assert sale.items[0].product_id == products[0]
    report = call("reports.report_transactions", admin.token, start_date="2026-01-01",
                  end_date="2199-01-01")
    assert sale.id in [record.transaction_id for record in report.data]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_typescript_client_shops(version, server, admin, products, tmp_path):
    tools = clients.installed(ROOT / "clients" / "package.json")
    (tmp_path / "node_modules").symlink_to(tools / "node_modules")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    program = (ROOT / "clients" / "shop.ts").read_text().replace("/api/v1/", f"/api/{version}/")
    (tmp_path / "shop.ts").write_text(program)

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    tools = tmp_path / "node_modules" / ".bin"
    run(tools / "openapi-typescript", golden.FOLDER / f"{version}.json", "-o", "schema.ts")
    run(tools / "tsc", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "preserve",
        "--lib", "es2022,dom", "shop.ts")
    answer = json.loads(run("node", "shop.js", server.base, admin.email, admin.password))
    assert set(products) <= set(answer["products"])
    assert answer["sold"]
    assert answer["missing"] == "not_found"
