"""Settings: read once from the environment, validated, with one error for all that is wrong."""
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from limits import parse_many


class SettingsError(Exception):
    """One message that names everything that is wrong."""


def text(value: str) -> str:
    return value


def flag(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("", "0", "false", "no", "off"):
        return False
    raise ValueError("must be 1 or 0")


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value):
        if not re.fullmatch(r"\d{1,9}", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)
    return parse


def one_of(*choices: str) -> Callable[[str], str]:
    def parse(value):
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    return parse


def limit(value: str) -> str:
    try:
        item, = parse_many(value)
        if item.amount > 0 and item.get_expiry() <= 366 * 86400:  # Redis counts in milliseconds
            return value
    except ValueError:
        pass
    raise ValueError("must be a limit such as '100 per 15 minutes'")


def origins(value: str) -> list[str]:
    found = [part.strip().rstrip("/") for part in value.split(",") if part.strip()]
    for origin in found:
        parts = urlsplit(origin)
        if origin != "*" and not (parts.scheme in ("http", "https") and parts.netloc
                                  and not parts.path):
            raise ValueError(f"'{origin}' is not an origin such as https://shop.example.com")
    return found


def mail_server(value: str) -> str:
    try:
        parts = urlsplit(value)
        if not value or (parts.scheme in ("smtp", "smtps") and parts.hostname and parts.port != 0):
            return value
    except ValueError:  # not shown: a malformed port may be part of the password
        pass
    raise ValueError("must look like smtp://user:password@host:587 or smtps://host:465")


def prefix(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", value):
        raise ValueError("must be 1 to 64 of letters, digits, '_', '.', ':' and '-'")
    return value


def instant(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def workers(value: str) -> int:
    return whole(1, 256)(value) if value else max(2, os.cpu_count() or 1)


class Setting(NamedTuple):
    name: str
    default: str
    parse: Callable[[str], Any]
    help: str


SETTINGS = (
    Setting("APP_ENV", "development", one_of("development", "production"),
            "`production` embeds nothing, seeds nothing and has no default for a secret"),
    Setting("DATABASE_URL", "", text,
            "PostgreSQL, as a libpq URL; several hosts may be named. Empty: the embedded one"),
    Setting("DATABASE_READ_URL", "", text, "a replica for reports. Empty: `DATABASE_URL`"),
    Setting("DATABASE_POOLER", "none", one_of("none", "transaction"),
            "`transaction` for PgBouncer and its like: nothing of a session is relied on"),
    Setting("REDIS_URL", "", text, "Redis or Valkey. Empty: the embedded one"),
    Setting("REDIS_PREFIX", "shopfront", prefix,
            "the hash tag of every key, so that two shops can share one Redis"),
    Setting("JWT_SECRET_KEY", "", text,
            "signs tokens and cursors, 32 bytes or more. Empty in development: made once and kept "
            "under `instance/`"),
    Setting("JWT_SECRET_KEY_PREVIOUS", "", text,
            "the key before: what it has signed holds, so that keys change with nobody logged out"),
    Setting("ACCESS_TOKEN_MINUTES", "15", whole(1, 1440), "life of an access token"),
    Setting("REFRESH_TOKEN_DAYS", "7", whole(1, 365), "life of an unused refresh token"),
    Setting("SESSION_MAX_DAYS", "90", whole(1, 3650), "life of a session, however much it is used"),
    Setting("ALLOWED_ORIGINS", "", origins,
            "browsers' origins that may call, comma-separated, or `*`"),
    Setting("RATE_LIMIT", "100 per 15 minutes", limit, "all of `/api`, a client address"),
    Setting("LOGIN_RATE_LIMIT", "20 per 15 minutes", limit, "login, refresh and password routes"),
    Setting("REGISTER_RATE_LIMIT", "20 per hour", limit, "registrations"),
    Setting("TRUSTED_PROXIES", "0", whole(0, 9),
            "how many proxies in front to believe about `X-Forwarded-*`"),
    Setting("CACHE_TYPE", "RedisCache", one_of("RedisCache", "NullCache"),
            "`NullCache` turns the cache off"),
    Setting("CACHE_TTL", "300", whole(1, 86400), "seconds that a cached answer lives at the most"),
    Setting("REQUIRE_IF_MATCH", "0", flag, "refuse a `PATCH` or `DELETE` without `If-Match` (428)"),
    Setting("REQUIRE_VERIFIED_EMAIL", "0", flag, "refuse logins before the address is verified"),
    Setting("REPORT_CONCURRENCY", "2", whole(1, 64), "reports at once, a process"),
    Setting("SMTP_URL", "", mail_server,
            "`smtp://user:password@host:587`. Empty: mails are written to `instance/outbox/`"),
    Setting("MAIL_FROM", "Shopfront <shop@localhost>", text, "the sender of mails"),
    Setting("PUBLIC_URL", "", text, "the shop's web address, for the links in mails"),
    Setting("V1_USERS_SUNSET", "2027-12-31", instant, "when v1's `/users` ends"),
    Setting("V1_USERS_GONE", "0", flag, "answer v1's `/users` with 410 from that day on"),
    Setting("METRICS_TOKEN", "", text, "the bearer token for `/metrics`. Empty: no metrics"),
    Setting("LOG_LEVEL", "INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"), "least level logged"),
    Setting("LOG_FORMAT", "", one_of("", "json", "text"),
            "`json`, or `text` for people. Unset: text in development on a terminal, else JSON"),
    Setting("LOG_DIR", "", text, "also log to rotated files in this folder"),
    Setting("WEB_CONCURRENCY", "", workers, "worker processes. Unset: one a core, at least 2"),
    Setting("WEB_THREADS", "8", whole(1, 256), "threads a worker"),
    Setting("POOL_MAX_SIZE", "8", whole(1, 256), "database connections a worker"),
    Setting("STATEMENT_TIMEOUT_MS", "10000", whole(100, 600000), "time-out of one SQL statement"),
    Setting("DRAIN_SECONDS", "0", whole(0, 600),
            "after TERM: how long `/health/ready` says 503 before the socket closes"),
)
# Each may be read from a file instead, whose path is in <NAME>_FILE.
SECRETS = ("DATABASE_URL", "DATABASE_READ_URL", "REDIS_URL", "JWT_SECRET_KEY",
           "JWT_SECRET_KEY_PREVIOUS", "SMTP_URL", "METRICS_TOKEN")


def read(environ: Mapping[str, str] | None = None, **overrides: Any) -> dict[str, Any]:
    """Every setting, parsed. ``overrides`` (text or ready values) win.

    Raises SettingsError with one message that names all that is missing, malformed or weak.
    """
    environ = dict(os.environ if environ is None else environ)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    environ = environ | dict(_from_files(environ, wrong))
    for setting in SETTINGS:
        raw = overrides.get(setting.name, environ.get(setting.name, setting.default))
        try:
            values[setting.name] = setting.parse(raw) if isinstance(raw, str) else raw
        except ValueError as why:
            values[setting.name] = setting.parse(setting.default)
            wrong.append(f"{setting.name} {why}")
    if values["APP_ENV"] == "production":
        for name in ("DATABASE_URL", "REDIS_URL", "JWT_SECRET_KEY"):
            if not values[name]:
                wrong.append(f"{name} is not set")
    for name in ("JWT_SECRET_KEY", "JWT_SECRET_KEY_PREVIOUS"):
        if values[name] and len(values[name].encode()) < 32:
            wrong.append(f"{name} has fewer than 32 bytes")
    if wrong:
        raise SettingsError("The settings won't do: " + "; ".join(wrong) + ".")
    return values | {k: v for k, v in overrides.items() if k not in values}


def _from_files(environ, wrong):
    """(name, value) of every secret kept in a file, without trailing newlines."""
    for name in SECRETS:
        if path := environ.get(f"{name}_FILE"):
            if environ.get(name):
                wrong.append(f"{name} and {name}_FILE are both set")
            try:
                with open(path, encoding="utf-8") as file:
                    yield name, file.read().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "it is not UTF-8"
                wrong.append(f"{name}_FILE can't be read: {why}")
