"""What may stand in a log line: nothing that strangers send can break it, colour it, or fill the disk by repeating it.

Calls that are refused are logged through `refusals`, a logger of its own, whose rate `log_file.py` limits.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

SHOWN = 128
"""Characters of a stranger's text that a log line repeats."""

refusals = logging.getLogger("tramontane.refusals")
"""For what strangers can cause as often as they like."""


def quoted(text: str, shown: int = SHOWN) -> str:
    r"""A stranger's text for a log line: in quotes where it is more than a word, what does not print escaped, cut.

    >>> print(quoted("/tramontane.v1.Serving/Generate"))
    /tramontane.v1.Serving/Generate
    >>> print(quoted("/tramontane.v1\n2026-01-01 I all is well"))
    '/tramontane.v1\n2026-01-01 I all is well'
    >>> print(quoted("x" * 200, shown=3))
    'xxx'... (200 characters)
    """
    if len(text) > shown:
        return f"{text[:shown]!r}... ({len(text)} characters)"
    return text if _WORD.fullmatch(text) else repr(text)


class OneLine(logging.Formatter):
    """An event is one line whatever its message holds; a traceback's lines follow it, indented.

    That is the net below `quoted`: texts also come in by way of exceptions and other libraries.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """See `logging.Formatter`."""
        record.message = _UNPRINTABLE.sub(_escaped, record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """See `logging.Formatter`."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {_UNPRINTABLE.sub(_escaped, line)}" for line in lines)


class TokenBucket:
    """So many at once, so many a second in the long run. Times are anybody's clock, in seconds."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._left = float(burst)
        self._last_s = -math.inf

    def take(self, now_s: float) -> bool:
        """Whether one more may pass now.

        >>> bucket = TokenBucket(rate=2.0, burst=1)
        >>> [bucket.take(now) for now in (0.0, 0.1, 0.5, 0.6)]
        [True, False, True, False]
        """
        passed_s = max(0.0, now_s - self._last_s)  # clocks are put back at times
        self._left = min(self._burst, self._left + passed_s * self._rate)
        self._last_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


class RateLimit(logging.Filter):
    """Lets lines pass at a rate; the next one that passes says how many did not."""

    def __init__(self, rate: float, burst: int) -> None:
        super().__init__()
        self._bucket = TokenBucket(rate, burst)
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`; the time is the record's."""
        if not self._bucket.take(record.created):
            self._left_out += 1
            return False
        if self._left_out:
            record.msg = f"{record.getMessage()} (and {self._left_out} refusals before it that were left out)"
            record.args = ()
            self._left_out = 0
        return True


_WORD = re.compile(r"[A-Za-z0-9_./:@+-]+")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]|[\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, and those that break or turn round a line."""


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
