"""Field types that every schema uses. Each refuses what the database would."""
import re
import unicodedata
from decimal import Decimal
from typing import Any

from marshmallow import ValidationError, fields, validate

MAX_ID = 2**63 - 1
MAX_INT = 2**31 - 1
MAX_PRICE = Decimal("9999999999.99")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Whole(fields.Integer):
    """An integer within bounds: a number in JSON, digits in a query string."""

    def __init__(self, low: int, high: int, **kwargs: Any) -> None:
        super().__init__(strict=True, validate=validate.Range(low, high), **kwargs)

    def _validated(self, value):
        if isinstance(value, str):
            if not re.fullmatch(r"-?[0-9]{1,19}", value):
                raise self.make_error("invalid", input=value)
            value = int(value)
        # 2.0 is a whole number, too (JSON Schema 2020-12, 4.2.3).
        if isinstance(value, Decimal) and -2**63 <= value < 2**63 and value == int(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.make_error("invalid", input=value)
        return value


class Number(Whole):
    """A whole number in a JSON body: text is refused."""

    def _validated(self, value):
        if isinstance(value, str):
            raise self.make_error("invalid", input=value)
        return super()._validated(value)


def Id(**kwargs: Any) -> Number:
    return Number(1, MAX_ID, **kwargs)


class Flag(fields.Boolean):
    """``true`` or ``false``, and no other spelling."""

    truthy, falsy = {"true", True}, {"false", False}

    def _deserialize(self, value, attr, data, **kwargs):
        if value in (0, 1) and not isinstance(value, bool):  # 1 == True, 0 == False
            raise self.make_error("invalid", input=value)
        return super()._deserialize(value, attr, data, **kwargs)


class Money(fields.Field):
    """An amount with at most two decimals: a JSON number, or a string like "119.23"."""

    default_error_messages = {
        "invalid": "Not an amount of money with at most two decimal places.",
        "range": "Must be between 0 and 9999999999.99.",
    }

    def _deserialize(self, value, attr, data, **kwargs):
        if isinstance(value, str):
            if not re.fullmatch(r"-?[0-9]{1,20}(\.[0-9]{1,2})?", value):
                raise self.make_error("invalid")
            value = Decimal(value)
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise self.make_error("invalid")
        if not 0 <= value <= MAX_PRICE:
            raise self.make_error("range")
        value = Decimal(value)
        if value != value.quantize(Decimal("0.01")):
            raise self.make_error("invalid")
        return value.quantize(Decimal("0.01"))


class Line(fields.String):
    """Text on one line, without white space around it."""

    forbidden = CONTROL

    def __init__(self, low: int, high: int, **kwargs: Any) -> None:
        super().__init__(validate=validate.Length(low, high), **kwargs)

    def _deserialize(self, value, attr, data, **kwargs):
        text = super()._deserialize(value, attr, data, **kwargs).strip()
        if self.forbidden.search(text):
            raise ValidationError("Must not contain control characters.")
        return text


class Text(Line):
    """Text that may have several lines."""

    forbidden = CONTROL_BUT_LINES


class Search(fields.String):
    """A search term, taken exactly as sent: white space counts."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=validate.Length(1, 100), **kwargs)

    def _deserialize(self, value, attr, data, **kwargs):
        text = super()._deserialize(value, attr, data, **kwargs)
        if CONTROL.search(text):
            raise ValidationError("Must not contain control characters.")
        return text


class Email(fields.Email):
    """An e-mail address, folded to lower case: here and nowhere else."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=validate.Length(3, 254), **kwargs)

    def _deserialize(self, value, attr, data, **kwargs):
        address = super()._deserialize(
            value.strip().lower() if isinstance(value, str) else value, attr, data, **kwargs
        )
        if CONTROL.search(address):  # RFC 5322 allows them in quotes; no mail goes there
            raise self.make_error("invalid")
        return address


def Password(**kwargs: Any) -> fields.String:
    """A password sent to be checked: any text that could be a password."""
    return fields.String(validate=validate.Length(1, 1024), load_only=True, **kwargs)


class NewPassword(fields.String):
    """A password to be set, in Unicode NFC. Its length counts characters after normalisation."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(validate=validate.Length(8, 128), load_only=True, **kwargs)

    def _deserialize(self, value, attr, data, **kwargs):
        text = super()._deserialize(value, attr, data, **kwargs)
        # NFC is quadratic. It joins at most 4 characters into one: a longer text stays too long.
        return unicodedata.normalize("NFC", text) if len(text) <= 4 * 128 else text


def Instant(**kwargs: Any) -> fields.String:
    """A moment in an answer."""
    return fields.String(
        dump_only=True, metadata={"format": "date-time", "maxLength": 40} | kwargs.pop("meta", {}),
        **kwargs,
    )


def Amount(**kwargs: Any) -> fields.String:
    """An amount of money in an answer: text with two places."""
    return fields.String(
        dump_only=True,
        metadata={"pattern": r"^-?[0-9]{1,20}\.[0-9]{2}$", "maxLength": 24, "examples": ["119.23"]},
        **kwargs,
    )
