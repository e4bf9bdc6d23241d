"""A wire between a client and a server that can be cut: both ends stay open then, and nothing passes any more.

Of a machine that has lost its power or its network, the other side sees just that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading


class CutWire:
    """`with CutWire(target) as detour` leads to target; on a thread of its own, so that blocking tests may use it."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._far = host, int(port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._cut = False
        self._open = asyncio.Event()
        self._open.set()
        self._carrying: set[asyncio.Task] = set()

    def __enter__(self) -> str:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._join, "127.0.0.1", 0), self._loop).result()
        self._server = server
        return "{}:{}".format(*server.sockets[0].getsockname())

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        self._cut = True

    def hold(self, held: bool) -> None:
        """Nothing passes for a while; it comes later."""
        self._loop.call_soon_threadsafe(self._open.clear if held else self._open.set)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._far)
        for one, other in ((reader, far_writer), (far_reader, writer)):
            task = self._loop.create_task(self._carry(one, other))
            self._carrying.add(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while chunk := await reader.read(65536):
                await self._open.wait()
                if not self._cut:
                    writer.write(chunk)
            if self._cut:
                await asyncio.Event().wait()  # the end of one side is not told to the other either
        writer.close()

    async def _close(self) -> None:
        self._server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)
