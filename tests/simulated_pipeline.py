"""A pipeline of stages whose steps cost what a formula says, on a clock that is a number: the scheduler under load.

Tokens are zeros; what counts is who is let in, who is refused and when things happen. The router's own time is
nothing.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tramontane.cluster.admission import Refused
from tramontane.cluster.messages import EndReason, Stopping
from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Sequence
from tramontane.cluster.step_cost import StepCost, StepCosts, StepLoad
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Microbatch, StepResult

CONTEXT = 4096
CHUNK = 128
COST = StepCost(base_s=0.002, decode_row_s=0.0001, prompt_row_s=0.00005, key_s=0.0)
LOADS = [StepLoad(*load) for load in ((1, 0, 1), (64, 0, 64), (0, 128, 0), (8, 64, 9))]
MEASURED = [(load, COST.seconds(load)) for load in LOADS]


@dataclass(eq=False)
class Request:
    """What a user asks for, and what became of it."""

    arrived_s: float
    prompt: int
    max_tokens: int
    timeout_s: float | None = None
    output: int | None = None
    """Tokens after which it stops by itself."""
    first_s: float | None = None
    ended_s: float | None = None
    refused: Refused | None = None
    estimated_s: float | None = None
    """Its wait, as it was estimated when it came."""
    late: bool = False
    """Its deadline passed while it was served."""
    tokens_s: list[float] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.ended_s is not None and not self.late

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.arrived_s


class SimulatedStages:
    """A step leaves a stage when the stage is free and the step before it has left; each costs every stage the same."""

    def __init__(self, cost: StepCost, stages: int) -> None:
        self.cost = cost
        self.pipe: deque[tuple[float, Microbatch]] = deque()
        """When each microbatch comes back."""
        self._free_s = [0.0] * stages

    def send(self, microbatch: Microbatch, load: StepLoad, now: float) -> None:
        leaves_s, seconds = now, self.cost.seconds(load)
        for stage, free_s in enumerate(self._free_s):
            leaves_s = self._free_s[stage] = max(leaves_s, free_s) + seconds
        self.pipe.append((leaves_s, microbatch))


def zeros(microbatch: Microbatch) -> StepResult:
    """Token 0 for each row that is sampled."""
    rows = len(microbatch.sampled.row)
    return StepResult(
        epoch=microbatch.epoch,
        step=microbatch.step,
        token=np.zeros(rows, np.int32),
        log_probability=np.zeros(rows, np.float32),
        finite=np.ones(rows, np.bool_),
        score=np.empty(0, np.float32),
    )


class SimulatedPipeline:
    """Runs requests through a real scheduler until all have ended."""

    def __init__(
        self,
        *,
        stages: int = 2,
        pool_blocks: int = 16_384,
        slowness: float = 1.0,
        measured: bool = True,
        max_waiting: int = 1024,
        max_queue_wait_s: float = 2.0,
        max_running: int | None = None,
        max_step_s: float | None = None,
        max_batch_tokens: int = 1024,
    ) -> None:
        layout = KVLayout(block=32, chunk=CHUNK, windows=(None,), rings=(CONTEXT // 32,), pool_blocks=(pool_blocks,))
        self.options = SchedulerOptions(
            layout=layout,
            context=CONTEXT,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            max_queue_wait_s=max_queue_wait_s,
            max_running=max_running,
            max_step_s=max_step_s,
        )
        self.costs = StepCosts()
        if measured:
            self.costs.warmed_up(MEASURED)
        cost = StepCost(*(slowness * seconds for seconds in COST))
        self._stages = SimulatedStages(cost, stages)
        self._pipe = self._stages.pipe
        self.scheduler = Scheduler(self.options, stages=stages, costs=self.costs)
        self.loads: list[tuple[StepLoad, bool]] = []
        """Of each microbatch, and whether others were decoding."""
        self.now = 0.0
        self._requests: dict[int, Request] = {}
        self._ids = itertools.count()
        self._step = 0

    def run(self, requests: list[Request], until_s: float = 1e9) -> None:
        """All of these, each at its time, and those that were left before."""
        arrivals = deque(sorted(requests, key=lambda each: each.arrived_s))
        deadlines: list[tuple[float, int]] = []
        while arrivals or self._pipe:
            events = [self._pipe[0][0]] if self._pipe else []
            events += [arrivals[0].arrived_s] if arrivals else []
            events += [deadlines[0][0]] if deadlines else []
            self.now = max(self.now, min(events))
            if self.now > until_s:
                return
            while deadlines and deadlines[0][0] <= self.now:
                _, sequence = heapq.heappop(deadlines)
                if sequence in self._requests:
                    self._requests.pop(sequence).late = True
                    self.scheduler.cancel(sequence)
            while arrivals and arrivals[0].arrived_s <= self.now:
                request = arrivals.popleft()
                sequence = self._submit(request)
                if sequence is not None and request.timeout_s is not None:
                    heapq.heappush(deadlines, (request.arrived_s + request.timeout_s, sequence))
            while self._pipe and self._pipe[0][0] <= self.now:
                self._take_in(self._pipe.popleft()[1])
            self._fill()
        assert not self._requests, f"{len(self._requests)} requests were forgotten"

    def _submit(self, request: Request) -> int | None:
        deadline_s = None if request.timeout_s is None else request.arrived_s + request.timeout_s
        sequence = Sequence(
            id=next(self._ids),
            prompt=[0] * request.prompt,
            stopping=Stopping(max_tokens=request.max_tokens),
            arrived_s=self.now,
            deadline_s=deadline_s,
        )
        self._requests[sequence.id] = request
        try:
            self.scheduler.add(sequence, self.now)
        except Refused as refusal:
            self._requests.pop(sequence.id).refused = refusal
            self._turn_away()
            return None
        request.estimated_s = sequence.estimated_wait_s
        self._turn_away()
        return sequence.id

    def _turn_away(self) -> None:
        for sequence, refusal in self.scheduler.turned_away():
            self._requests.pop(sequence).refused = refusal

    def _fill(self) -> None:
        while (microbatch := self.scheduler.schedule(1, self._step, self.now)) is not None:
            self._step += 1
            load = self.scheduler._in_flight[-1].load
            self.loads.append((load, bool(self.scheduler._roster.decoding)))
            self._stages.send(microbatch, load, self.now)
        self._turn_away()

    def _take_in(self, microbatch: Microbatch) -> None:
        for item in self.scheduler.update(zeros(microbatch), self.now):
            request = self._requests[item.sequence]
            request.tokens_s.append(self.now)
            request.first_s = request.tokens_s[0]
            stops = request.output == len(request.tokens_s)
            if stops and item.end is None:  # as a gateway does at a stop string
                self.scheduler.cancel(item.sequence, completed=True)
            if stops or item.end is EndReason.LENGTH:
                self._requests.pop(item.sequence).ended_s = self.now


def poisson(rate: float, seconds: float, seed: int = 0, **values: object) -> list[Request]:
    """Arrivals of an open loop; prompts of 32 to 256 tokens, 64 tokens out."""
    dice, at_s, requests = random.Random(seed), 0.0, []
    while (at_s := at_s + dice.expovariate(rate)) < seconds:
        options = {"prompt": dice.randint(32, 256), "max_tokens": 64, "timeout_s": 10.0} | values
        requests.append(Request(arrived_s=at_s, **options))
    return requests
