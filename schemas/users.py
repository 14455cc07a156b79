"""Users as version 1 shows them."""
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from schemas.fields import Email, Id, Instant, Line, NewPassword, Password, Search
from schemas.pages import PageQuery, page_of

ROLES = ["user", "admin"]


class User(Schema):
    id = Id(dump_only=True)
    email = Email(dump_only=True, metadata={"maxLength": 254})
    name = fields.String(dump_only=True, metadata={"maxLength": 100})
    role = fields.String(dump_only=True, validate=validate.OneOf(ROLES))
    email_verified = fields.Boolean(dump_only=True)
    created_at = Instant()
    updated_at = Instant()
    last_login = Instant(allow_none=True)


class NewUser(Schema):
    email = Email(required=True)
    password = NewPassword(required=True)
    name = Line(2, 100, required=True)
    role = fields.String(load_default="user", validate=validate.OneOf(ROLES))


class UserChanges(Schema):
    """At least one field. ``current_password`` is required to change one's own address."""

    email = Email()
    name = Line(2, 100)
    role = fields.String(validate=validate.OneOf(ROLES))
    current_password = Password()

    @validates_schema
    def something(self, data: dict, **_: object) -> None:
        if not data.keys() - {"current_password"}:
            raise ValidationError("Send at least one field to change.")


class UserFilters(Schema):
    """What a list of users is sorted and filtered by."""

    sort = fields.String(
        validate=validate.OneOf(["name", "email", "created_at"]), load_default="created_at"
    )
    order = fields.String(validate=validate.OneOf(["asc", "desc"]), load_default="desc")
    search = Search(
        load_default=None, metadata={"description": "A substring of name or e-mail address."}
    )
    role = fields.String(validate=validate.OneOf(ROLES), load_default=None)


class UserQuery(UserFilters, PageQuery):
    pass


UserPage = page_of(User)
