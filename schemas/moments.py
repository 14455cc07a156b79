"""Moments as clients write them: a date, or a time with an offset."""
import re
from datetime import UTC, datetime, timedelta

from marshmallow import fields

FIRST_YEAR, LAST_YEAR = 1970, 2200
_SHAPE = re.compile(
    r"\d{4}-\d\d-\d\d"
    r"([Tt ]\d\d:\d\d(:\d\d([.]\d{1,6})?)?([Zz]|[+-]\d\d:\d\d)?)?"
)


class Moment(fields.Field):
    """ISO 8601: a date means its midnight in UTC, a time without an offset is in UTC.

    Years from 1970 to 2200. Loads to a datetime in UTC.
    """

    default_error_messages = {
        "invalid": "Not a date such as 2026-01-31 or a time such as 2026-01-31T12:00:00Z.",
        "range": f"Must lie between the years {FIRST_YEAR} and {LAST_YEAR}.",
    }

    def _deserialize(self, value, attr, data, **kwargs):
        # A plus sign that was not escaped arrives as a space.
        text = value if isinstance(value, str) else ""
        text = re.sub(r"(:\d\d(?:[.]\d+)?) (\d\d:\d\d)$", r"\1+\2", text)
        if not _SHAPE.fullmatch(text):
            raise self.make_error("invalid")
        try:
            moment = datetime.fromisoformat(text.upper())
            offset = moment.utcoffset() or timedelta()
        except ValueError:
            raise self.make_error("invalid") from None
        if not FIRST_YEAR <= moment.year <= LAST_YEAR:
            raise self.make_error("range")
        return (moment.replace(tzinfo=None) - offset).replace(tzinfo=UTC)
