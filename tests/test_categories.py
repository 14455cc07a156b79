"""Categories: their names, and how many products each of them has."""
import pytest

from tests.conftest import unique

MAX_ID = 2**63 - 1


def test_a_category_is_created_read_renamed_and_deleted(client, admin):
    name = unique("Teas ")
    created = client.post("categories", token=admin.token, json={"name": name})
    assert created.status_code == 201
    category = created.json
    assert (category["name"], category["product_count"]) == (name, 0)
    path = f"categories/{category['id']}"
    assert created.headers["Location"] == f"/api/v1/{path}"
    assert client.get(path).json == category
    renamed = client.patch(path, token=admin.token, json={"name": f"{name} and herbs"})
    assert renamed.status_code == 200
    assert renamed.json["updated_at"] > category["updated_at"]
    assert renamed.json == category | {"name": f"{name} and herbs",
                                       "updated_at": renamed.json["updated_at"]}
    assert client.get(path).json == renamed.json
    deleted = client.delete(path, token=admin.token)
    assert (deleted.status_code, deleted.data) == (204, b"")
    assert client.get(path).status_code == 404
    assert client.patch(path, token=admin.token, json={"name": name}).status_code == 404
    assert client.delete(path, token=admin.token).status_code == 404


def test_version_2_serves_the_same_categories(client, admin):
    created = client.post("/api/v2/categories", token=admin.token, json={"name": unique("C")})
    assert created.headers["Location"] == f"/api/v2/categories/{created.json['id']}"
    assert client.get(created.headers["Location"]).json == created.json
    assert client.get(f"categories/{created.json['id']}").json == created.json
    assert client.get("/api/v2/categories").json == client.get("categories").json


def test_the_list_has_all_categories_by_name_in_any_letter_case(client, make_category):
    word = unique("Z")
    made = [make_category(f"{word}{end}") for end in ("b", "A", "c", "B2", "ä")]
    data = client.get("categories").json["data"]
    assert [c for c in data if c["name"].startswith(word)] == [made[i] for i in (1, 0, 3, 2, 4)]
    assert data == sorted(data, key=lambda c: (c["name"].lower(), c["id"]))


@pytest.mark.parametrize("name", ["x", "x" * 100, "茶" * 100, "100% _ ' \\"])
def test_a_name_on_its_bound_is_stored(client, admin, name):
    created = client.post("categories", token=admin.token, json={"name": name})
    assert (created.status_code, created.json["name"]) == (201, name)
    client.delete(f"categories/{created.json['id']}", token=admin.token)


@pytest.mark.parametrize("body", [
    {}, {"name": ""}, {"name": "  "}, {"name": "x" * 101}, {"name": None}, {"name": 1},
    {"name": ["x"]}, {"name": "a\nb"}, {"name": "a\x1fb"}, {"name": True},
], ids=str)
def test_a_name_beyond_its_bound_is_refused(client, admin, make_category, body):
    path = f"categories/{make_category()['id']}"
    for response in (client.post("categories", token=admin.token, json=body),
                     client.patch(path, token=admin.token, json=body)):
        assert (response.status_code, response.json["code"]) == (422, "validation_failed")
        assert [detail["field"] for detail in response.json["details"]] == ["name"]


@pytest.mark.parametrize("field", ["id", "product_count", "created_at", "colour"])
def test_a_field_that_is_not_the_clients_is_refused(client, admin, field):
    response = client.post("categories", token=admin.token, json={"name": "x", field: 1})
    assert response.status_code == 422
    assert [detail["field"] for detail in response.json["details"]] == [field]


def test_the_list_takes_no_parameters(client):
    response = client.get("categories?page=1")
    assert response.status_code == 422
    assert [(d["field"], d["in"]) for d in response.json["details"]] == [("page", "query")]


def test_a_name_is_taken_in_any_letter_case(client, admin, make_category):
    name = unique("Grün ")
    first, second = make_category(name), make_category()
    answers = [client.post("categories", token=admin.token, json={"name": name.upper()}),
               client.post("categories", token=admin.token, json={"name": f" {name.lower()} "}),
               client.patch(f"categories/{second['id']}", token=admin.token,
                            json={"name": name.swapcase()})]
    assert {(a.status_code, a.json["code"]) for a in answers} == {(409, "name_taken")}
    assert client.get(f"categories/{second['id']}").json == second
    own = client.patch(f"categories/{first['id']}", token=admin.token, json={"name": name.upper()})
    assert (own.status_code, own.json["name"]) == (200, name.upper())


def test_a_name_is_free_again_when_its_category_is_gone(client, admin, make_category):
    category = make_category()
    client.delete(f"categories/{category['id']}", token=admin.token)
    assert make_category(category["name"])["id"] != category["id"]


def test_a_category_in_use_stays(client, admin, make_category, make_product):
    category = make_category()
    path = f"categories/{category['id']}"
    product = make_product(category_id=category["id"])
    refused = client.delete(path, token=admin.token)
    assert (refused.status_code, refused.json["code"]) == (409, "category_in_use")
    assert client.get(path).json["id"] == category["id"]
    client.delete(f"products/{product['id']}", token=admin.token)
    assert client.delete(path, token=admin.token).status_code == 204


def test_a_category_whose_products_are_retired_is_not_in_use(client, admin, user, make_category,
                                                             make_product):
    category = make_category()
    product = make_product(category_id=category["id"])
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": product["id"], "quantity": 1}]})
    client.delete(f"products/{product['id']}", token=admin.token)
    assert client.delete(f"categories/{category['id']}", token=admin.token).status_code == 204


def test_product_count_is_exact_after_every_change(client, admin, user, make_category,
                                                   make_product):
    one, two = make_category()["id"], make_category()["id"]

    def counts():
        single = tuple(client.get(f"categories/{c}").json["product_count"] for c in (one, two))
        listed = {c["id"]: c["product_count"] for c in client.get("categories").json["data"]}
        assert (listed[one], listed[two]) == single
        return single

    def change(product, **fields):
        path = f"products/{product['id']}"
        assert client.patch(path, token=admin.token, json=fields).status_code == 200

    assert counts() == (0, 0)
    a, b = make_product(category_id=one), make_product(category_id=one)
    assert counts() == (2, 0)
    change(a, category_id=two)
    assert counts() == (1, 1)
    change(a, category_id=None)
    assert counts() == (1, 0)
    change(a, category_id=two, name="moved back")
    assert counts() == (1, 1)
    client.post("transactions", token=user.token,
                json={"items": [{"product_id": a["id"], "quantity": 1}]})
    client.delete(f"products/{a['id']}", token=admin.token)  # retired
    assert counts() == (1, 0)
    client.delete(f"products/{b['id']}", token=admin.token)
    assert counts() == (0, 0)


def test_a_product_shows_its_categorys_name(client, admin, make_category, make_product):
    category = make_category()
    product = make_product(category_id=category["id"])
    assert product["category_name"] == category["name"]
    name = unique("Renamed ")
    client.patch(f"categories/{category['id']}", token=admin.token, json={"name": name})
    assert client.get(f"products/{product['id']}").json["category_name"] == name


def test_everybody_reads_and_only_an_admin_writes(client, user, make_category):
    path = f"categories/{make_category()['id']}"
    assert client.get("categories").status_code == client.get(path).status_code == 200
    for method, address in (("POST", "categories"), ("PATCH", path), ("DELETE", path)):
        for token, status in ((None, 401), (user.token, 403)):
            assert client.open(method, address, token=token, json={}).status_code == status


@pytest.mark.parametrize("bad", ["0", "-1", "x", "9223372036854775808", "%00", str(MAX_ID)])
def test_an_id_that_no_category_has_is_404(client, admin, bad):
    for method in ("GET", "DELETE"):
        assert client.open(method, f"categories/{bad}", token=admin.token).status_code == 404


def test_a_form_makes_a_category_too(client, admin):
    name = unique("Form ")
    created = client.post("categories", token=admin.token, data={"name": name})
    assert (created.status_code, created.json["name"]) == (201, name)
