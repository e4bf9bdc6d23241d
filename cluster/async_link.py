"""Links for asyncio, for processes that talk to many others in one loop. The twin for threads is `link.py`.

A message is wholly sent or not at all, and wholly received or not at all, wherever a task is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from tramontane.cluster import doors, frames, handshake
from tramontane.cluster.address import Address
from tramontane.cluster.async_stream import FrameStream
from tramontane.cluster.frames import Message
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.log_lines import refusals
from tramontane.cluster.messages import Hello, Role
from tramontane.cluster.site import Site

log = logging.getLogger(__name__)

CLOSE_GRACE_S = 1.0
"""Handlers may take so long to notice that their links are closed."""


class AsyncLink:
    """One end of a link on which the handshake is done. Any number of tasks may send, one at a time may receive."""

    def __init__(self, stream: FrameStream, silence_s: float) -> None:
        self._stream = stream
        stream.trust(silence_s)

    @classmethod
    async def dial(
        cls, address: Address, site: Site, *, role: Role, name: str, epoch: int, timeout_s: float
    ) -> AsyncLink:
        """Link up with a listener, which has proved itself when this returns.

        Raises:
            LinkClosed: nobody listens, the other end is no listener of ours, or it refuses us.
        """
        stream = None
        try:
            async with asyncio.timeout(timeout_s):
                stream = await _connect(address, site.node)
                doors.check_peer(stream.line)
                dialler = handshake.Dialler(role=role, name=name, epoch=epoch, secret=site.secret)
                stream.write(_frame(dialler.answer(await stream.read())))
                dialler.check(await stream.read())
                link, stream = cls(stream, site.silence_s), None
                return link
        except TimeoutError:
            raise LinkClosed(f"no handshake with {address}: timed out") from None
        except (OSError, handshake.HandshakeError, LinkClosed) as error:
            raise LinkClosed(f"no handshake with {address}: {error}") from None
        finally:
            if stream is not None:
                stream.close("no handshake")

    async def send(self, message: Message) -> None:
        """Hand a message to the socket; waits while too much is unsent.

        Raises:
            LinkClosed: the link is closed.
            FrameError: the message does not fit into a frame; nothing was sent.
        """
        frame = _frame(message)
        await self._stream.wait_writable()
        self._stream.write(frame)

    def post(self, message: Message) -> None:
        """Hand a message to the socket without waiting: for a sender that something else keeps from sending too much.

        Raises:
            LinkClosed: the link is closed.
            FrameError: the message does not fit into a frame; nothing was sent.
        """
        frame = _frame(message)
        self._stream.check_open()
        self._stream.write(frame)

    async def receive(self) -> Message:
        """Wait for the next message; heartbeats are none. What arrived before the other end closed is still received.

        Raises:
            LinkClosed: the link is closed, or has carried something that is no frame.
        """
        return await self._stream.read()

    async def messages(self) -> AsyncIterator[Message]:
        """All messages until the link closes."""
        with contextlib.suppress(LinkClosed):
            while True:
                yield await self.receive()

    def close(self, reason: str = "closed by this end") -> None:
        """Close the link; what was sent leaves yet, what has not been received is dropped. Later calls do nothing."""
        self._stream.close(reason)

    async def wait_closed(self) -> None:
        """Wait until the socket is freed."""
        await asyncio.shield(self._stream.freed)


OnLink: TypeAlias = Callable[[AsyncLink, Hello], Awaitable[None]]


class AsyncListener:
    """Hands over every link whose dialler has passed the handshake.

    `on_link` runs in a task of the link's own; the link is closed when it returns.
    """

    def __init__(self, name: str, site: Site, on_link: OnLink) -> None:
        self._name = name
        self._site = site
        self._path = site.socket_path(name)
        self._on_link = on_link
        self._address: Address | None = None
        self._servers: list[asyncio.Server] = []
        self._strangers = 0
        """Diallers in their handshake."""
        self._serving: dict[asyncio.Task[None], FrameStream] = {}

    @property
    def address(self) -> Address:
        """Where others may dial."""
        assert self._address is not None, "the listener was not started"
        return self._address

    async def start(self) -> None:
        """Open the unix door and, where the site has a host, the TCP one.

        Raises:
            ValueError, OSError: see `doors.listen_unix` and `doors.listen_tcp`.
        """
        loop = asyncio.get_running_loop()
        opened = doors.open_all(self._path, self._site.host)
        self._address = doors.address_of(opened, self._site.node)
        for door in opened:
            create = loop.create_server if doors.is_tcp(door) else loop.create_unix_server
            self._servers.append(await create(lambda: FrameStream(self._accept), sock=door))

    async def close(self) -> None:
        """Close the doors and all links, and wait for their handlers."""
        if self._servers:
            self._path.unlink(missing_ok=True)
        for server in self._servers:
            server.close()
        self._servers.clear()
        mine = asyncio.current_task()
        tasks = [task for task in self._serving if task is not mine]
        streams = list(self._serving.values())
        for stream in streams:
            stream.close("the listener was closed")
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=CLOSE_GRACE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await asyncio.gather(*(stream.freed for stream in streams))

    def _accept(self, stream: FrameStream) -> None:
        if not self._servers:
            stream.close("the listener was closed")
            return
        if self._strangers >= (most := handshake.MAX_HANDSHAKES):
            refusals.warning("%s refused a dialler: %d others are in their handshake", self._name, most)
            stream.close("too many diallers")
            return
        self._strangers += 1
        task = asyncio.get_running_loop().create_task(self._serve(stream))
        self._serving[task] = stream
        task.add_done_callback(self._serving.pop)

    async def _serve(self, stream: FrameStream) -> None:
        try:
            hello = await self._greet(stream)
            await self._on_link(AsyncLink(stream, self._site.silence_s), hello)
        except handshake.HandshakeError as error:
            refusals.warning("%s refused a dialler: %s", self._name, error)
        except Exception:
            log.exception("%s failed with a link", self._name)
        finally:
            stream.close("closed by this end")

    async def _greet(self, stream: FrameStream) -> Hello:
        try:
            doors.check_peer(stream.line)
            greeter = handshake.Greeter(self._site.secret)
            async with asyncio.timeout(handshake.HANDSHAKE_TIMEOUT_S):
                stream.write(_frame(greeter.challenge))
                hello = greeter.check(await stream.read())
            stream.write(_frame(greeter.welcome(hello)))
            return hello
        except TimeoutError:
            raise handshake.HandshakeError("it says nothing") from None
        except (OSError, LinkClosed) as error:
            raise handshake.HandshakeError(str(error)) from None
        finally:
            self._strangers -= 1


async def _connect(address: Address, node: str) -> FrameStream:
    loop, way = asyncio.get_running_loop(), address.way_from(node)
    if isinstance(way, str):
        _, stream = await loop.create_unix_connection(FrameStream, way)
    else:
        _, stream = await loop.create_connection(FrameStream, *way)
    return stream


def _frame(message: Message) -> bytes:
    return b"".join(frames.encode(message))
