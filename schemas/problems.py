"""Errors, as every layer answers them (RFC 9457), and what their codes mean."""
from marshmallow import Schema, fields

from extensions.errors import PROBLEMS


class Detail(Schema):
    field = fields.String(required=True, metadata={"maxLength": 500})
    where = fields.String(required=True, data_key="in", metadata={
        "enum": ["body", "query", "path", "header"]})
    message = fields.String(required=True, metadata={"maxLength": 500})


class Problem(Schema):
    type = fields.String(required=True, metadata={
        "maxLength": 100, "format": "uri-reference", "description": "Where GET explains it."})
    title = fields.String(required=True, metadata={"maxLength": 100})
    status = fields.Integer(required=True, metadata={"minimum": 400, "maximum": 599})
    detail = fields.String(required=True, metadata={"maxLength": 1000})
    instance = fields.String(required=True, metadata={"maxLength": 8192})
    code = fields.String(required=True, metadata={"enum": list(PROBLEMS)})
    request_id = fields.String(required=True, metadata={"maxLength": 64})
    error = fields.String(required=True, metadata={"maxLength": 100})
    details = fields.List(fields.Nested(Detail), metadata={"maxItems": 100})


class Meaning(Schema):
    code = fields.String(metadata={"enum": list(PROBLEMS)})
    status = fields.Integer(metadata={"minimum": 400, "maximum": 599})
    title = fields.String(metadata={"maxLength": 100})
    meaning = fields.String(metadata={"maxLength": 1000})
