"""What every request and response has: an id, security headers, CORS."""
import os
import re

from flask import g, request
from flask_cors import CORS
from werkzeug.middleware.proxy_fix import ProxyFix

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# OWASP Secure Headers Project, for an API: nothing it sends is to be run, framed or guessed at.
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
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


def add_header(name, value):
    """Put a header onto whatever response this request will get."""
    request.environ.setdefault("shopfront.headers", {})[name] = value


def _finishing(wsgi_app, security):
    """Add headers as the response starts: a list is joined, where Headers.set would search."""
    def app(environ, start_response):
        def start(status, headers, exc_info=None):
            sent = {name for name, _ in headers}
            headers += [item for item in security if item[0] not in sent]
            headers += environ.get("shopfront.headers", {}).items()
            return start_response(status, headers, exc_info)
        return wsgi_app(environ, start)
    return app


def init_app(app):
    security = list(SECURITY.items())
    if app.config["APP_ENV"] == "production":
        security.append(("Strict-Transport-Security", "max-age=31536000; includeSubDomains"))
    app.wsgi_app = _finishing(app.wsgi_app, security)

    @app.before_request
    def identify():
        sent = request.headers.get("X-Request-ID", "")
        g.request_id = sent if _SANE_ID.fullmatch(sent) else os.urandom(16).hex()
        add_header("X-Request-ID", g.request_id)

    if origins := app.config["ALLOWED_ORIGINS"]:
        CORS(
            app, origins=origins, supports_credentials="*" not in origins, max_age=600,
            always_send=False, vary_header=False,
            expose_headers=EXPOSED, methods=["GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "If-Match",
                           "If-None-Match", "X-Request-ID"],
        )

        @app.after_request
        def vary(response):
            response.vary.add("Origin")  # also where none was sent: a cache may keep that answer
            return response

    if proxies := app.config["TRUSTED_PROXIES"]:
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=proxies, x_proto=proxies, x_host=proxies)
