"""Frames on an asyncio transport: what lies below `AsyncLink`.

Bytes are turned into messages only when somebody asks for one, so that the limits of the handshake hold for what comes
before its end, and a task may be cancelled anywhere without losing a part of a frame.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from typing import cast

from tramontane.cluster import doors, frames
from tramontane.cluster.frames import FrameError, Message
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Heartbeat

WRITE_BUFFER_BYTES = 256 << 10
"""A sender waits while more than this is unsent."""
READ_BUFFER_BYTES = 256 << 10
"""The other end is held back while more than this is unread, unless a single frame is larger."""
CLOSE_GRACE_S = 1.0
"""What was sent before `close` may take so long to leave."""
STALL_S = 1.0
"""A loop that is later than this with a timer was busy itself, and has not yet seen what arrived meanwhile."""


class FrameStream(asyncio.Protocol):
    """One socket. `on_made` is told when it is connected."""

    def __init__(self, on_made: Callable[[FrameStream], None] = lambda stream: None) -> None:
        self.limits = frames.HANDSHAKE_LIMITS
        self.reason: str | None = None
        """Why it is closed, or None."""
        self._loop = asyncio.get_running_loop()
        self.freed: asyncio.Future[None] = self._loop.create_future()
        """Done when the socket is gone."""
        self._on_made = on_made
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        """Starts with a frame's first byte."""
        self._wanted = READ_BUFFER_BYTES
        self._reader: asyncio.Future[None] | None = None
        self._writers: set[asyncio.Future[None]] = set()
        self._writable = True
        self._batch: bytearray | None = None
        """Frames that leave together at the end of this turn of the loop; None: nothing was sent in this turn."""
        self._last_sent = self._last_received = self._loop.time()
        self._silence_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    @property
    def line(self) -> socket.socket:
        """The socket, or what the loop shows of it."""
        return cast(socket.socket, self._connected.get_extra_info("socket"))

    def trust(self, silence_s: float) -> None:
        """The handshake is done: take large frames, show on an idle link that this end lives, watch the other end."""
        self.limits = frames.LIMITS
        self._silence_s = silence_s
        if self.reason is None:
            doors.tune(self.line, silence_s)
            self._last_received = self._loop.time()
            self._tick(self._last_received)

    async def wait_writable(self) -> None:
        """Wait while too much is unsent.

        Raises:
            LinkClosed: the stream is closed.
        """
        while not self._writable and self.reason is None:
            writer = self._loop.create_future()
            self._writers.add(writer)
            try:
                await writer
            finally:
                self._writers.discard(writer)
        self.check_open()

    def check_open(self) -> None:
        """Raises LinkClosed if the stream is closed."""
        if self.reason is not None:
            raise LinkClosed(self.reason)

    def write(self, frame: bytes) -> None:
        """The first frame in a turn of the loop leaves at once, those after it together."""
        self._last_sent = self._loop.time()
        if self._batch is None:
            self._connected.write(frame)
            self._batch = bytearray()
            self._loop.call_soon(self._flush)
            return
        self._batch += frame
        if len(self._batch) > WRITE_BUFFER_BYTES:
            self._flush()

    async def read(self) -> Message:
        """The next message; heartbeats are none.

        Raises:
            LinkClosed: the stream is closed, or has carried something that is no frame.
        """
        assert self._reader is None, "two tasks receive on one link"
        while True:
            message = self._next_message()
            if message is not None:
                return message
            if self.reason is not None:
                raise LinkClosed(self.reason)
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    def close(self, reason: str) -> None:
        """What was written leaves yet, within a time-out; what was not read is dropped."""
        if self.reason is None:
            self._received.clear()
            self._flush()
            self._connected.close()
            self._end(reason)
            self._timer = self._loop.call_later(CLOSE_GRACE_S, self._connected.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        # Not by its type: uvloop's transports, which Ray's actors have where uvloop is installed, derive from nothing.
        self._transport = transport = cast(asyncio.Transport, transport)
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._last_received = self._loop.time()
        if self.reason is not None:
            return
        self._received += data
        while self._received.startswith(frames.HEARTBEAT):  # here, since nobody reads on a link that only sends
            del self._received[: len(frames.HEARTBEAT)]
        if len(self._received) >= self._wanted:
            self._connected.pause_reading()
        _wake(self._reader)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable = False

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._writable = True
        for writer in self._writers:
            _wake(writer)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`. What has arrived before can still be read."""
        self._end(f"closed by the other end: {error}" if error else "closed by the other end")
        _wake(self.freed)

    @property
    def _connected(self) -> asyncio.Transport:
        assert self._transport is not None, "the stream is not connected yet"
        return self._transport

    def _next_message(self) -> Message | None:
        """Take a message off the bytes received, where a whole one is there."""
        received = self._received
        while True:
            try:
                body = frames.PREFIX.size
                if len(received) < body:
                    self._want(body)
                    return None
                prefix = frames.parse_prefix(received[:body], self.limits)
                if prefix.rows:
                    raise FrameError(f"rows: {prefix.rows} bytes, none are expected here")
                arrays, end = body + prefix.header, body + prefix.header + prefix.arrays
                if len(received) < end:
                    self._want(end)
                    return None
                message = frames.decode(received[body:arrays], received[arrays:end])
            except FrameError as error:
                self.close(f"not a frame: {error}")
                return None
            del received[:end]
            if not isinstance(message, Heartbeat):
                return message

    def _want(self, size: int) -> None:
        """Nobody can go on before so many bytes are there."""
        self._wanted = max(size, READ_BUFFER_BYTES)
        if self.reason is None:
            self._connected.resume_reading()

    def _flush(self) -> None:
        batch, self._batch = self._batch, None
        if batch and self.reason is None:
            self._connected.write(batch)

    def _tick(self, due: float) -> None:
        """Show on an idle link that this end lives, and close one whose other end shows nothing."""
        now = self._loop.time()
        if now - due > STALL_S or not self._connected.is_reading():
            self._last_received = now
        if now - self._last_received > self._silence_s:
            self.close(f"silent for {self._silence_s:g} s")
            return
        if now - self._last_sent >= doors.HEARTBEAT_PERIOD_S / 2 and self._writable:
            self.write(frames.HEARTBEAT)
        due = now + doors.HEARTBEAT_PERIOD_S
        self._timer = self._loop.call_at(due, self._tick, due)

    def _end(self, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.reason is None:
            self.reason = reason
            for waiter in (self._reader, *self._writers):
                _wake(waiter)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
