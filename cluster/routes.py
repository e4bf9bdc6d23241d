"""The routers that a gateway may use: linked in the background, kept while they stand, linked again when they are lost.

    set -> dial ── linked ──▶ usable ── lost ──▶ pause, dial again ── ...
             └──── failed ──▶ pause, dial again ── ...

One router that is dead, or hung, costs only itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tramontane.cluster.address import Address
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.pipeline import Pipeline
from tramontane.cluster.reasons import one_line

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Before a router is dialled again. Each pause is twice the one before, until a link has stood for the longest."""

Dial: TypeAlias = Callable[[str, Address], Awaitable[Pipeline]]
"""Links up with the router of this name. Raises LinkClosed where that fails, and then leaves nothing open."""


@dataclass(frozen=True, kw_only=True)
class LinkNews:
    """How a gateway's links stand."""

    number: int
    """Counts up with each change."""
    lost: int
    """Links that were lost so far."""
    trouble: str
    """One line: the routers that are not linked now, and why; empty where all are."""


@dataclass(eq=False)
class Route:
    """One router of the table."""

    name: str
    address: Address
    pipeline: Pipeline | None = None
    trouble: str = "not linked yet"
    """Why there is no link; empty while there is one."""
    tried: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once it was dialled, linked or not."""
    keeper: asyncio.Task[None] | None = None

    @property
    def usable(self) -> bool:
        """A request may be sent there now."""
        return self.pipeline is not None and not self.pipeline.broken.done()


class Routes:
    """A gateway's route table. `on_change` is called when a link has come or gone."""

    def __init__(self, dial: Dial, on_change: Callable[[], None]) -> None:
        self._dial = dial
        self._on_change = on_change
        self._table: dict[tuple[str, Address], Route] = {}
        self._number = 0
        self._lost = 0
        self._news = asyncio.Event()
        self.generation = -1
        """Of the table; below 0 before there is one."""

    @property
    def usable(self) -> list[Pipeline]:
        """The pipelines that can take a request now."""
        return [route.pipeline for route in self._table.values() if route.pipeline is not None and route.usable]

    @property
    def trouble(self) -> str:
        """See `LinkNews`."""
        return "; ".join(f"{route.name}: {route.trouble}" for route in self._table.values() if route.trouble)

    async def set(self, generation: int, routers: Sequence[tuple[str, Address]]) -> None:
        """Exchange the table for a newer one, and wait until each of its routers was dialled once.

        A link to a router that stays is kept. One that is no longer in the table gets no new request, and is closed
        when its last one has ended. A table that is not newer is ignored.
        """
        if generation <= self.generation:
            log.info("routes of generation %d ignored, at generation %d", generation, self.generation)
            return
        self.generation = generation
        log.info("routes of generation %d: %s", generation, ", ".join(name for name, _ in routers) or "none")
        await asyncio.gather(*(route.tried.wait() for route in self._exchange(routers)))

    def clear(self) -> None:
        """Use no router until a newer table comes."""
        self._exchange(())

    async def close(self) -> None:
        """Close all links, and dial no more."""
        pipelines = [route.pipeline for route in self._table.values() if route.pipeline is not None]
        self._exchange(())
        await asyncio.gather(*(pipeline.close() for pipeline in pipelines))

    async def news(self, seen: int) -> LinkNews:
        """How the links stand, once that is another number than the one that was seen."""
        while self._number == seen:
            await self._news.wait()
        return LinkNews(number=self._number, lost=self._lost, trouble=self.trouble)

    def _exchange(self, routers: Sequence[tuple[str, Address]]) -> list[Route]:
        old, self._table = self._table, {}
        for name, address in routers:
            route = old.pop((name, address), None) or Route(name, address)
            self._table[name, address] = route
            if route.keeper is None:
                route.keeper = asyncio.get_running_loop().create_task(self._keep(route))
        for route in old.values():
            assert route.keeper is not None, f"route to {route.name} without a keeper"
            route.keeper.cancel()
            route.tried.set()
            if route.pipeline is not None:
                route.pipeline.retire()
        self._changed()
        return list(self._table.values())

    async def _keep(self, route: Route) -> None:
        """Have a link to this router, again and again."""
        clock = asyncio.get_running_loop().time
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                route.pipeline = await self._dial(route.name, route.address)
            except LinkClosed as error:
                self._note(route, str(error))
            except Exception as error:  # a mistake of ours must not be the end of the route
                log.exception("dialling %s failed", route.name)
                self._note(route, one_line(error))
            else:
                linked_s = clock()
                self._note(route, "")
                reason = await asyncio.shield(route.pipeline.broken)
                self._lost += 1
                self._note(route, reason)
                if clock() - linked_s >= LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _note(self, route: Route, trouble: str) -> None:
        """There is a link now, or there is none, for this reason."""
        route.tried.set()
        if trouble == route.trouble:
            return
        if trouble:
            log.warning("no link with %s: %s; it is dialled again", route.name, trouble)
        else:
            log.info("linked with %s", route.name)
        route.trouble = trouble
        self._changed()

    def _changed(self) -> None:
        self._number += 1
        self._news.set()
        self._news = asyncio.Event()
        self._on_change()
