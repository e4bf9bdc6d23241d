"""Ends of asyncio links for tests; `wires.py` has the blocking ones."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from wires import DEADLINE_S, NEAR, dialling_from, greet, raw_dial, site_at

from tramontane.cluster.address import Address
from tramontane.cluster.async_link import AsyncLink, AsyncListener
from tramontane.cluster.messages import Hello, Role


@contextlib.asynccontextmanager
async def listener_of(folder: Path, on_link=None, **changes):
    """A listener and the queue of what it accepted; `on_link` takes links instead, if given."""
    accepted: asyncio.Queue[tuple[AsyncLink, Hello]] = asyncio.Queue()

    async def keep(link: AsyncLink, hello: Hello) -> None:
        accepted.put_nowait((link, hello))
        await link.wait_closed()

    listener = AsyncListener("door", site_at(folder, **changes), on_link or keep)
    await listener.start()
    try:
        yield listener, accepted
    finally:
        await listener.close()


async def dial(address: Address, *, node: str = NEAR, name: str = "gateway-0", **changes) -> AsyncLink:
    site = dialling_from(node, **changes)
    return await AsyncLink.dial(address, site, role=Role.GATEWAY, name=name, epoch=0, timeout_s=DEADLINE_S)


@contextlib.asynccontextmanager
async def linked(folder: Path, node: str, **changes):
    async with listener_of(folder, **changes) as (listener, accepted):
        mine = await dial(listener.address, node=node, **changes)
        theirs, hello = await asyncio.wait_for(accepted.get(), DEADLINE_S)
        assert (hello.role, hello.name) == (Role.GATEWAY, "gateway-0")
        try:
            yield mine, theirs
        finally:
            for link in (mine, theirs):
                link.close()
                await link.wait_closed()


async def raw_link(listener: AsyncListener, accepted, node: str = NEAR, **changes) -> tuple[socket.socket, AsyncLink]:
    line = await asyncio.to_thread(lambda: greet(raw_dial(listener.address, node), **changes))
    link, _ = await asyncio.wait_for(accepted.get(), DEADLINE_S)
    return line, link
