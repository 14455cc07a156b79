"""Authentication: registration, login, tokens, sessions and passwords."""
from marshmallow import Schema, fields, validate

from schemas.fields import Email, Flag, Id, Instant, Line, NewPassword, Password
from schemas.users import User

TOKEN = validate.Length(1, 2048)


class Registration(Schema):
    email = Email(required=True)
    password = NewPassword(required=True)
    name = Line(2, 100, required=True)


class Login(Schema):
    email = Email(required=True)
    password = Password(required=True)


class Tokens(Schema):
    token = fields.String(metadata={"maxLength": 2048, "description": "The access token."})
    refresh_token = fields.String(metadata={"maxLength": 2048})
    token_type = fields.String(validate=validate.OneOf(["Bearer"]))
    expires_in = fields.Integer(metadata={
        "minimum": 60, "maximum": 86400, "description": "Seconds that the access token lives.",
    })


class Session(Tokens):
    user = fields.Nested(User)


class Refresh(Schema):
    refresh_token = fields.String(required=True, validate=TOKEN)


class LogoutQuery(Schema):
    everywhere = Flag(load_default=False, metadata={"description": "End every session."})


class OpenSession(Schema):
    id = Id(dump_only=True)
    created_at = Instant()
    last_used_at = Instant()
    expires_at = Instant()
    address = fields.String(metadata={"maxLength": 100})
    user_agent = fields.String(allow_none=True, metadata={"maxLength": 200})
    current = fields.Boolean()


class OpenSessions(Schema):
    data = fields.List(fields.Nested(OpenSession), metadata={"maxItems": 1000})


class PasswordChange(Schema):
    current_password = Password(required=True)
    new_password = NewPassword(required=True)


class Forgotten(Schema):
    email = Email(required=True)


class Reset(Schema):
    token = fields.String(required=True, validate=TOKEN)
    password = NewPassword(required=True)


class Verification(Schema):
    token = fields.String(required=True, validate=TOKEN)


class Accepted(Schema):
    status = fields.String(validate=validate.OneOf(["accepted"]))
