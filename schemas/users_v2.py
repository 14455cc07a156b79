"""Users as version 2 shows them: the name is part of a profile, ``last_login_at`` says its unit."""
from marshmallow import Schema, ValidationError, fields, validate, validates_schema

from schemas.fields import Email, Id, Instant, Line, NewPassword, Password, Search
from schemas.pages import CursorQuery
from schemas.users import ROLES


class Profile(Schema):
    name = Line(2, 100, required=True)


class UserV2(Schema):
    id = Id(dump_only=True)
    email = Email(dump_only=True, metadata={"maxLength": 254})
    role = fields.String(dump_only=True, validate=validate.OneOf(ROLES))
    profile = fields.Nested(Profile, dump_only=True)
    email_verified = fields.Boolean(dump_only=True)
    created_at = Instant()
    updated_at = Instant()
    last_login_at = Instant(allow_none=True)


class NewUserV2(Schema):
    json_only = True

    email = Email(required=True)
    password = NewPassword(required=True)
    profile = fields.Nested(Profile, required=True)
    role = fields.String(load_default="user", validate=validate.OneOf(ROLES))


class UserChangesV2(Schema):
    """At least one field. ``current_password`` goes with a change of one's own address."""

    json_only = True

    email = Email()
    profile = fields.Nested(Profile)
    role = fields.String(validate=validate.OneOf(ROLES))
    current_password = Password()

    @validates_schema
    def something(self, data: dict, **_: object) -> None:
        if not data.keys() - {"current_password"}:
            raise ValidationError("Send at least one field to change.")


class UserQueryV2(CursorQuery):
    sort = fields.String(
        validate=validate.OneOf(["name", "email", "created_at"]), load_default="created_at"
    )
    order = fields.String(validate=validate.OneOf(["asc", "desc"]), load_default="desc")
    search = Search(
        load_default=None, metadata={"description": "A substring of name or e-mail address."}
    )
    role = fields.String(validate=validate.OneOf(ROLES), load_default=None)


class Links(Schema):
    self = fields.String(metadata={"maxLength": 9000})
    next = fields.String(allow_none=True, metadata={"maxLength": 9000})


class UserPageV2(Schema):
    data = fields.List(fields.Nested(UserV2), metadata={"maxItems": 100})
    links = fields.Nested(Links)
