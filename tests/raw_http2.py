"""HTTP/2 as a rude client speaks it: messages sent in half, streams reset at once. gRPC's own clients make neither.

It heeds the server's windows, and counts what they let through. Blocking; a test's event loop needs a thread for it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
CANCEL = 8
INITIAL_WINDOW_SIZE = 4
GENERATE = "/tramontane.v1.Serving/Generate"


class RawConnection:
    def __init__(self, target: str, metadata: Iterable[tuple[str, str]] = ()) -> None:
        host, _, port = target.rpartition(":")
        self.sent = 0
        """Bytes of messages, over all streams."""
        self.ends: dict[int, bytes] = {}
        """Of streams that the server has ended: the block of headers that says how, if any."""
        self._metadata = tuple(metadata)
        self._windows = {0: 65535}  # of the connection, and of each stream
        self._initial = 65535
        self._left: dict[int, int] = {}  # of messages under way
        self._begun: set[int] = set()
        self._next = 1
        self._heard = b""
        self._socket = socket.create_connection((host, int(port)))
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b""))
        self.listen(1.0)

    def close(self) -> None:
        self._socket.close()

    def call(self, length: int, path: str = GENERATE) -> int:
        """Begin a call with a message of so many bytes, and send nothing of it."""
        number = self._open(path)
        self._left[number] = 5 + length
        return number

    def send_all_but_one_byte(self) -> None:
        """Of each message, as far as the server lets it through; give up when it lets nothing through for a while."""
        while True:
            before = self.sent
            for number, left in list(self._left.items()):
                if number not in self.ends and left > 1:
                    self._send(number)
            self.listen(0.01 if self.sent > before else 0.5)
            if self.sent == before:
                return

    def open_and_reset(self, count: int) -> None:
        """So many calls, each reset at once."""
        for _ in range(count):
            self._socket.sendall(frame(RST_STREAM, 0, self._open(GENERATE), struct.pack(">I", CANCEL)))

    def listen(self, timeout_s: float) -> None:
        """Take what the server has said; wait so long for the first of it."""
        self._socket.settimeout(timeout_s)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while chunk := self._socket.recv(1 << 16):
                self._heard += chunk
                self._take()
                self._socket.settimeout(0.0)
        self._socket.settimeout(30.0)

    def _open(self, path: str) -> int:
        number, self._next = self._next, self._next + 2
        fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "raw"), ("te", "trailers")]
        fields += [("content-type", "application/grpc"), *self._metadata]
        self._windows[number] = self._initial
        self._socket.sendall(frame(HEADERS, END_HEADERS, number, b"".join(map(literal, fields))))
        return number

    def _send(self, number: int) -> None:
        left = self._left[number]
        size = min(left - 1, self._windows[0], self._windows[number], 16384)
        if size < 16:
            return
        head = b"" if number in self._begun else struct.pack(">BI", 0, left - 5)
        body = head.ljust(size, b"x")
        self._begun.add(number)
        self._socket.sendall(frame(DATA, 0, number, body))
        self._windows[0] -= size
        self._windows[number] -= size
        self._left[number] -= size
        self.sent += size

    def _take(self) -> None:
        while len(self._heard) >= 9:
            end = 9 + int.from_bytes(self._heard[:3], "big")
            if len(self._heard) < end:
                return
            kind, flags, number = self._heard[3], self._heard[4], int.from_bytes(self._heard[5:9], "big")
            body, self._heard = self._heard[9:end], self._heard[end:]
            self._hear(kind, flags, number, body)

    def _hear(self, kind: int, flags: int, number: int, body: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            settings = dict(struct.iter_unpack(">HI", body))
            more = settings.get(INITIAL_WINDOW_SIZE, self._initial) - self._initial
            self._initial += more
            for stream in filter(None, self._windows):
                self._windows[stream] += more
            self._socket.sendall(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._socket.sendall(frame(PING, ACK, 0, body))
        elif kind == WINDOW_UPDATE and number in self._windows:
            self._windows[number] += int.from_bytes(body, "big")
        elif kind == HEADERS and flags & END_STREAM:
            self.ends[number] = body
        elif kind == RST_STREAM:
            self.ends.setdefault(number, b"")


def frame(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + number.to_bytes(4, "big") + body


def literal(field: tuple[str, str]) -> bytes:
    """A header field that no table holds, without Huffman's code."""
    return b"\x10" + b"".join(integer(len(part)) + part.encode() for part in field)


def integer(value: int) -> bytes:
    """In 7 bits and, where they are too few, in bytes that follow."""
    if value < 127:
        return bytes([value])
    value, digits = value - 127, [127]
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])
