"""How users write a time: a number with ms, s, m or h, or of seconds alone."""

from __future__ import annotations

import math
import re

_FORM = re.compile(r"\s*(?P<number>[0-9.]+)\s*(?P<unit>ms|s|m|h|)\s*")
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str, *, zero_allowed: bool = False) -> float:
    """Seconds.

    >>> [parse_duration(text) for text in ("30", "30s", "1.5m", "1h", "250ms")]
    [30.0, 30.0, 90.0, 3600.0, 0.25]

    Raises:
        ValueError: it is none, or infinite, or 0 where that is not allowed.
    """
    parts = _FORM.fullmatch(text)
    if parts is None:
        raise ValueError(f"duration is {text!r}; it must be a number with ms, s, m or h, such as 30s or 5m")
    try:
        seconds = float(parts["number"]) * _UNITS_S[parts["unit"]]
    except ValueError:
        raise ValueError(f"duration is {parts['number']!r}; it must be a number") from None
    if not math.isfinite(seconds) or (seconds == 0 and not zero_allowed):
        allowed = "finite" if zero_allowed else "above 0 and finite"
        raise ValueError(f"duration is {seconds:g}; it must be {allowed}")
    return seconds
