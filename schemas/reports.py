"""Reports: the time window they cover, and their records."""
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from schemas.fields import MAX_ID, MAX_INT, Amount, Id, Instant, Number
from schemas.moments import Moment
from schemas.transactions import STATUSES

COUNT = {"minimum": 0, "maximum": MAX_ID}


class Window(Schema):
    start_date = Moment(required=True, metadata={"description": "From then on."})
    end_date = Moment(required=True, metadata={"description": "Up to, without."})

    @validates_schema
    def forward(self, data: dict, **_: object) -> None:
        if data["end_date"] <= data["start_date"]:
            raise ValidationError("Must be after start_date.", "end_date")


class TransactionsReportQuery(Window):
    format = fields.String(
        validate=validate.OneOf(["json", "ndjson", "csv"]), load_default=None,
        metadata={"description": "Wins over `Accept`."},
    )


class Record(Schema):
    transaction_id = Id()
    created_at = Instant()
    status = fields.String(validate=validate.OneOf(STATUSES))
    user_id = fields.Integer(allow_none=True, metadata={"minimum": 1, "maximum": MAX_ID})
    product_id = Id()
    product_name = fields.String(metadata={"maxLength": 200})
    quantity = Number(1, 1000)
    unit_price = Amount()
    amount = Amount()


class TransactionsReport(Schema):
    data = fields.List(fields.Nested(Record), metadata={"maxItems": MAX_INT})


class SalesReportQuery(Window):
    group_by = fields.String(
        validate=validate.OneOf(["day", "week", "month", "category", "product"]),
        load_default="day",
    )


class Total(Schema):
    orders = fields.Integer(metadata=COUNT)
    items = fields.Integer(metadata=COUNT)
    amount = Amount()


class Group(Total):
    key = fields.String(allow_none=True, metadata={"maxLength": 40})
    label = fields.String(allow_none=True, metadata={"maxLength": 200})


class SalesReport(Schema):
    data = fields.List(fields.Nested(Group), metadata={"maxItems": MAX_INT})
    total = fields.Nested(Total)
