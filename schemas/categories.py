"""Categories."""
from marshmallow import Schema, fields

from schemas.fields import MAX_ID, Id, Instant, Line


class Category(Schema):
    id = Id(dump_only=True)
    name = fields.String(dump_only=True, metadata={"maxLength": 100})
    product_count = fields.Integer(dump_only=True, metadata={"minimum": 0, "maximum": MAX_ID})
    created_at = Instant()
    updated_at = Instant()


class Categories(Schema):
    data = fields.List(fields.Nested(Category), metadata={"maxItems": 100000})


class CategoryIn(Schema):
    name = Line(1, 100, required=True)
