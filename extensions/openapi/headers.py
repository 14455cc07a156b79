"""Headers of answers, as the documents describe them."""

LIMITS = ["RateLimit-Policy", "RateLimit", "x-ratelimit-limit", "x-ratelimit-remaining",
          "x-ratelimit-reset"]
SUNSET = ["Deprecation", "Sunset", "Link"]
REFUSAL = {401: ["WWW-Authenticate"], 415: ["Accept"], 429: ["Retry-After"], 503: ["Retry-After"]}


def _text(description, example, required=True, **schema):
    return {"description": description, "example": example, "required": required,
            "schema": {"type": "string", "maxLength": 8192} | schema}


def _number(description, example, required=True):
    return {"description": description, "example": example, "required": required,
            "schema": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}}


# ``required`` says that a header is there wherever it is documented.
HEADERS = {
    "X-Request-ID": _text("The request's id, for a report of a fault", "0f9c2b7e", maxLength=64,
                          pattern="^[A-Za-z0-9._-]+$"),
    "Cache-Control": _text("Who may keep the answer", "private, no-cache"),
    "RateLimit-Policy": _text("The limits, in IETF draft form", '"api";q=100;w=900'),
    "RateLimit": _text("What is left of them", '"api";r=99;t=900'),
    # In lower case: OWASP's ruleset for Spectral wants one family of these headers and no more.
    "x-ratelimit-limit": _number("Requests allowed in the tightest window", 100),
    "x-ratelimit-remaining": _number("Requests left in it", 99),
    "x-ratelimit-reset": _number("When it begins anew, in seconds since 1970", 1795342470),
    "Access-Control-Allow-Origin": _text("The caller's origin, if it is one of ALLOWED_ORIGINS",
                                         "https://shop.example.com", required=False),
    "Retry-After": _number("Seconds to wait", 5),
    "WWW-Authenticate": _text("How to authenticate (RFC 6750)", "Bearer"),
    "Accept": _text("What to send instead", "application/json"),
    "ETag": _text("The strong tag of this representation", '"3f2a9c0b7d61e5a4c8b90f12"',
                  pattern='^"[0-9a-f]+"$'),
    "Location": _text("The new resource", "/api/v1/products/7", format="uri-reference"),
    "X-Cache": _text("Whether the server's cache had it", "hit", enum=["hit", "miss"]),
    "Link": _text("Other pages of this list (RFC 8288), or the successor of a deprecated route",
                  '</api/v1/products?page=2>; rel="next"'),
    "Idempotent-Replayed": _text("Sent with an answer given before", "true", required=False,
                                 enum=["true"]),
    "Content-Disposition": _text("The file's name", 'attachment; filename="transactions.csv"'),
    "Report-Rows": _number("How many records a whole download has", 2),
    "Report-Amount": _text("The sum of their amounts", "119.23", pattern=r"^-?[0-9]+\.[0-9]{2}$"),
    "Deprecation": _text("Since when this is deprecated (RFC 9745)", "@1764547200"),
    "Sunset": _text("When this ends (RFC 8594)", "Fri, 31 Dec 2027 00:00:00 GMT"),
    "Retry-Twin": _number("Seconds to wait for the request in progress", 1, required=False),
    "Unlimited": _text("Never sent: this address is not limited", "", required=False, maxLength=0),
}
