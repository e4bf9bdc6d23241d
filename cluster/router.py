"""The router of one pipeline: takes requests from gateways, streams microbatches through the stages, sends tokens back.

Tokens only, one event loop. What goes into a microbatch is the scheduler's decision; here stand the links, the clocks
and who is told what.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from tramontane.cluster.address import Address
from tramontane.cluster.admission import RefusalReason
from tramontane.cluster.async_link import AsyncLink, AsyncListener
from tramontane.cluster.desk import Desk
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Hello, Role
from tramontane.cluster.reasons import one_line
from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.site import Site
from tramontane.cluster.stats import AdmissionCounters, RouterCounters
from tramontane.cluster.step_cost import StepCosts
from tramontane.cluster.step_watch import Progress, StepWatch
from tramontane.cluster.warm_up import WarmUp
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import StepResult

log = logging.getLogger(__name__)

BIND_TIMEOUT_S = 60.0
LOOK_S, NAME_TIMEOUT_S = 0.5, 0.5
"""How often the pipeline's pace is looked at, and how long a stage may take to say how far it is."""


class StagePort(Protocol):
    """A stage worker seen from its router; the controller's view of it is `parts.StageControl`."""

    async def address(self) -> Address:
        """Where upstream dials."""
        ...

    async def epoch(self) -> int:
        """The highest epoch that it was bound at."""
        ...

    async def bind(self, epoch: int, layout: KVLayout, context: int, max_tokens: int, downstream: Address) -> None:
        """Start anew at a higher epoch, with an empty KV pool."""

    async def stepped(self) -> int:
        """Steps that it is done with at the epoch that it is bound at."""
        ...

    async def run(self, epoch: int) -> str:
        """Stream microbatches until a link closes; the reason."""
        ...


class Router:
    """Owns the sequences of one pipeline and all that is known about them."""

    def __init__(
        self, name: str, site: Site, stages: Sequence[StagePort], options: SchedulerOptions, hang_limit_s: float
    ) -> None:
        self._name = name
        self._site = site
        self._stages = stages
        self._options = options
        self._costs = StepCosts()
        self._scheduler = Scheduler(options, stages=len(stages), costs=self._costs)
        self._wake = asyncio.Event()
        self._desk = Desk(self._scheduler, self._wake.set)
        self._listener = AsyncListener(name, site, self._on_link)
        self._epoch = 0
        self._step = 0
        self._step_watch = StepWatch(len(stages), hang_limit_s)
        self._late = ""
        self._results: asyncio.Future[AsyncLink] = asyncio.get_running_loop().create_future()
        self._broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []

    async def bind(self) -> Address:
        """Bind all stages at an epoch higher than any they have seen, and serve. Answers where gateways may dial.

        Raises:
            RuntimeError: a stage died, refused or did not answer. The router is broken then; its reason is the message.
        """
        assert not self._tasks, "a router binds once"
        try:
            async with asyncio.timeout(BIND_TIMEOUT_S):
                await self._bind()
        except TimeoutError:
            self._break(f"the stages did not bind within {BIND_TIMEOUT_S:.0f} s")
        except Exception as error:
            self._break(one_line(error))
        if self.is_broken:
            raise RuntimeError(self._broken.result())
        log.info("%s serves %d stages at epoch %d", self._name, len(self._stages), self._epoch)
        return self.address

    async def _bind(self) -> None:
        await self._listener.start()
        self._epoch = 1 + max(await asyncio.gather(*(stage.epoch() for stage in self._stages)))
        addresses = await asyncio.gather(*(stage.address() for stage in self._stages))
        options = self._options
        await asyncio.gather(
            *(
                stage.bind(self._epoch, options.layout, options.context, options.max_batch_tokens, downstream)
                for stage, downstream in zip(self._stages, [*addresses[1:], self._listener.address], strict=True)
            )
        )
        if self.is_broken:  # closed meanwhile
            return
        for index, stage in enumerate(self._stages):
            self._start(self._watch(index, stage.run(self._epoch)))
        downlink = await AsyncLink.dial(
            addresses[0],
            self._site,
            role=Role.ROUTER,
            name=self._name,
            epoch=self._epoch,
            timeout_s=BIND_TIMEOUT_S,
        )
        warm_up = asyncio.get_running_loop().create_task(self._warm_up(downlink))
        ready: set[asyncio.Future[Any]] = {warm_up, self._broken}
        try:
            await asyncio.wait(ready, return_when=asyncio.FIRST_COMPLETED)
            if not self.is_broken:
                await warm_up
        except BaseException:
            downlink.close()
            raise
        finally:
            warm_up.cancel()
        if self.is_broken:
            downlink.close()
            return
        uplink = self._results.result()
        self._start(self._send_microbatches(downlink))
        self._start(self._receive_results(uplink, downlink))
        self._start(self._desk.report_load())
        self._start(self._watch_steps())

    async def _warm_up(self, downlink: AsyncLink) -> None:
        """Wait for the last stage's link, and measure what steps cost before anybody waits for one."""
        loop, uplink = asyncio.get_running_loop(), await asyncio.shield(self._results)

        async def run(scheduler: Scheduler) -> None:
            while scheduler.outstanding_tokens:
                while (microbatch := scheduler.schedule(self._epoch, self._step, loop.time())) is not None:
                    self._step += 1
                    downlink.post(microbatch)
                result = await uplink.receive()
                assert isinstance(result, StepResult), f"the last stage sent {type(result).__name__}"
                scheduler.update(result, loop.time())

        started_s = loop.time()
        steps = await WarmUp(self._options, len(self._stages), run, loop.time).measure()
        self._costs.warmed_up(steps)
        log.info(
            "%s measured %d sizes in %.2f s: %s", self._name, len(steps), loop.time() - started_s, self._costs.cost
        )

    @property
    def address(self) -> Address:
        """Where gateways may dial."""
        return self._listener.address

    @property
    def is_broken(self) -> bool:
        """Whether the pipeline has broken; it will not serve again."""
        return self._broken.done()

    async def broken(self) -> str:
        """Wait until the pipeline has broken; the reason as one line."""
        return await asyncio.shield(self._broken)

    def stats(self) -> RouterCounters:
        """Counters since the router started."""
        scheduler = self._scheduler
        return RouterCounters(
            name=self._name.removeprefix("router-"),
            microbatches=scheduler.microbatches,
            tokens=scheduler.tokens,
            prompt_tokens=scheduler.prompt_tokens,
            completion_tokens=scheduler.completion_tokens,
            preemptions=scheduler.preemptions,
            waiting=scheduler.waiting,
            running=scheduler.running,
            in_flight_microbatches=scheduler.in_flight,
            kv_blocks_used=tuple(scheduler.used_blocks),
            kv_blocks_total=tuple(scheduler.total_blocks),
            admission=self._admission_counters(),
            late=self._late,
        )

    def _admission_counters(self) -> AdmissionCounters:
        refused, capacity = self._desk.refused, self._scheduler.capacity
        measured = capacity.cost is not None
        return AdmissionCounters(
            refused_queue_full=refused[RefusalReason.QUEUE_FULL],
            refused_queue_wait=refused[RefusalReason.QUEUE_WAIT],
            refused_deadline=refused[RefusalReason.DEADLINE],
            estimated_wait_s=self._scheduler.estimated_wait_s(asyncio.get_running_loop().time()),
            seats=capacity.seats,
            decode_step_s=capacity.decode_step_s if measured else None,
            max_step_s=capacity.max_step_s if measured else None,
            prompt_row_s=capacity.cost.prompt_row_s if capacity.cost is not None else None,
        )

    async def close(self) -> None:
        """Close all links; requests that are still open end as broken."""
        self._break("the router was closed", logging.INFO)
        await self._listener.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send_microbatches(self, downlink: AsyncLink) -> None:
        """Whenever something has changed by itself, send all that may go."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._launch(downlink, asyncio.get_running_loop().time())
                self._desk.turn_away()
        finally:
            downlink.close()

    def _launch(self, downlink: AsyncLink, now: float) -> None:
        """Send all microbatches that may go. Those in flight are few, so nothing has to wait for the socket."""
        try:
            while (microbatch := self._scheduler.schedule(self._epoch, self._step, now)) is not None:
                self._step += 1
                downlink.post(microbatch)
                self._desk.mark_started(microbatch)
        except LinkClosed as error:
            # A turn later, so that the tokens of the step before still go out.
            asyncio.get_running_loop().call_soon(self._break, f"link to stage 0: {error}")

    async def _receive_results(self, uplink: AsyncLink, downlink: AsyncLink) -> None:
        """The main loop. The stages' next work leaves before anybody hears of the tokens: stages wait for it alone."""
        try:
            while True:
                result = await uplink.receive()
                assert isinstance(result, StepResult), f"the last stage sent {type(result).__name__}"
                assert result.epoch == self._epoch, f"result of epoch {result.epoch}, bound at {self._epoch}"
                now = asyncio.get_running_loop().time()
                self._step_watch.came_back(self._scheduler.in_flight_load)
                emitted = self._scheduler.update(result, now)
                self._launch(downlink, now)
                self._desk.deliver(emitted)
                self._desk.turn_away()
        except LinkClosed as error:
            self._break(f"link from the last stage: {error}")
        finally:
            uplink.close()

    async def _watch_steps(self) -> None:
        """A stage that hangs says nothing and closes nothing. A late one is named, and nothing ends yet."""
        loop, scheduler = asyncio.get_running_loop(), self._scheduler
        while True:
            await asyncio.sleep(LOOK_S)
            load = scheduler.in_flight_load if scheduler.in_flight else None
            progress, waited_s = self._step_watch.look(loop.time(), scheduler.waiting_since_s, load, self._costs.cost)
            if progress is Progress.FINE:
                self._late = ""
            elif not self._late:
                self._late = await self._name_late(self._step - scheduler.in_flight)
                log.warning("%s: %s, for %.1f s", self._name, self._late, waited_s)
            elif progress is Progress.HUNG:
                self._break(f"{self._late}, for {waited_s:.0f} s")
                return

    async def _name_late(self, step: int) -> str:
        """The first stage that is not done with a step, or cannot say; as a sentence."""
        asked = (asyncio.wait_for(stage.stepped(), NAME_TIMEOUT_S) for stage in self._stages)
        for index, stepped in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
            if isinstance(stepped, BaseException):
                return f"stage {index} does not answer"
            if stepped <= step:
                return f"stage {index} is late with step {step}"
        return f"the result of step {step} does not arrive"

    async def _watch(self, index: int, run: Awaitable[str]) -> None:
        """A stage's run ends when its links close, or fails when its process dies."""
        try:
            reason = await run
        except Exception as error:
            reason = one_line(error)
        self._break(f"stage {index}: {reason}")

    async def _on_link(self, link: AsyncLink, hello: Hello) -> None:
        """A dialler has passed the handshake: the last stage, or a gateway."""
        if hello.role is Role.GATEWAY and not self._broken.done():
            await self._desk.serve(link, hello.name)
        elif hello.role is Role.STAGE and hello.epoch == self._epoch and not self._results.done():
            self._results.set_result(link)
            await self.broken()
        else:
            log.warning("%s refused %s of epoch %d at epoch %d", self._name, hello.name, hello.epoch, self._epoch)

    def _start(self, job: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await job
            except Exception as error:  # a mistake of ours: say so and end requests rather than leave them waiting
                log.exception("%s failed", self._name)
                self._break(one_line(error))

        self._tasks.append(asyncio.get_running_loop().create_task(run()))

    def _break(self, reason: str, level: int = logging.ERROR) -> None:
        """End everything once; what comes later follows from it and is not told."""
        if self._broken.done():
            return
        log.log(level, "%s ends: %s", self._name, reason)
        self._broken.set_result(reason)
        self._desk.break_all(reason)
        self._scheduler.restart()  # what is in flight will not come back
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
