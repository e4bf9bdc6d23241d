"""Steps of chosen sizes through an empty pipeline: its scheduler knows from the first request on what they cost.

Each size goes through a scheduler of its own that is thrown away; the stages clear its blocks like anybody's. Sizes
double while more rows still pay and the time allows, so a slow model is measured at its smallest sizes only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from statistics import fmean, median

from tramontane.cluster.messages import Sampling, Stopping
from tramontane.cluster.pacing import WORTH_A_PASS
from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Sequence
from tramontane.cluster.step_cost import StepCosts, StepLoad

WARM_UP_S = 0.6
"""Nothing new is begun after that."""
FEW_TOKENS, MANY_TOKENS = 3, 10
"""Decode steps of a size: of the first, whose cost nobody knows, and of the others."""
STILL_PAYS = 1.05
"""Twice the rows must give so many times the tokens a second, or no larger size is tried."""

Run = Callable[[Scheduler], Awaitable[None]]


class Recording(StepCosts):
    """Keeps what every step took, by its size."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self._groups = groups
        self._steps: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)

    def observe(self, load: StepLoad, seconds: float) -> None:
        """A step of a full pipe has taken so long."""
        self._steps[load.decode_rows, load.prompt_rows].append((load.keys, seconds))

    def sizes(self) -> list[tuple[StepLoad, float]]:
        """Each size once, with what a step of it takes."""
        return [
            (StepLoad(decode_rows, prompt_rows, fmean(keys for keys, _ in steps)), self._step_s(steps))
            for (decode_rows, prompt_rows), steps in self._steps.items()
        ]

    def decode_s(self, rows: int) -> float | None:
        """A step of so many decode rows; None where there was none."""
        steps = self._steps.get((rows, 0))
        return self._step_s(steps) if steps else None

    def _step_s(self, steps: list[tuple[float, float]]) -> float:
        """The median over rounds: within one, results may come two at a time."""
        seconds, groups = [step_s for _, step_s in steps], min(self._groups, len(steps))
        return median(fmean(seconds[first : first + groups]) for first in range(len(seconds) - groups + 1))


class WarmUp:
    """Measures one pipeline. `run` takes a scheduler's sequences through the stages until all have ended."""

    def __init__(self, options: SchedulerOptions, stages: int, run: Run, clock: Callable[[], float]) -> None:
        self._options = replace(options, max_waiting=2**31, max_queue_wait_s=0.0, max_running=None)
        self._stages = stages
        self._groups = options.decode_groups or stages
        self._run = run
        self._clock = clock
        self._recording = Recording(self._groups)

    async def measure(self) -> list[tuple[StepLoad, float]]:
        """Loads and the seconds that a step of each took while the pipe was full."""
        end_s = self._clock() + WARM_UP_S
        chunk = self._options.layout.chunk
        await self._decode(1, FEW_TOKENS)
        for rows in sorted({min(chunk, WORTH_A_PASS), chunk}):
            if self._clock() < end_s - WARM_UP_S * 2 / 3:
                await self._prefill(rows)
        rows, before_s, begun_s = 1, self._recording.decode_s(1), self._clock()
        while before_s and rows <= self._most_rows and 2 * (self._clock() - begun_s) < end_s - self._clock():
            begun_s = self._clock()
            await self._decode(rows, MANY_TOKENS)
            step_s = self._recording.decode_s(rows)
            if step_s is None or (rows > 1 and 2 * before_s < STILL_PAYS * step_s):
                break
            rows, before_s = 2 * rows, step_s
        return self._recording.sizes()

    @property
    def _most_rows(self) -> int:
        """Of a step, such that half of the KV blocks are enough."""
        return min(self._options.max_batch_tokens, min(self._options.layout.pool_blocks) // (2 * self._groups))

    async def _decode(self, rows: int, tokens: int) -> None:
        await self._through([1] * (rows * self._groups), min(tokens, self._options.context - 1))

    async def _prefill(self, chunk: int) -> None:
        """As many chunks of one prompt as fill the pipe."""
        await self._through([min(chunk * (self._stages + 2), self._options.context - 1)], 1)

    async def _through(self, prompts: list[int], max_tokens: int) -> None:
        scheduler = Scheduler(self._options, stages=self._stages, costs=self._recording)
        sampling, stopping = Sampling(temperature=0.0), Stopping(max_tokens=max_tokens)
        for index, tokens in enumerate(prompts):
            sequence = Sequence(id=index, prompt=[0] * tokens, sampling=sampling, stopping=stopping)
            scheduler.add(sequence, now=0.0)
        await self._run(scheduler)
