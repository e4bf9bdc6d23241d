"""When recorded requests came, by the clock of whoever recorded them, in seconds.

    {"at_s": 1.25}                                 seconds
    {"timestamp": 27000}                           milliseconds, as Mooncake has them
    {"timestamp": 61.114}                          seconds, as Qwen's Bailian traces have them: most have fractions
    Timestamp,...            27                    seconds in a table, as BurstGPT has them
    TIMESTAMP,...            2023-11-16 18:15:46   a date, as Azure has it
    {"delay": 500}                                 so long after the line before, of its session where it names one

Timestamps and delays of a file have one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from tramontane.client.loadtest.load.names import Written
from tramontane.client.loadtest.load.passed_over import Unusable

MAX_VALUE = 1e15
"""Of a recorded time: more than any clock's milliseconds."""


class Unit(StrEnum):
    """What a timestamp counts."""

    AUTO = "auto"
    S = "s"
    MS = "ms"


class Kind(Enum):
    """How a moment was recorded."""

    SECONDS = auto()
    DATE = auto()
    STAMP = auto()
    """In the file's unit, as delays are."""
    DELAY = auto()


class Moment(NamedTuple):
    """When one request came, as its line says."""

    kind: Kind
    value: float
    session: str = ""
    """Whose request a delay comes after."""


def read_moment(written: Written) -> Moment:
    """The line's time. Raises Unusable where it has none."""
    session = str(written.session)
    if written.at_s is not None:
        return _checked("at_s", Moment(Kind.SECONDS, written.at_s, session))
    if isinstance(written.timestamp, str):
        return _checked("timestamp", _read_text(written.timestamp, session))
    if written.timestamp is not None:
        return _checked("timestamp", Moment(Kind.STAMP, written.timestamp, session))
    if written.delay is not None:
        return _checked("delay", Moment(Kind.DELAY, written.delay, session))
    raise Unusable("it has neither at_s nor timestamp nor delay")


def unit_of(moments: Sequence[Moment], *, in_table: bool) -> Unit:
    """The unit that a file's timestamps seem to have: seconds in a table, and where at least half have fractions."""
    fractions = [not each.value.is_integer() for each in moments if each.kind in (Kind.STAMP, Kind.DELAY)]
    return Unit.S if in_table or (fractions and 2 * sum(fractions) >= len(fractions)) else Unit.MS


def in_seconds(moments: Sequence[Moment], unit: Unit) -> list[float]:
    """All times by the file's own clock, in the file's order.

    >>> in_seconds([Moment(Kind.STAMP, 27000.0), Moment(Kind.DELAY, 500.0), Moment(Kind.SECONDS, 30.0)], Unit.MS)
    [27.0, 27.5, 30.0]
    """
    scale = 0.001 if unit is Unit.MS else 1.0
    times_s: list[float] = []
    last_s: dict[str, float] = {}
    for kind, value, session in moments:
        at_s = value * scale if kind in (Kind.STAMP, Kind.DELAY) else value
        if kind is Kind.DELAY:
            at_s += last_s.get(session, times_s[-1] if times_s else 0.0)
        times_s.append(at_s)
        last_s[session] = at_s
    return times_s


def moment_words(at_s: float, *, dated: bool) -> str:
    """A time by the file's own clock, for the report.

    >>> moment_words(25.0, dated=False), moment_words(1_700_158_546.68, dated=True)
    ('25 s', '2023-11-16 18:15:46.680000')
    """
    return str(datetime.fromtimestamp(at_s, UTC).replace(tzinfo=None)) if dated else f"{at_s:.15g} s"


def _read_text(text: str, session: str) -> Moment:
    try:
        return Moment(Kind.STAMP, float(text), session)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(text)
        return Moment(Kind.DATE, date.replace(tzinfo=date.tzinfo or UTC).timestamp(), session)
    except (ValueError, OverflowError):
        raise Unusable(f"timestamp is {text[:40]!a}, neither a number nor a date") from None


def _checked(field: str, moment: Moment) -> Moment:
    if not abs(moment.value) <= MAX_VALUE:
        raise Unusable(f"{field} is {moment.value:g}; it must lie in -1e15 .. 1e15")
    return moment
