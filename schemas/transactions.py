"""Sales."""
from marshmallow import Schema, ValidationError, fields, validate, validates

from schemas.fields import MAX_ID, Amount, Id, Instant, Number, Whole
from schemas.moments import Moment
from schemas.pages import PageQuery, page_of

STATUSES = ["completed", "refunded"]


class Item(Schema):
    product_id = Id(dump_only=True)
    name = fields.String(dump_only=True, metadata={"maxLength": 200})
    quantity = Number(1, 1000, dump_only=True)
    unit_price = Amount()
    amount = Amount()


class Transaction(Schema):
    id = Id(dump_only=True)
    user_id = fields.Integer(
        dump_only=True, allow_none=True, metadata={"minimum": 1, "maximum": MAX_ID}
    )
    status = fields.String(dump_only=True, validate=validate.OneOf(STATUSES))
    total = Amount()
    items = fields.List(
        fields.Nested(Item), dump_only=True, metadata={"minItems": 1, "maxItems": 100}
    )
    created_at = Instant()
    refunded_at = Instant(allow_none=True)


class NewItem(Schema):
    product_id = Id(required=True)
    quantity = Number(1, 1000, required=True)


class NewTransaction(Schema):
    json_only = True

    items = fields.List(fields.Nested(NewItem), required=True, validate=validate.Length(1, 100))

    @validates("items")
    def once_each(self, items: list[dict], **_: object) -> None:
        ids = [item["product_id"] for item in items if "product_id" in item]
        if len(set(ids)) != len(ids):
            raise ValidationError("Each product may stand here once.")


class TransactionQuery(PageQuery):
    user_id = Whole(1, MAX_ID, load_default=None, metadata={"description": "For admins."})
    status = fields.String(validate=validate.OneOf(STATUSES), load_default=None)
    start = Moment(data_key="from", load_default=None, metadata={"description": "From then on."})
    end = Moment(data_key="to", load_default=None, metadata={"description": "Up to, without."})


TransactionPage = page_of(Transaction)
