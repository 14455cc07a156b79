"""What every response has: security headers and CORS."""
from flask import Flask
from flask_cors.core import get_cors_headers, get_cors_options
from werkzeug.datastructures import EnvironHeaders

from extensions.http.visit import Pairs

# OWASP Secure Headers Project, for an API: no response is to be executed, framed or sniffed.
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # Of the directives that follow it, default-src covers only object-src.
    "Content-Security-Policy": "default-src 'none'; object-src 'none'; base-uri 'none'; "
                               "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Permitted-Cross-Domain-Policies": "none",
    "X-DNS-Prefetch-Control": "off",
}
EXPOSED = [
    "Content-Disposition", "ETag", "Idempotent-Replayed", "Link", "Location", "RateLimit",
    "RateLimit-Policy", "Report-Amount", "Report-Rows", "Retry-After", "X-Cache",
    "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "X-Request-ID",
    "Deprecation", "Sunset",
]


def security(config: dict) -> Pairs:
    """The security headers, as a list of pairs."""
    pairs = list(SECURITY.items())
    if config["APP_ENV"] == "production":
        pairs.append(("Strict-Transport-Security", "max-age=31536000; includeSubDomains"))
    return pairs


class Cors:
    """flask-cors's headers, for answers of every layer."""

    def __init__(self, app: Flask) -> None:
        origins = app.config["ALLOWED_ORIGINS"]
        self._options = get_cors_options(app, {
            "origins": origins, "supports_credentials": "*" not in origins, "max_age": "600",
            "always_send": False, "vary_header": False, "expose_headers": EXPOSED,
            "methods": ["GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"],
            "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "If-Match",
                              "If-None-Match", "X-Request-ID", "traceparent"],
        })

    def add(self, environ: dict, headers: Pairs) -> None:
        """Add the CORS headers that the request's Origin calls for."""
        # Vary is added even if no Origin was sent: a cache may store that answer.
        for at, (name, value) in enumerate(headers):
            if name == "Vary":
                headers[at] = name, f"{value}, Origin"
                break
        else:
            headers.append(("Vary", "Origin"))
        if "HTTP_ORIGIN" in environ:
            headers += get_cors_headers(  # type: ignore[arg-type] # all text, as are the options
                self._options, EnvironHeaders(environ), environ["REQUEST_METHOD"]
            ).items(multi=True)
