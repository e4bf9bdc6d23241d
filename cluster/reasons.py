"""An error as one line, for logs, statuses and users."""

from __future__ import annotations

LONGEST = 300
"""Characters; gRPC's trailers hold a few thousand bytes."""


def one_line(error: BaseException) -> str:
    """Its class and the first line of its message, cut where it is long.

    Of an error that Ray brought from another process, its cause's.

    >>> one_line(ValueError("stages is 9\\nand more"))
    'ValueError: stages is 9'
    >>> one_line(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}"[:LONGEST] if lines else type(cause).__name__
