"""Links for threads: blocking sockets that carry frames. The asyncio twin is `async_link.py`.

One thread may send while another receives; `close`, from any thread, wakes both. A link that has failed once is closed.
A third thread of the link's own sends heartbeats, so that an end that computes is not taken for a dead one.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tramontane.cluster import doors, frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.fields import ALIGNMENT, Buffer
from tramontane.cluster.frames import FrameError, Message
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Heartbeat, Role
from tramontane.cluster.site import Site
from tramontane.stages.microbatch import Microbatch

Inbox: TypeAlias = Callable[[Microbatch, int], memoryview]
"""Hands out the bytes into which a Microbatch's rows are received; the frame has so many."""


class Link:
    """One end of a link on which the handshake is done."""

    def __init__(self, line: socket.socket, silence_s: float) -> None:
        self._line = line
        self._silence_s = silence_s
        self._state = threading.Lock()
        self._users = 0
        """Threads that are in a system call on the socket; the last one to leave closes it."""
        self._reason: str | None = None
        self._sending = threading.Lock()
        self._last_sent = time.monotonic()
        self._closed = threading.Event()
        line.settimeout(None)
        doors.tune(line, silence_s)
        silence = struct.pack("ll", int(silence_s), int(silence_s % 1 * 1e6))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, silence)
        threading.Thread(target=self._beat, name="link heartbeat", daemon=True).start()

    @classmethod
    def dial(cls, address: Address, site: Site, *, role: Role, name: str, epoch: int, timeout_s: float) -> Link:
        """Link up with a listener, which has proved itself when this returns.

        Raises:
            LinkClosed: nobody listens, the other end is no listener of ours, or it refuses us.
        """
        deadline = time.monotonic() + timeout_s
        try:
            line = doors.dial(address, site.node, timeout_s)
        except OSError as error:
            raise LinkClosed(f"cannot dial {address}: {error}") from None
        try:
            doors.check_peer(line)
            dialler = handshake.Dialler(role=role, name=name, epoch=epoch, secret=site.secret)
            _, challenge = read_message(line, frames.HANDSHAKE_LIMITS, deadline)
            write_all(line, frames.encode(dialler.answer(challenge)), deadline)
            _, welcome = read_message(line, frames.HANDSHAKE_LIMITS, deadline)
            dialler.check(welcome)
        except (OSError, FrameError, handshake.HandshakeError, LinkClosed) as error:
            line.close()
            raise LinkClosed(f"no handshake with {address}: {error}") from None
        return cls(line, site.silence_s)

    def send(self, message: Message, rows: memoryview | None = None) -> None:
        """Send a message, and behind a Microbatch its rows; waits while the other end does not read.

        Raises:
            LinkClosed: the link is closed, or was closed meanwhile.
            FrameError: the message does not fit into a frame; nothing was sent.
        """
        parts = frames.encode(message, 0 if rows is None else rows.nbytes)
        if rows is not None and rows.nbytes:
            parts.append(rows)
        with self._sending:
            self._write(parts)

    def receive(self, inbox: Inbox | None = None) -> Message:
        """Wait for the next message; heartbeats are none.

        Without an `inbox`, rows are refused. With one, it is called for every Microbatch, when the Microbatch itself
        has arrived, and must hand out as many bytes as the frame has rows; they are filled before this returns.

        Raises:
            LinkClosed: the link is closed, was closed meanwhile, or has carried something that is no frame.
        """
        while True:
            message = self._read(inbox)
            if not isinstance(message, Heartbeat):
                return message

    def close(self, reason: str = "closed by this end") -> None:
        """Close the link; threads that wait on it raise LinkClosed with the reason. Later calls do nothing."""
        with self._state:
            if self._reason is not None:
                return
            self._reason = reason
            self._closed.set()
            with contextlib.suppress(OSError):  # the other end may have gone
                self._line.shutdown(socket.SHUT_RDWR)
            if self._users == 0:
                self._line.close()

    def _read(self, inbox: Inbox | None) -> Message:
        self._enter()
        try:
            prefix, message = read_message(self._line, frames.LIMITS)
            if isinstance(message, Microbatch) and inbox is not None:
                rows = inbox(message, prefix.rows)
                if rows.nbytes != prefix.rows:
                    raise FrameError(f"rows: {prefix.rows} bytes, the inbox has {rows.nbytes}")
                if rows.nbytes:
                    read_into(self._line, rows.cast("B"))
            elif prefix.rows:
                raise FrameError(f"rows: {prefix.rows} bytes, none are expected here")
            return message
        except (OSError, FrameError, LinkClosed) as error:
            raise self._fail(error) from None
        except BaseException as error:  # the inbox failed, and the rows that follow have no place to go
            self.close(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._leave()

    def _write(self, parts: Sequence[Buffer]) -> None:
        self._enter()
        try:
            write_all(self._line, parts)
            self._last_sent = time.monotonic()
        except OSError as error:
            raise self._fail(error) from None
        finally:
            self._leave()

    def _beat(self) -> None:
        """Show on an idle link that this end lives. A link in use needs no heartbeat."""
        while not self._closed.wait(doors.HEARTBEAT_PERIOD_S):
            idle_s = time.monotonic() - self._last_sent
            if idle_s >= doors.HEARTBEAT_PERIOD_S / 2 and self._sending.acquire(blocking=False):
                try:
                    self._write([frames.HEARTBEAT])
                except LinkClosed:
                    return
                finally:
                    self._sending.release()

    def _enter(self) -> None:
        with self._state:
            if self._reason is not None:
                raise LinkClosed(self._reason)
            self._users += 1

    def _leave(self) -> None:
        with self._state:
            self._users -= 1
            if self._reason is not None and self._users == 0:
                self._line.close()

    def _fail(self, error: Exception) -> LinkClosed:
        """Close because of this error, unless the link was closed before, which then caused the error."""
        if isinstance(error, BlockingIOError):
            self.close(f"silent for {self._silence_s:g} s")
        elif isinstance(error, FrameError):
            self.close(f"not a frame: {error}")
        else:
            self.close(str(error))
        assert self._reason is not None, "close leaves a reason"
        return LinkClosed(self._reason)


def read_message(
    line: socket.socket, limits: frames.Limits, deadline: float | None = None
) -> tuple[frames.Prefix, Message]:
    """Receive a frame up to its rows. `deadline` is a reading of the monotonic clock.

    Raises:
        FrameError: before anything is allocated for a part that is over its limit.
        LinkClosed: the other end has closed.
        OSError: the socket failed, or the deadline has passed.
    """
    start = bytearray(frames.PREFIX.size)
    read_into(line, memoryview(start), deadline)
    prefix = frames.parse_prefix(start, limits)
    lead = -prefix.header % ALIGNMENT  # so that the arrays are aligned
    body = memoryview(bytearray(lead + prefix.header + prefix.arrays))[lead:]
    read_into(line, body, deadline)
    return prefix, frames.decode(body[: prefix.header], body[prefix.header :])


def read_into(line: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fill the view; raises as `read_message`."""
    while view:
        _set_deadline(line, deadline)
        count = line.recv_into(view, len(view), socket.MSG_WAITALL)
        if count == 0:
            raise LinkClosed("closed by the other end")
        view = view[count:]


def write_all(line: socket.socket, parts: Sequence[Buffer], deadline: float | None = None) -> None:
    """Send all of these buffers, none of which is empty, without joining them; raises OSError."""
    views = [memoryview(part).cast("B") for part in parts]
    while views:
        _set_deadline(line, deadline)
        sent = line.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]


def _set_deadline(line: socket.socket, deadline: float | None) -> None:
    if deadline is not None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        line.settimeout(left_s)
