"""Errors, as every layer answers them (RFC 9457), and what their codes mean."""
from marshmallow import Schema, fields

# code -> (status, title, what it means and what to do)
PROBLEMS = {
    "bad_request": (400, "Bad request",
        "The request can't be understood as HTTP for this API. Mend it before sending it again."),
    "malformed_json": (400, "Malformed JSON",
        "The body is not valid JSON: check the syntax, the UTF-8, repeated names and NaN."),
    "authentication_required": (401, "Authentication required",
        "Send an access token from POST /auth/login as 'Authorization: Bearer <token>'."),
    "invalid_credentials": (401, "Invalid credentials",
        "The e-mail address, the password or the one-time token is wrong. Which, is not told."),
    "token_expired": (401, "Token expired",
        "The token's time is over. Get a new pair from POST /auth/refresh, or log in again."),
    "token_revoked": (401, "Token revoked",
        "The session of this token has ended. Log in again."),
    "forbidden": (403, "Forbidden",
        "You are known, but this is for others: most likely for administrators."),
    "not_found": (404, "Not found",
        "There is nothing here, or nothing that you may know of. Check the path and the id."),
    "method_not_allowed": (405, "Method not allowed",
        "The path exists, the method doesn't. The Allow header lists those that do."),
    "not_acceptable": (406, "Not acceptable",
        "The Accept header names no format that this address can give."),
    "conflict": (409, "Conflict",
        "The request contradicts what is stored. Read the resource again and decide anew."),
    "email_taken": (409, "E-mail address taken",
        "Another account has this address. Log in instead, or use another address."),
    "sku_taken": (409, "SKU taken", "Another product has this SKU. Use another one, or none."),
    "name_taken": (409, "Name taken", "Another category has this name. Use another one."),
    "category_in_use": (409, "Category in use",
        "Products belong to this category. Move or delete them first."),
    "out_of_stock": (409, "Out of stock",
        "There isn't enough of the products named in 'details'. Nothing was sold. Buy fewer."),
    "request_in_progress": (409, "Request in progress",
        "A request with this Idempotency-Key is still running. Wait a moment and send it again."),
    "gone": (410, "Gone",
        "This part of version 1 has ended. Use the successor that the Link header names."),
    "precondition_failed": (412, "Precondition failed",
        "The resource has changed since you read its ETag. Read it again, then repeat the change."),
    "request_timeout": (408, "Request timeout",
        "The request did not arrive whole in time. Send it again, in one go."),
    "payload_too_large": (413, "Payload too large", "The body is over the limit of 10 MB."),
    "uri_too_long": (414, "URI too long",
        "The request line is over the limit of 4094 bytes. Ask for less in one query."),
    "unsupported_media_type": (415, "Unsupported media type",
        "Send application/json, or a form where the body is flat."),
    "validation_failed": (422, "Validation failed",
        "Some fields are not valid; 'details' says which and why. Mend them and send it again."),
    "idempotency_key_reused": (422, "Idempotency key reused",
        "This Idempotency-Key belongs to another request. Use a new key for a new request."),
    "precondition_required": (428, "Precondition required",
        "Send If-Match with the ETag of the resource that you mean to change."),
    "headers_too_large": (431, "Request header fields too large",
        "There are over 100 headers, one is over 8190 bytes, or all are over 64 KB. Send fewer."),
    "rate_limited": (429, "Too many requests",
        "The limit is used up. Wait as many seconds as Retry-After says."),
    "internal_error": (500, "Internal error",
        "A fault of ours. It has been logged; quote request_id when you report it."),
    "unavailable": (503, "Unavailable",
        "A part of the service does not answer just now. Try again after Retry-After seconds."),
    "timeout": (504, "Timeout", "The answer took too long and was given up. Ask for less."),
}


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
