"""The answers of the health checks."""
from marshmallow import Schema, fields, validate

from schemas.fields import Instant


class Health(Schema):
    status = fields.String(validate=validate.OneOf(["OK"]))
    timestamp = Instant()
    uptime = fields.Float(metadata={
        "minimum": 0, "maximum": 2**53 - 1, "format": "double",
        "description": "Seconds since the process started.",
    })


class Liveness(Schema):
    status = fields.String(validate=validate.OneOf(["ok"]))


class Readiness(Schema):
    """``redis`` is present only while Redis is away; the service works without it."""

    status = fields.String(required=True, validate=validate.OneOf(["ok", "degraded"]))
    redis = fields.String(validate=validate.OneOf(["away"]))
