"""Mails: queued in the transaction that causes them, sent in the background.

A queued mail holds an address and a purpose, nothing else. Only the sender looks up the account and
makes the one-time token, so that a request for an unknown address costs the same and gets the same
answer as for a known one, and no token is stored in the queue.
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

from flask import Flask, current_app

import db

log = logging.getLogger("shopfront.mail")
queries = db.load("mail")

SMTP_SECONDS = 10
MINUTES = {"reset": 30, "verify": 24 * 60}
PAGES = {"reset": "reset-password", "verify": "verify-email"}
# The first line is the subject.
TEMPLATES = {name: pathlib.Path(__file__).with_name(f"mail_{name}.txt").read_text()
             for name in MINUTES}


def enqueue(conn: db.Connection, purpose: str, email: str) -> None:
    """Queue a mail in the caller's transaction; this process's upkeep sends it soon after that."""
    queries.enqueue(conn, purpose=purpose, email=email)
    wake = current_app.extensions["upkeep"].wake
    conn.on_complete.append(lambda known: wake())


def send_due(app: Flask) -> tuple[int, int]:
    """Send all that is due. Returns (sent, failed)."""
    sent = failed = 0
    database = app.extensions["db"]
    while True:
        with database.reading() as conn:
            mail = queries.take(conn)
        if mail is None:
            return sent, failed
        if mail["user_id"] is not None:
            token, purpose = secrets.token_urlsafe(32), mail["purpose"]
            with database.reading() as conn:
                queries.issue(conn, token_hash=token_hash(token), user_id=mail["user_id"],
                              purpose=purpose, email=mail["email"], minutes=MINUTES[purpose])
            try:
                send(app, mail, token)
                sent += 1
            # ValueError: an address that is invalid in a mail must not hold up the others.
            except (OSError, smtplib.SMTPException, ValueError) as error:
                log.warning("mail %s not sent, will be tried again: %s", mail["id"],
                            type(error).__name__)
                failed += 1
                continue
        with database.reading() as conn:
            queries.done(conn, id=mail["id"])


def send(app: Flask, mail: dict, token: str) -> None:
    """Send a mail of the queue, ``{id, purpose, email, name}``, now: by SMTP, or to the outbox."""
    config, purpose = app.config, mail["purpose"]
    link = f"{config['PUBLIC_URL'].rstrip('/')}/{PAGES[purpose]}?token={token}"
    subject, _, text = TEMPLATES[purpose].partition("\n\n")
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = config["MAIL_FROM"], mail["email"], subject
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="shopfront")
    message.set_content(text.format(name=mail["name"], minutes=MINUTES[purpose],
                                    link=link if config["PUBLIC_URL"] else token))
    if config["SMTP_URL"]:
        deliver(config["SMTP_URL"], message)
    elif config["APP_ENV"] == "production":
        raise OSError("SMTP_URL is not set")  # never write a token to disk in production
    else:
        folder = pathlib.Path(app.instance_path) / "outbox"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{mail['id']:06d}-{purpose}.eml"
        file.write_bytes(bytes(message))
        log.info("no SMTP_URL: the mail is in %s", file)


def deliver(url: str, message: EmailMessage) -> None:
    """Hand a message to an SMTP server. ``smtps`` uses TLS from the start; ``smtp`` uses STARTTLS
    if the server offers it, and requires it if there is a login to send."""
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
    """The hash stored for a token: 256 random bits can't be brute-forced from a plain hash."""
    return hashlib.sha256(token.encode()).digest()
