"""Server-sent events, as their specification reads a stream (HTML Standard, "Server-sent events"): lines end with LF,
CR LF or CR; a blank line ends an event; several `data` lines are one text with LF between; one blank after the colon
belongs to the syntax; a line that begins with a colon is a comment.

    : keep-alive
    event: message
    data: {"choices":
    data:[]}
                                    one event, whose data is {"choices":\\n[]}
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

EVENT_LIMIT_BYTES = 2**20


class Event(NamedTuple):
    """One event of a stream."""

    name: bytes
    """Its type; empty where the stream names none."""
    data: bytes


class EventReader:
    """Cuts a stream into events, whatever the pieces in which it comes."""

    def __init__(self) -> None:
        self._begun = b""  # a line whose end has not come
        self._ended_by_cr = False  # an LF that comes next belongs to it
        self._at_start = True
        self._name = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that end within the piece.

        Raises:
            ValueError: one is longer than the limit.
        """
        if not piece:
            return
        ended_by_cr, self._ended_by_cr = self._ended_by_cr, piece.endswith(b"\r")
        lines = (self._begun + (piece.removeprefix(b"\n") if ended_by_cr else piece)).splitlines(keepends=True)
        self._begun = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            yield from self._take(line.rstrip(b"\r\n"))
        self._check(len(self._begun))

    def end(self) -> Iterator[Event]:
        """The event that the stream ended without the blank line that belongs after it."""
        yield from self._take(self._begun)
        yield from self._take(b"")

    def _take(self, line: bytes) -> Iterator[Event]:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                yield Event(self._name, b"\n".join(self._data))
            self._name, self._data, self._size = b"", [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._check(len(value))
            self._data.append(value)
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value

    def _check(self, more: int) -> None:
        if self._size + more > EVENT_LIMIT_BYTES:
            raise ValueError(f"an event is longer than {EVENT_LIMIT_BYTES:,} bytes")
