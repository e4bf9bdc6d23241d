"""The real `Pipeline`: over a link to its router."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from tramontane.cluster.address import Address
from tramontane.cluster.async_link import AsyncLink
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Cancel, Finished, Load, Role, Submit, Tokens
from tramontane.cluster.pipeline import Receiver, broken_end
from tramontane.cluster.reasons import one_line
from tramontane.cluster.site import Site

log = logging.getLogger(__name__)

DIAL_TIMEOUT_S = 10.0


class LinkPipeline:
    """A `Pipeline` over a link to its router."""

    def __init__(self, name: str, link: AsyncLink, outstanding_tokens: int) -> None:
        self._name = name
        self._link = link
        self._open: dict[int, Receiver] = {}
        self._load = outstanding_tokens
        self._outbox: deque[Submit | Cancel] = deque()
        self._posted = asyncio.Event()
        self._retired = False
        loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[str] = loop.create_future()
        self._tasks = [loop.create_task(self._run(self._send)), loop.create_task(self._run(self._receive))]

    @classmethod
    async def dial(cls, name: str, address: Address, site: Site, *, gateway: str) -> LinkPipeline:
        """Link up with the router called `name`, which serves when this returns: a broken one never tells its load.

        Raises:
            LinkClosed: nobody listens, the handshake failed, or the router does not serve.
        """
        link = await AsyncLink.dial(address, site, role=Role.GATEWAY, name=gateway, epoch=0, timeout_s=DIAL_TIMEOUT_S)
        try:
            return cls(name, link, await _first_load(name, link))
        except BaseException:
            link.close()
            raise

    @property
    def name(self) -> str:
        """The router's."""
        return self._name

    @property
    def outstanding_tokens(self) -> int:
        """The router's last word, and what was submitted since."""
        return self._load

    @property
    def broken(self) -> asyncio.Future[str]:
        """See `Pipeline`."""
        return self._broken

    def submit(self, request: Submit, receiver: Receiver) -> None:
        """See `Pipeline`."""
        if self._broken.done():
            receiver.end(broken_end(request.request, self._broken.result()))
            return
        self._open[request.request] = receiver
        self._load += len(request.tokens) + request.stopping.max_tokens
        self._post(request)

    def cancel(self, request: int, *, completed: bool = False) -> None:
        """See `Pipeline`."""
        if self._open.pop(request, None) is not None:
            self._post(Cancel(request=request, completed=completed))
            self._close_if_idle()

    def retire(self) -> None:
        """See `Pipeline`."""
        self._retired = True
        self._close_if_idle()

    async def close(self) -> None:
        """See `Pipeline`."""
        self._break("the gateway has closed its link")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _post(self, message: Submit | Cancel) -> None:
        self._outbox.append(message)
        self._posted.set()

    async def _send(self) -> None:
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._outbox:
                await self._link.send(self._outbox.popleft())

    async def _receive(self) -> None:
        while True:
            message = await self._link.receive()
            match message:
                case Tokens():
                    self._deliver(message)
                case Finished():
                    if (receiver := self._open.pop(message.request, None)) is not None:
                        receiver.end(message)
                    self._close_if_idle()
                case Load():
                    self._load = message.outstanding_tokens
                case _:
                    raise LinkClosed(f"{self._name} sent {type(message).__name__}")

    def _deliver(self, tokens: Tokens) -> None:
        rows = zip(
            tokens.request.tolist(),
            tokens.offset.tolist(),
            tokens.token.tolist(),
            tokens.log_probability.tolist(),
            strict=True,
        )
        for request, offset, token, log_probability in rows:
            if (
                receiver := self._open.get(request)
            ) is not None:  # else it was cancelled while the token was on its way
                receiver.put(offset, token, log_probability)

    async def _run(self, job: Callable[[], Awaitable[None]]) -> None:
        """One direction of the link. Whatever ends it breaks the pipeline, a mistake of ours included."""
        try:
            await job()
        except LinkClosed as error:
            self._break(f"link to {self._name}: {error}")
        except Exception as error:
            log.exception("pipeline %s failed", self._name)
            self._break(one_line(error))

    def _close_if_idle(self) -> None:
        if self._retired and not self._open:
            self._break("no longer in use")

    def _break(self, reason: str) -> None:
        """End everything once."""
        if self._broken.done():
            return
        self._broken.set_result(reason)
        receivers, self._open = self._open, {}
        for request, receiver in receivers.items():
            receiver.end(broken_end(request, reason))
        self._outbox.clear()
        self._link.close()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


async def _first_load(name: str, link: AsyncLink) -> int:
    """The outstanding tokens that a router tells of first.

    Raises:
        LinkClosed: it says nothing, something else, or has closed the link.
    """
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            message = await link.receive()
    except TimeoutError:
        raise LinkClosed(f"{name} says nothing") from None
    if not isinstance(message, Load):
        raise LinkClosed(f"{name} sent {type(message).__name__}")
    return message.outstanding_tokens
