"""One command's runs against one server: connect, measure the generator's ceiling, run, check the answers, assess.

Ctrl-C ends a run early: what it has measured until then is reported all the same. A second one gives up.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.generator.asking_again import Again, ask_again
from tramontane.client.loadtest.generator.ceiling import measure_ceiling
from tramontane.client.loadtest.generator.counting import count_tokens
from tramontane.client.loadtest.generator.faults import Fault
from tramontane.client.loadtest.generator.observation import Generator, observe
from tramontane.client.loadtest.generator.target import Target, open_target
from tramontane.client.loadtest.judging.agreement import across_levels, pair
from tramontane.client.loadtest.judging.assessment import Setting, assess
from tramontane.client.loadtest.judging.checks import check, disagreement
from tramontane.client.loadtest.judging.server_view import machine
from tramontane.client.loadtest.load.counting import check_fit, uncertain
from tramontane.client.loadtest.load.schedule import Schedule
from tramontane.client.loadtest.load.workload import Workload
from tramontane.client.loadtest.plan import Conduct, Plan
from tramontane.client.loadtest.progress import Progress
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import Checks, Objective, RunResult, SweepResult, TargetInfo
from tramontane.client.loadtest.search import Search


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants of every run of the command."""

    command: str
    generator: Generator
    workload: str
    """Words for the report."""
    objectives: tuple[Objective, ...]
    faults: tuple[Fault, ...] = ()
    alone: int = 16
    """Requests that are asked again alone after the run."""
    texts: int = 1000
    """Completions whose text is held against their ids, at most."""
    with_ceiling: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: what was planned, what came, and what it means."""

    plan: Plan
    records: tuple[Record, ...]
    result: RunResult


class Session:
    """A connected server and what stays the same over the runs. `open_session` makes it."""

    def __init__(self, wishes: Wishes, target: Target, setting: Setting, progress: Progress) -> None:
        self._wishes = wishes
        self._target = target
        self._setting = setting
        self._progress = progress
        self._stopping = asyncio.Event()
        self._counts: dict[str, int] = {}

    @property
    def info(self) -> TargetInfo:
        """The model that is served."""
        return self._setting.target

    @property
    def stopped(self) -> bool:
        """The user wants no more."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End the run that goes on, early but in good order."""
        self._progress.say("stopping; once more to give up")
        self._stopping.set()

    async def plan(self, schedule: Schedule, workload: Workload) -> Plan:
        """The schedule's requests. Raises ValueError where the workload does not fit the model."""
        counts = await self.count(schedule.texts_to_count(workload, self.info))
        plan = schedule.plan(workload, self.info, counts)
        context = self.info.context_tokens
        texts = uncertain(((a.prompt, a.max_tokens) for a in plan.asks if a.conduct is not Conduct.BAD), context)
        check_fit(plan.asks, await self.count(texts), context)
        return plan

    async def count(self, texts: Sequence[str]) -> Mapping[str, int]:
        """How many tokens each text is to the server; none of them where it has no tokenizer to ask."""
        new = [text for text in texts if text not in self._counts] if self.info.has_tokenizer else []
        if new and self.info.kind == "grpc":
            self._progress.say(f"counting the tokens of {len(new):,} text{'s' * (len(new) > 1)}")
            self._counts |= await count_tokens(new, self._target)
        return self._counts

    async def run(self, plan: Plan, *, alone: int | None = None) -> Run:
        """Carry out one plan. Raises what `observe` does."""
        wishes = self._wishes
        seen = await observe(plan, wishes.generator, self._target, wishes.faults, self._progress, self._stopping)
        checks = await self._check(plan, seen.records, wishes.alone if alone is None else alone)
        return Run(plan=plan, records=seen.records, result=assess(plan, seen, self._setting, checks))

    async def sweep(self, search: Search, plan_at: Callable[[float], Awaitable[Plan]]) -> tuple[SweepResult, list[Run]]:
        """Run one rate after another until the highest that keeps all objectives is known.

        A rate holds when every objective is met, the open requests did not pile up, and the generator kept up.
        """
        runs: list[Run] = []
        ended_by = ""
        while (rate := search.next_rate()) is not None and not ended_by:
            try:
                # Later levels are compared with the first, which is compared with requests alone.
                run = await self.run(await plan_at(rate), alone=0 if runs else None)
            except ConnectionError as error:
                if not runs:
                    raise
                ended_by = f"the sweep ended at {rate:.4g} requests/s: {error}"
                break
            runs.append(run)
            invalid = [each.text for each in run.result.findings if each.severity is Severity.INVALID]
            if self.stopped:
                ended_by = f"stopped by its user at {rate:.4g} requests/s"
            elif invalid and not run.result.counts.mostly_unserved:
                ended_by = f"nothing is known from {rate:.4g} requests/s on: {invalid[0]}"
            else:
                holds = keeps(run.result)
                search.learn(rate, holds=holds)
                said = "holds" if holds else "does not hold"
                self._progress.say(f"{rate:.4g} requests/s {said}: {_figures(run.result)}")
        runs.sort(key=lambda run: run.result.load.rate or 0.0)
        sweep = SweepResult(
            levels=tuple(run.result for run in runs),
            objectives=self._wishes.objectives,
            best_rate=search.held,
            first_missed_rate=search.missed,
            findings=_sweep_findings(runs, search, self.info, ended_by),
        )
        return sweep, runs

    async def _check(self, plan: Plan, records: Sequence[Record], alone: int) -> Checks:
        asked = pair(plan.asks, records)
        if not self.info.tells_token_ids:
            # Only what records say by themselves: whether what had to be refused was.
            return check(asked, Again(), must_match=False)
        self._progress.say("checking the answers")
        texts = self._wishes.texts if self.info.has_tokenizer else 0
        asking = asyncio.create_task(ask_again(asked, self._target, alone=alone, texts=texts, seed=plan.load.seed))
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({asking, stop}, return_when=asyncio.FIRST_COMPLETED)
            again = asking.result() if asking.done() else Again()
        finally:
            asking.cancel()
            stop.cancel()
            await asyncio.gather(asking, stop, return_exceptions=True)
        return check(asked, again, must_match=self.info.row_invariant)


@asynccontextmanager
async def open_session(wishes: Wishes, progress: Progress) -> AsyncIterator[Session]:
    """Connect, and measure the generator's ceiling where it is wanted.

    Raises:
        ConnectionError: the server does not answer, or does not serve the model.
        ValueError, OSError: see `open_target`.
    """
    target = open_target(wishes.generator.target)
    try:
        info = await target.describe()
        progress.say(f"{info.model} at {info.address}")
        ceiling = None
        if wishes.with_ceiling:
            progress.say("measuring the generator's own ceiling")
            ceiling = await measure_ceiling(workers=wishes.generator.workers, http=wishes.generator.target.is_http)
        setting = Setting(
            command=wishes.command,
            target=info,
            workload=wishes.workload,
            objectives=wishes.objectives,
            ceiling=ceiling,
            machine=machine(),
            generator=wishes.generator,
        )
        session = Session(wishes, target, setting, progress)
        with _signals(session.stop):
            yield session
    finally:
        await target.close()


def keeps(result: RunResult) -> bool:
    """Whether a run's rate holds. An objective that nothing was measured for is not kept."""
    return all(kept.met for kept in result.objectives) and result.stationary is not False


def _figures(result: RunResult) -> str:
    values = [(kept.objective, kept.value_ms) for kept in result.objectives]
    return "; ".join(
        f"{each.measure} p{each.q * 100:g} {'infinite' if ms is None else f'{ms:.0f} ms'}" for each, ms in values
    )


def _sweep_findings(runs: Sequence[Run], search: Search, info: TargetInfo, ended_by: str) -> tuple[Finding, ...]:
    levels = {f"{run.result.load.rate:.6g}/s": (run.plan.asks, run.records) for run in runs}
    same = across_levels(levels)
    found = [*disagreement("got other tokens at another level", same, must_match=info.row_invariant)]
    if ended_by:
        text = f"{ended_by}; the best rate is what was known by then"
        severity = Severity.NOTE if search.held is not None else Severity.INVALID
        found.append(Finding(severity=severity, text=text))
    elif search.held is None and search.missed is not None:
        text = f"the lowest rate, {search.lowest:g} requests/s, does not hold: begin lower, or loosen the objectives"
        found.append(Finding(severity=Severity.MISSED, text=text))
    elif search.missed is None and search.held is not None:
        text = f"every rate up to {search.held:g} requests/s holds: the limit lies higher"
        found.append(Finding(severity=Severity.NOTE, text=text))
    return tuple(found)


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP calls `stop`; the next one cancels, so that whatever must be undone is."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "a session is opened by a task"
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def first() -> None:
        for number in signals:
            loop.add_signal_handler(number, task.cancel)
        stop()

    for number in signals:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
