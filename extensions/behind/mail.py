"""Mails: queued with the write that causes them, sent behind the request's back.

A queued mail names an address and a purpose, nothing else. Only the sender looks whether an account
has that address, and only then makes the one-time token, so that a request for an unknown address
costs and says the same as for a known one, and no token lies in the queue.
"""
import hashlib
import logging
import pathlib
import secrets
import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from urllib.parse import unquote, urlsplit

from flask import Flask

import db

log = logging.getLogger("shopfront.mail")
queries = db.load("mail")

MINUTES = {"reset": 30, "verify": 24 * 60}
SUBJECTS = {"reset": "Reset your password", "verify": "Confirm your e-mail address"}
TEMPLATES = {
    "reset": """\
Hello {name},

somebody, most likely you, asked for a new password for your account.
To choose one, use this link or token within {minutes} minutes:

    {link}

If it wasn't you, do nothing: your password stays as it is.
""",
    "verify": """\
Hello {name},

please confirm that this is your e-mail address with this link or token:

    {link}

If you have no account with us, ignore this mail.
""",
}
SMTP_SECONDS = 10


class Mail:
    """The queue."""

    def __init__(self, app: Flask) -> None:
        self.app = app

    def enqueue(self, conn: db.Connection, purpose: str, email: str) -> None:
        """Queue a mail in the caller's transaction. Call ``wake`` after the commit."""
        queries.enqueue(conn, purpose=purpose, email=email)

    def wake(self) -> None:
        """Have what is queued sent soon, by this process's upkeep."""
        self.app.extensions["upkeep"].wake()

    def send_due(self) -> tuple[int, int]:
        """Send all that is due. Returns (sent, failed)."""
        sent = failed = 0
        database = self.app.extensions["db"]
        while mail := self._take(database):
            if mail["user_id"] is not None:
                token = secrets.token_urlsafe(32)
                with database.reading() as conn:
                    queries.issue(
                        conn, token_hash=token_hash(token), user_id=mail["user_id"],
                        purpose=mail["purpose"], email=mail["email"],
                        minutes=MINUTES[mail["purpose"]],
                    )
                try:
                    self._send(mail, token)
                    sent += 1
                # ValueError: an address that no mail can have must not hold up the others.
                except (OSError, smtplib.SMTPException, ValueError) as error:
                    log.warning("mail %s not sent, will be tried again: %s", mail["id"],
                                type(error).__name__)
                    failed += 1
                    continue
            with database.reading() as conn:
                queries.done(conn, id=mail["id"])
        return sent, failed

    def _take(self, database):
        with database.reading() as conn:
            return queries.take(conn)

    def _send(self, mail, token):
        config = self.app.config
        page = "reset-password" if mail["purpose"] == "reset" else "verify-email"
        link = f"{config['PUBLIC_URL'].rstrip('/')}/{page}?token={token}"
        message = EmailMessage()
        message["From"], message["To"] = config["MAIL_FROM"], mail["email"]
        message["Subject"] = SUBJECTS[mail["purpose"]]
        message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="shopfront")
        message.set_content(TEMPLATES[mail["purpose"]].format(
            name=mail["name"], minutes=MINUTES[mail["purpose"]],
            link=link if config["PUBLIC_URL"] else token,
        ))
        if config["APP_ENV"] == "production" and not config["SMTP_URL"]:
            raise OSError("SMTP_URL is not set")  # a token is not left lying on the disk
        if config["SMTP_URL"]:
            deliver(config["SMTP_URL"], message)
        else:
            folder = pathlib.Path(self.app.instance_path) / "outbox"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{mail['id']:06d}-{mail['purpose']}.eml"
            file.write_bytes(bytes(message))
            log.info("no SMTP_URL: the mail is in %s", file)


def deliver(url: str, message: EmailMessage) -> None:
    """Hand a message to an SMTP server. ``smtps`` is TLS from the start, ``smtp`` with STARTTLS
    wherever the server offers it, and always when there is a password to send."""
    parts = urlsplit(url)
    context = ssl.create_default_context()
    server: smtplib.SMTP
    host = parts.hostname or ""
    if parts.scheme == "smtps":
        server = smtplib.SMTP_SSL(host, parts.port or 465, timeout=SMTP_SECONDS, context=context)
    else:
        server = smtplib.SMTP(host, parts.port or 25, timeout=SMTP_SECONDS)
    with server:
        server.ehlo()
        if parts.scheme == "smtp" and (server.has_extn("starttls") or parts.username):
            server.starttls(context=context)
        if parts.username:
            server.login(unquote(parts.username), unquote(parts.password or ""))
        server.send_message(message)


def token_hash(token: str) -> bytes:
    """What is stored of a token. It has 256 random bits, so a plain hash can't be searched."""
    return hashlib.sha256(token.encode()).digest()


def init_app(app: Flask) -> None:
    app.extensions["mail"] = Mail(app)
