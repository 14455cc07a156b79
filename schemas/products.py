"""Products."""
from marshmallow import (
    Schema,
    ValidationError,
    fields,
    post_load,
    validate,
    validates_schema,
)

from schemas.fields import (
    MAX_ID,
    MAX_INT,
    Amount,
    Flag,
    Id,
    Instant,
    Line,
    Money,
    Number,
    Search,
    Text,
    Whole,
)
from schemas.pages import PageQuery, page_of


class Product(Schema):
    id = Id(dump_only=True)
    sku = fields.String(dump_only=True, allow_none=True, metadata={"maxLength": 64})
    name = fields.String(dump_only=True, metadata={"maxLength": 200})
    description = fields.String(dump_only=True, metadata={"maxLength": 10000})
    price = Amount()
    stock = Number(0, MAX_INT, dump_only=True)
    category_id = fields.Integer(
        dump_only=True, allow_none=True, metadata={"minimum": 1, "maximum": MAX_ID}
    )
    category_name = fields.String(dump_only=True, allow_none=True, metadata={"maxLength": 100})
    created_at = Instant()
    updated_at = Instant()


class NewProduct(Schema):
    sku = Line(1, 64, allow_none=True, load_default=None)
    name = Line(1, 200, required=True)
    description = Text(0, 10000, load_default="")
    price = Money(required=True)
    stock = Number(0, MAX_INT, load_default=0)
    category_id = Id(allow_none=True, load_default=None)


class ProductChanges(Schema):
    """At least one field."""

    sku = Line(1, 64, allow_none=True)
    name = Line(1, 200)
    description = Text(0, 10000)
    price = Money()
    stock = Number(0, MAX_INT)
    category_id = Id(allow_none=True)

    @validates_schema
    def something(self, data: dict, **_: object) -> None:
        if not data:
            raise ValidationError("Send at least one field to change.")


class ProductQuery(PageQuery):
    category_id = fields.List(
        Whole(1, MAX_ID), load_default=None, validate=validate.Length(1, 20),
        metadata={"description": "May be repeated: any of these."},
    )
    min_price = Money(load_default=None)
    max_price = Money(load_default=None)
    in_stock = Flag(load_default=None, metadata={
        "description": "true: only what can be bought; false: only what is sold out.",
    })
    search = Search(load_default=None, metadata={
        "description": "A substring of name, description or SKU, in any letter case.",
    })
    sort = fields.String(
        validate=validate.OneOf(["created_at", "name", "price", "relevance"]),
        load_default="created_at",
        metadata={"description": "`relevance` goes with `search`."},
    )
    order = fields.String(validate=validate.OneOf(["asc", "desc"]), load_default=None, metadata={
        "description": "Default: desc for `created_at` and `relevance`, which knows no other; "
                       "else asc.",
    })

    @validates_schema
    def fits(self, data: dict, **_: object) -> None:
        if data["sort"] == "relevance" and data["search"] is None:
            raise ValidationError("relevance needs search.", "sort")
        if data["sort"] == "relevance" and data["order"] == "asc":
            raise ValidationError("relevance is sorted the best first.", "order")
        low, high = data["min_price"], data["max_price"]
        if low is not None and high is not None and low > high:
            raise ValidationError("Must not be less than min_price.", "max_price")

    @post_load
    def one_order(self, data: dict, **_: object) -> dict:
        """Normalise categories and order, so that equivalent queries share one cache entry."""
        data["category_id"] = sorted(set(data["category_id"] or ())) or None
        best_first = data["sort"] in ("created_at", "relevance")
        data["order"] = data["order"] or ("desc" if best_first else "asc")
        return data


ProductPage = page_of(Product)
