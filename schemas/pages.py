"""Lists: the query parameters of a page, and the object that wraps its rows."""
from marshmallow import (
    Schema,
    ValidationError,
    fields,
    post_load,
    validate,
    validates_schema,
)

from schemas.fields import MAX_ID, MAX_INT, Whole


class CursorQuery(Schema):
    """A list that is walked by cursor only."""

    limit = Whole(1, 100, load_default=20, metadata={"description": "Rows a page."})
    cursor = fields.String(
        validate=validate.Length(1, 1024), load_default=None,
        metadata={"description": "`next_cursor` of the page before."},
    )


class PageQuery(CursorQuery):
    """A list that is walked by page number, or by cursor."""

    page = Whole(1, MAX_INT, load_default=None, metadata={
        "description": "Which page, from 1, the default. Not together with `cursor`.",
    })
    count = fields.String(
        validate=validate.OneOf(["exact", "estimated", "none"]), load_default="exact",
        metadata={"description": "The price of `total`: counted, guessed, or left out."},
    )

    @validates_schema
    def one_way(self, data: dict, **_: object) -> None:
        if data["cursor"] is not None and data["page"] is not None:
            raise ValidationError("Not together with cursor.", "page")

    @post_load
    def one_spelling(self, data: dict, **_: object) -> dict:
        """Fill in the default page, so that both spellings share one cache entry."""
        if data["cursor"] is None:
            data["page"] = data["page"] or 1
        return data


class Pagination(Schema):
    page = fields.Integer(allow_none=True, metadata={"minimum": 1, "maximum": MAX_INT})
    limit = fields.Integer(metadata={"minimum": 1, "maximum": 100})
    total = fields.Integer(allow_none=True, metadata={"minimum": 0, "maximum": MAX_ID})
    pages = fields.Integer(allow_none=True, metadata={"minimum": 0, "maximum": MAX_ID})
    next_cursor = fields.String(allow_none=True, metadata={"maxLength": 1024})


def page_of(row: type[Schema]) -> type[Schema]:
    """The schema of a page of ``row``s."""
    return type(f"{row.__name__}Page", (Schema,), {
        "data": fields.List(fields.Nested(row), metadata={"maxItems": 100}),
        "pagination": fields.Nested(Pagination),
    })
