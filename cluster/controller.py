"""The controller creates and owns every part of the service, and says at once when one of them is gone.

It is off the data path: parts are created and bound through a `Platform` (Ray, or a stand-in in tests), routes are
pushed to the gateway with a growing generation, and a watch on each part turns its end into "not serving".

    start:  gateway (port opens, NOT_SERVING) -> room for the pipeline -> stages load -> router binds -> routes, SERVING
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

from tramontane.cluster.answer_watch import watch_answers
from tramontane.cluster.kernel_agreement import agree_on_kernels
from tramontane.cluster.parts import GatewayControl, Platform, RouterControl, StageControl
from tramontane.cluster.reasons import one_line
from tramontane.cluster.spec import Loaded, ServiceSpec, gateway_name, router_name, stage_name
from tramontane.cluster.stats import ProcessFacts, ServiceStats
from tramontane.cluster.worker import LoadedStage
from tramontane.stages.version import combine_version

log = logging.getLogger(__name__)

T = TypeVar("T")

PROGRESS_PERIOD_S = 0.2
ROOM_REMINDER_S = 30.0
COMPILING = "compiling the CPU kernels: once, some 15 s"
CLOSE_TIMEOUT_S = 6.0
ANSWER_TIMEOUT_S = 2.0
"""A part that has not answered by then is left out, or passed over."""


class ServicePhase(StrEnum):
    """Where the service stands."""

    STARTING = "starting"
    WAITING = "waiting for room"
    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    """A gateway has lost its link to a router, and dials it again."""
    BROKEN = "broken"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class Status:
    """What an operator sees."""

    phase: ServicePhase
    detail: str
    """One line: what is lacking, what is waited for, what broke; empty where there is nothing to add."""
    fraction: float
    """How much of the weights is loaded, 0 to 1."""
    port: int
    """The gateway's port, 0 before it is open."""
    version: str
    """Empty before the stages are loaded."""
    kernels: str = ""
    """The kernels of the stages; empty before they are chosen."""
    warnings: tuple[str, ...] = ()
    """What an operator should know, a line each."""
    lost_links: int = 0
    """Links that the gateway has lost so far; `detail` then says how the last one was."""


class Controller:
    """Keeps one service as its spec says. One replica; a part that dies stays dead, and the service says so."""

    def __init__(self, spec: ServiceSpec, platform: Platform, process_facts: Callable[[], ProcessFacts]) -> None:
        self._spec = spec
        self._platform = platform
        self._process_facts = process_facts
        version = "" if spec.loaded is None else spec.loaded.version
        self._status = Status(phase=ServicePhase.STARTING, detail="", fraction=0.0, port=0, version=version)
        self._gateway: GatewayControl | None = None
        self._router: RouterControl | None = None
        self._stages: list[StageControl] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._silent: dict[str, str] = {}
        """Parts that do not answer, with a sentence about each."""

    def status(self) -> Status:
        """Where the service stands now."""
        return self._status

    async def run(self) -> None:
        """Bring the service up. What fails ends in the status, never in silence."""
        try:
            await self._bring_up()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the service did not come up")
            await self._break(one_line(error))

    async def stop(self) -> None:
        """End all parts: the gateway first, so that streams in flight get their status."""
        self._say(phase=ServicePhase.STOPPED)
        for task in self._tasks:
            task.cancel()
        if self._gateway is not None:
            await _quietly(self._gateway.close(), CLOSE_TIMEOUT_S)
        await self._platform.end()
        log.info("service %s ended", self._spec.name)

    async def stats(self) -> ServiceStats:
        """Counters of every part that answers in time."""
        gateways, routers, stages = await asyncio.gather(
            _answers([self._gateway.stats()] if self._gateway is not None else []),
            _answers([self._router.stats()] if self._router is not None else []),
            _answers([stage.stats() for stage in self._stages]),
        )
        return ServiceStats(
            processes=(
                self._process_facts(),
                *(facts for _, facts in gateways),
                *(facts for _, facts in routers),
                *(facts for _, facts in stages),
            ),
            late=(*self._silent.values(), *(counters.late for counters, _ in routers if counters.late)),
            gateways=tuple(counters for counters, _ in gateways),
            stages=tuple(counters for counters, _ in stages),
            routers=tuple(counters for counters, _ in routers),
        )

    async def _bring_up(self) -> None:
        self._gateway = await self._platform.gateway(gateway_name(0))
        self._say(port=await self._gateway.start())
        self._watch(self._gateway.gone, "gateway 0")
        await self._wait_for_room()

        names = [stage_name(0, index) for index in range(self._spec.stages)]
        self._stages = [await self._platform.stage(name, 0, index) for index, name in enumerate(names)]
        await self._choose_kernels()
        loaded = await self._settle(await self._load())
        await self._gateway.set_model(loaded.version, loaded.row_invariant)

        self._router = await self._platform.router(router_name(0), self._stages)
        address = await self._router.bind()
        generation = 1 + await self._gateway.generation()
        await self._gateway.set_routes(generation, [(router_name(0), address)])
        self._say(fraction=1.0)
        seen = await self._take_link_news(-1)
        self._start(self._follow_links(seen))
        self._watch(self._router.broken, "pipeline 0")
        self._watch_silence(router_name(0), self._router.stats, self._spec.hang_limit_s)
        self._watch_silence(gateway_name(0), self._gateway.stats, math.inf)
        log.info("service %s ready, version %s", self._spec.name, loaded.version)

    async def _wait_for_room(self) -> None:
        await self._platform.reserve(0)
        self._say(phase=ServicePhase.WAITING)
        for reminder in itertools.count(1):
            lacking = await self._platform.room(0, ROOM_REMINDER_S)
            if not lacking:
                break
            if self._spec.loaded is not None:  # it was there, and went with a node
                raise ConnectionError(f"the pipeline has lost its room: {lacking}")
            self._say(detail=f"{lacking}; waiting for {reminder * ROOM_REMINDER_S:.0f} s")
            log.warning("%s", self._status.detail)
        self._say(phase=ServicePhase.LOADING, detail="")

    async def _choose_kernels(self) -> None:
        """Choose the stages' kernels once in a service's life; a controller that comes back takes the recorded ones."""
        if not self._spec.stage_kernels:
            decision = await self._with_progress(agree_on_kernels(self._spec, self._stages, self._platform))
            for remark in decision.remarks:
                log.warning("%s", remark)
            self._spec = replace(self._spec, stage_kernels=decision.stages)
            await self._platform.record(self._spec)
            self._say(warnings=decision.remarks)
        kernels = ", ".join(dict.fromkeys(map(str, self._spec.stage_kernels)))
        log.info("kernels: %s", kernels)
        self._say(kernels=kernels)

    async def _load(self) -> list[LoadedStage]:
        """Load all stages side by side."""
        chosen = zip(self._stages, self._spec.stage_kernels, strict=True)
        return await self._with_progress(asyncio.gather(*(stage.load(kernels) for stage, kernels in chosen)))

    async def _with_progress(self, work: Awaitable[T]) -> T:
        """Wait for work that stages do before they serve, and report their progress meanwhile."""
        working = asyncio.ensure_future(work)
        assert self._gateway is not None
        while not working.done():
            await asyncio.wait([working], timeout=PROGRESS_PERIOD_S)
            stages = await _answers([stage.progress() for stage in self._stages])
            detail = COMPILING if any(stage.compiling for stage in stages) else ""
            self._say(fraction=sum(stage.fraction for stage in stages) / len(self._stages), detail=detail)
            await self._gateway.set_loading(self._status.fraction)
        self._say(detail="")
        return await working

    async def _settle(self, stages: Sequence[LoadedStage]) -> Loaded:
        """What is served: the first time what the stages have loaded, and after a restart the same again.

        Raises:
            ValueError: a stage that has started since makes another version of it.
        """
        found = loaded_of(self._spec, stages)
        if self._spec.loaded is None:
            self._spec = replace(self._spec, loaded=found)
            await self._platform.record(self._spec)
            self._say(version=found.version)
        served = self._spec.loaded
        assert served is not None, "recorded above"
        if found.version != served.version:
            raise ValueError(f"the stages compute version {found.version}, and version {served.version} is served")
        return served

    async def _follow_links(self, seen: int) -> None:
        """Keep the status as the gateway's links are. Where the gateway is gone, a watch of its own tells."""
        while self._status.phase not in (ServicePhase.STOPPED, ServicePhase.BROKEN):
            try:
                seen = await self._take_link_news(seen)
            except Exception as error:
                log.info("the gateway does not tell of its links: %s", one_line(error))
                await asyncio.sleep(ANSWER_TIMEOUT_S)

    async def _take_link_news(self, seen: int) -> int:
        """Wait for other news than those seen, and say them; their number."""
        assert self._gateway is not None
        news = await self._gateway.link_news(seen)
        if self._status.phase not in (ServicePhase.STOPPED, ServicePhase.BROKEN):
            phase = ServicePhase.DEGRADED if news.trouble else ServicePhase.READY
            if phase is not self._status.phase:
                log.info("the service is %s%s", phase, f": {news.trouble}" if news.trouble else "")
            detail = f"{gateway_name(0)} has no link with {news.trouble}" if news.trouble else self._status.detail
            self._say(phase=phase, detail=detail, lost_links=news.lost)
        return news.number

    def _watch_silence(self, name: str, ask: Callable[[], Awaitable[object]], hang_limit_s: float) -> None:
        """Name a part that does not answer; beyond the limit the service is broken."""

        async def on_silence(silent_s: float) -> bool:
            if self._status.phase in (ServicePhase.STOPPED, ServicePhase.BROKEN):
                return False
            if not silent_s:
                self._silent.pop(name, None)
                return True
            if name not in self._silent:
                log.warning("%s does not answer", name)
            self._silent[name] = f"{name} has not answered for {silent_s:.0f} s"
            if silent_s > hang_limit_s:
                await self._break(self._silent[name])
                return False
            return True

        self._start(watch_answers(ask, on_silence))

    def _watch(self, gone: Callable[[], Awaitable[str]], part: str) -> None:
        """Turn the end of a part, told or not, into the service's status."""

        async def watch() -> None:
            try:
                reason = await gone()
            except Exception as error:
                reason = one_line(error)
            await self._break(f"{part}: {reason}")

        self._start(watch())

    def _start(self, job: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _break(self, reason: str) -> None:
        if self._status.phase in (ServicePhase.STOPPED, ServicePhase.BROKEN):
            return
        log.error("not serving: %s", reason)
        self._say(phase=ServicePhase.BROKEN, detail=reason)
        if self._gateway is not None:
            await _quietly(self._gateway.set_unavailable(reason), ANSWER_TIMEOUT_S)

    def _say(self, **changes: object) -> None:
        """What is over stays so, with its reason, whatever is still under way then; only a stop comes after."""
        is_over = self._status.phase in (ServicePhase.STOPPED, ServicePhase.BROKEN)
        if is_over and changes.get("phase") is not ServicePhase.STOPPED:
            changes = {name: value for name, value in changes.items() if name not in ("phase", "detail")}
        self._status = Status(**{**self._status.__dict__, **changes})


def loaded_of(spec: ServiceSpec, stages: Sequence[LoadedStage]) -> Loaded:
    """What the stages have loaded together, with the version that streams name. The folder is not looked at again.

    Raises:
        ValueError: see `combine_version`.
    """
    version = combine_version(
        files=spec.files,
        dtype=spec.dtype,
        digests=[stage.digests for stage in stages],
        numerics=[stage.numerics for stage in stages],
    )
    tensors = {name: digest for stage in stages for name, digest in stage.digests.items()}
    row_invariant = all(stage.row_invariant for stage in stages) and not spec.has_mixed_numerics
    return Loaded(version=version, row_invariant=row_invariant, tensors=tensors)


async def _answers(calls: Sequence[Awaitable[T]]) -> list[T]:
    """What comes back from those who live and are not hung."""
    timed = (asyncio.wait_for(call, ANSWER_TIMEOUT_S) for call in calls)
    answers = await asyncio.gather(*timed, return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _quietly(call: Awaitable[None], timeout_s: float) -> None:
    """A part that is gone or hung must not stop the rest from ending."""
    try:
        await asyncio.wait_for(call, timeout_s)
    except Exception as error:
        log.info("a part did not answer: %s", one_line(error))
