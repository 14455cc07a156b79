"""``flask users`` and ``flask mail``: what an operator does without the API."""
import click
from flask import Flask, current_app

import db
from blueprints.cli_db import Commands
from blueprints.v1.auth import new_hash
from blueprints.v1.users import locked
from extensions.behind.mail import send_due
from extensions.http.arguments import load
from extensions.http.logs import security
from schemas.users import NewUser

accounts = db.load("accounts")
auth = db.load("auth")
users = Commands("users", help="Accounts.", epilog="Example: flask users list")
mail = Commands("mail", help="The mail queue.", epilog="Example: flask mail send")


def init_app(app: Flask) -> None:
    app.cli.add_command(users)
    app.cli.add_command(mail)


def find(conn: db.Connection, email: str) -> int:
    user_id = accounts.find(conn, email=email.strip().lower())
    if user_id is None:
        raise click.ClickException(f"No account has the address {email}.")
    return user_id


def note(name: str, **facts: object) -> None:
    security.info(name, extra={"event": name, "address": "command line", **facts})


@users.command(epilog="Example: flask users create ada@example.com --admin")
@click.argument("email")
@click.option("--name", default="Administrator", show_default=True)
@click.option("--admin", is_flag=True, help="With the role of an administrator.")
@click.password_option(help="Asked for where it isn't given.")
def create(email: str, name: str, admin: bool, password: str) -> None:
    """Create a user whose address needs no confirmation."""
    role = "admin" if admin else "user"
    data = load(NewUser(), {"email": email, "name": name, "password": password, "role": role})
    password_hash = new_hash(data.pop("password"), data["email"])
    with db.connection() as conn:
        user_id = accounts.insert(conn, password_hash=password_hash, **data)
    note("user_created", user_id=user_id, role=role)
    click.echo(f"Created {role} {user_id}, {data['email']}.")


@users.command("list", epilog="Example: flask users list --role admin")
@click.option("--role", type=click.Choice(["user", "admin"]))
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1))
def list_(role: str | None, limit: int) -> None:
    """List users."""
    with db.reading() as conn:
        for row in accounts.list(conn, role=role, limit=limit):
            seen = f"{row['last_login']:%Y-%m-%d %H:%M}" if row["last_login"] else "never"
            click.echo(f"{row['id']:>8}  {row['role']:5}  {row['email']:40}  {seen:16}  "
                       f"{row['name']}")


@users.command(epilog="Example: flask users promote ada@example.com")
@click.argument("email")
def promote(email: str) -> None:
    """Make a user an administrator."""
    set_role(email, "admin")


@users.command(epilog="Example: flask users demote ada@example.com")
@click.argument("email")
def demote(email: str) -> None:
    """Make an administrator a user; not the last one."""
    set_role(email, "user")


@users.command("password", epilog="Example: flask users password ada@example.com")
@click.argument("email")
@click.password_option(help="Asked for where it isn't given.")
def password_(email: str, password: str) -> None:
    """Set a user's password; every session ends."""
    password = load(NewUser(only=["password"]), {"password": password})["password"]
    password_hash = new_hash(password, email.strip())
    with db.connection() as conn:
        user_id = find(conn, email)
        accounts.set_password(conn, id=user_id, password_hash=password_hash)
        auth.close_all(conn, user_id=user_id, keep=None)
        auth.void_mail_tokens(conn, user_id=user_id)
    note("password_changed", user_id=user_id)
    click.echo("The password is set; every session has ended.")


@users.command(epilog="Example: flask users sessions ada@example.com")
@click.argument("email")
def sessions(email: str) -> None:
    """List a user's open sessions."""
    with db.reading() as conn:
        for row in accounts.sessions(conn, id=find(conn, email)):
            click.echo(f"{row['id']:>8}  since {row['created_at']:%Y-%m-%d %H:%M}  used "
                       f"{row['last_used_at']:%Y-%m-%d %H:%M}  {row['address']}  "
                       f"{row['user_agent'] or ''}")


@users.command(epilog="Example: flask users revoke ada@example.com --session 7")
@click.argument("email")
@click.option("--session", type=click.IntRange(1), help="Only this one.")
def revoke(email: str, session: int | None) -> None:
    """End a user's sessions."""
    with db.connection() as conn:
        user_id = find(conn, email)
        if session:
            count = auth.close(conn, user_id=user_id, session_id=session)
        else:
            count = auth.close_all(conn, user_id=user_id, keep=None)
    note("sessions_revoked", user_id=user_id, count=count)
    click.echo(f"{count} ended.")


@mail.command(epilog="Example: flask mail send")
def send() -> None:
    """Send what is due in the queue."""
    sent, failed = send_due(current_app)
    click.echo(f"{sent} sent, {failed} failed.")
    if failed:
        raise SystemExit(1)


def set_role(email: str, role: str) -> None:
    with db.connection() as conn:
        user_id = find(conn, email)
        locked(conn, user_id, demotes=role == "user")
        accounts.set_role(conn, id=user_id, role=role)
    note("role_changed", user_id=user_id, role=role)
    click.echo(f"{email} is {role} now.")
