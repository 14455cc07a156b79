"""Examples for the document: by the schema's name, and by the parameter's. Tests validate each."""
_WHEN = "2026-11-22T10:13:34.430123+00:00"

_USER = {"id": 7, "email": "ada@example.com", "name": "Ada Lovelace", "role": "user",
         "email_verified": True, "created_at": _WHEN, "updated_at": _WHEN, "last_login": _WHEN}
_USER_V2 = {"id": 7, "email": "ada@example.com", "role": "user",
            "profile": {"name": "Ada Lovelace"}, "email_verified": True, "created_at": _WHEN,
            "updated_at": _WHEN, "last_login_at": _WHEN}
_TOKENS = {"token": "eyJhbGciOiJIUzI1NiJ9.e30.c2ln", "refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.cw",
           "token_type": "Bearer", "expires_in": 900}
_CATEGORY = {"id": 3, "name": "Tableware", "product_count": 57, "created_at": _WHEN,
             "updated_at": _WHEN}
_PRODUCT = {"id": 7, "sku": "COF-000007", "name": "Nordic Oak Teapot",
            "description": "A teapot, made to be used every day.", "price": "119.23", "stock": 12,
            "category_id": 1, "category_name": "Coffee & Tea", "created_at": _WHEN,
            "updated_at": _WHEN}
_PAGINATION = {"page": 1, "limit": 20, "total": 1, "pages": 1, "next_cursor": None}
_SALE = {"id": 42, "user_id": 7, "status": "completed", "total": "238.46",
         "items": [{"product_id": 7, "name": "Nordic Oak Teapot", "quantity": 2,
                    "unit_price": "119.23", "amount": "238.46"}],
         "created_at": _WHEN, "refunded_at": None}
_SUM = {"orders": 1, "items": 2, "amount": "238.46"}

EXAMPLES = {
    "User": _USER,
    "UserV2": _USER_V2,
    "UserPage": {"data": [_USER], "pagination": _PAGINATION},
    "UserPageV2": {"data": [_USER_V2],
                   "links": {"self": "/api/v2/users?sort=created_at&order=desc", "next": None}},
    "NewUser": {"email": "ada@example.com", "password": "a long walk home", "name": "Ada Lovelace",
                "role": "user"},
    "NewUserV2": {"email": "ada@example.com", "password": "a long walk home",
                  "profile": {"name": "Ada Lovelace"}, "role": "user"},
    "UserChanges": {"name": "Ada King"},
    "UserChangesV2": {"profile": {"name": "Ada King"}},
    "Registration": {"email": "ada@example.com", "password": "a long walk home",
                     "name": "Ada Lovelace"},
    "Login": {"email": "user1@example.com", "password": "password123"},
    "Tokens": _TOKENS,
    "Session": {"user": _USER} | _TOKENS,
    "Refresh": {"refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.cw"},
    "OpenSessions": {"data": [{
        "id": 12, "created_at": _WHEN, "last_used_at": _WHEN, "expires_at": _WHEN,
        "address": "192.0.2.7", "user_agent": "curl/8.5", "current": True}]},
    "PasswordChange": {"current_password": "a long walk home", "new_password": "a longer walk"},
    "Forgotten": {"email": "ada@example.com"},
    "Reset": {"token": "Zm9yZ290dGVu", "password": "a longer walk"},
    "Verification": {"token": "dmVyaWZpZWQ"},
    "Accepted": {"status": "accepted"},
    "Category": _CATEGORY,
    "Categories": {"data": [_CATEGORY]},
    "CategoryIn": {"name": "Tableware"},
    "Product": _PRODUCT,
    "ProductPage": {"data": [_PRODUCT], "pagination": _PAGINATION},
    "NewProduct": {"sku": "COF-000007", "name": "Nordic Oak Teapot", "price": "119.23",
                   "stock": 12, "category_id": 1,
                   "description": "A teapot, made to be used every day."},
    "ProductChanges": {"price": "99.90", "stock": 40},
    "Transaction": _SALE,
    "TransactionPage": {"data": [_SALE], "pagination": _PAGINATION},
    "NewTransaction": {"items": [{"product_id": 7, "quantity": 2}]},
    "TransactionsReport": {"data": [{
        "transaction_id": 42, "created_at": _WHEN, "status": "completed", "user_id": 7,
        "product_id": 7, "product_name": "Nordic Oak Teapot", "quantity": 2,
        "unit_price": "119.23", "amount": "238.46"}]},
    "SalesReport": {"data": [{"key": "2026-11-22", "label": "2026-11-22"} | _SUM], "total": _SUM},
    "Health": {"status": "OK", "timestamp": _WHEN, "uptime": 86400.125},
    "Liveness": {"status": "ok"},
    "Readiness": {"status": "ok"},
    "Meaning": {"code": "out_of_stock", "status": 409, "title": "Out of stock",
                "meaning": "There isn't enough of the products named in 'details'. Nothing was "
                           "sold. Buy fewer."},
}

_TAG = {"schema": {"type": "string", "minLength": 1, "maxLength": 1024},
        "example": '"3f2a9c0b7d61e5a4c8b90f12"'}
PARAMETERS: dict[str, dict] = {
    "If-Match": _TAG | {"description": "Change it only if it still has this tag"},
    "If-None-Match": _TAG | {"description": "Answer 304 if it still has this tag"},
    "X-Request-ID": {
        "schema": {"type": "string", "maxLength": 8192},
        "description": "1 to 64 letters, digits, dots, hyphens and underscores: the answer has "
                       "them again, and the log",
        "example": "0f9c2b7e"},
    "Idempotency-Key": {
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
        "description": "1 to 255 visible ASCII characters: a retry with the same key gets the "
                       "first answer, for 24 hours",
        "example": "5f0c8e52-basket-17"},
    "{product}": {"description": "The product's id", "example": 7},
    "{transaction}": {"description": "The sale's id", "example": 42},
    "{category}": {"description": "The category's id", "example": 3},
    "{user}": {"description": "The user's id, or `me` for oneself", "example": "me"},
    "{session}": {"description": "The session's id", "example": 12},
    "{code}": {"description": "The `code` of a problem", "example": "out_of_stock",
             "schema": {"type": "string", "maxLength": 50, "pattern": "^[a-z_]+$"}},
    "min_price": {"description": "What costs less is left out", "example": "10.00"},
    "max_price": {"description": "What costs more is left out", "example": "119.23"},
    "search": {"example": "oak"},
    "start_date": {"example": "2026-01-01"},
    "end_date": {"example": "2026-02-01"},
    "from": {"example": "2026-01-01"},
    "to": {"example": "2026-02-01"},
    "sort": {"description": "By what the list is sorted"},
    "order": {"description": "Upwards or downwards"},
    "role": {"description": "Only users of this role"},
    "status": {"description": "Only sales of this status"},
    "group_by": {"description": "What each sum is of"},
}
