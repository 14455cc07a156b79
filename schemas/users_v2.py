"""Users as version 2 shows them: ``profile`` has the name, ``last_login`` is ``last_login_at``."""
from marshmallow import Schema, fields

from schemas.fields import Instant, Line
from schemas.pages import CursorQuery
from schemas.users import NewUser, User, UserChanges, UserFilters


class Profile(Schema):
    name = Line(2, 100, required=True)


class UserV2(User):
    class Meta:
        exclude = ("name", "last_login")

    profile = fields.Nested(Profile, dump_only=True)
    last_login_at = Instant(allow_none=True)


class NewUserV2(NewUser):
    class Meta:
        exclude = ("name",)

    json_only = True

    profile = fields.Nested(Profile, required=True)


class UserChangesV2(UserChanges):
    class Meta:
        exclude = ("name",)

    json_only = True

    profile = fields.Nested(Profile)


class UserQueryV2(UserFilters, CursorQuery):
    pass


class Links(Schema):
    self = fields.String(metadata={"maxLength": 9000})
    next = fields.String(allow_none=True, metadata={"maxLength": 9000})


class UserPageV2(Schema):
    data = fields.List(fields.Nested(UserV2), metadata={"maxItems": 100})
    links = fields.Nested(Links)
