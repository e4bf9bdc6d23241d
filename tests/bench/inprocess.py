"""Our scheduler and stages in one process: no router's event loop, no links, no gRPC, no Ray.

`schedule` decides, the stages compute one after another, `update` takes the result in. With several stages as many
microbatches are in flight as in a pipeline, so each of them is what a router would have sent; only their computing does
not overlap. What comes out is the floor for everything around the stages.

As a program it is a contestant (`contestants.py` says what a job and its result are): one stage, all threads.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bench.workloads import Workload
from tramontane.cluster.kv_plan import KVOptions, KVPlanner
from tramontane.cluster.messages import Sampling, Stopping
from tramontane.cluster.scheduler import Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Sequence
from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Microbatch, StepResult
from tramontane.stages.split import split_as
from tramontane.stages.stage import Stage

EPOCH = 1
CHUNK, MAX_BATCH_TOKENS, MAX_WAITING = 512, 1024, 1024
"""As `tramontane serve` has them by default."""

OnStep: TypeAlias = Callable[[Microbatch, list[memoryview]], None]


@dataclass
class Run:
    """How one workload went."""

    wall_s: float = 0.0
    first_s: float = 0.0
    """Until every request had its first token."""
    tokens: list[list[int]] = field(default_factory=list)
    """Generated, by request."""


def load_stage(
    model_dir: Path, config: ModelConfig, span: range, dtype: str, quantize: str | None = None, device: str = "cpu"
) -> Stage:
    """One stage; `quantize` is passed on where stages take it.

    Raises:
        SystemExit: they do not.
    """
    options: dict[str, Any] = {}
    if quantize:
        if "quantize" not in inspect.signature(Stage.load).parameters:
            raise SystemExit(f"--quantize {quantize}: the stages of this version take no quantize")
        options["quantize"] = quantize
    return Stage.load(config, model_dir, span, dtype=dtype, device=device, **options)


def serving_layout(config: ModelConfig, spans: tuple[range, ...], dtype: str) -> KVLayout:
    """What `tramontane serve` would plan."""
    return KVPlanner(config, spans, dtype, KVOptions()).plan().layout


class InProcess:
    """Plays router and links for stages that it has loaded and bound."""

    def __init__(
        self,
        model_dir: Path,
        dtype: str,
        *,
        split: tuple[int, ...] | None = None,
        quantize: str | None = None,
        device: str = "cpu",
    ) -> None:
        config = ModelConfig.load(model_dir)
        spans = split_as(config, split or (config.layers,))
        self.config = config
        self.layout = serving_layout(config, spans, dtype)
        self.stages = [load_stage(model_dir, config, span, dtype, quantize, device) for span in spans]
        for stage in self.stages:
            stage.bind(EPOCH, self.layout, config.context, MAX_BATCH_TOKENS)
        options = SchedulerOptions(
            layout=self.layout,
            context=config.context,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_waiting=MAX_WAITING,
        )
        self._scheduler = Scheduler(options, stages=len(spans))
        self._next_step = 0
        self._next_id = 0

    def run(self, workload: Workload, on_step: OnStep | None = None) -> Run:
        """All of its requests. `on_step` hears each microbatch with the rows that later stages got."""
        run, first_id = Run(tokens=[[] for _ in workload.prompts]), self._next_id
        sampling, stopping = Sampling(temperature=0.0), Stopping(max_tokens=workload.new_tokens)
        begin, missing = time.perf_counter(), len(workload.prompts)
        for prompt in workload.prompts:
            sequence = Sequence(id=self._next_id, prompt=prompt, sampling=sampling, stopping=stopping)
            self._scheduler.add(sequence, now=begin)
            self._next_id += 1
        in_flight: deque[Microbatch] = deque()
        while self._fill(in_flight):
            for emitted in self._scheduler.update(self._step(in_flight.popleft(), on_step), time.perf_counter()):
                assert emitted.token is not None, f"request {emitted.sequence}: logits are not finite"
                run.tokens[emitted.sequence - first_id].append(emitted.token)
                missing -= emitted.offset == 0
                if emitted.offset == 0 and not missing:
                    run.first_s = time.perf_counter() - begin
        run.wall_s = time.perf_counter() - begin
        return run

    def _fill(self, in_flight: deque[Microbatch]) -> bool:
        """Send what may be sent; one stage is given one microbatch at a time, since nothing else works meanwhile."""
        most = len(self.stages) + 1 if len(self.stages) > 1 else 1
        while len(in_flight) < most:
            microbatch = self._scheduler.schedule(EPOCH, self._next_step, time.perf_counter())
            if microbatch is None:
                break
            in_flight.append(microbatch)
            self._next_step += 1
        return bool(in_flight)

    def _step(self, microbatch: Microbatch, on_step: OnStep | None) -> StepResult:
        passed: list[memoryview] = []
        for stage in self.stages:
            if passed:
                stage.inbox(len(microbatch.tokens))[:] = passed[-1]
            answer = stage.step(microbatch)
            if isinstance(answer, memoryview):
                passed.append(answer)
        if on_step is not None:
            on_step(microbatch, passed)
        assert isinstance(answer, StepResult)
        return answer


def main() -> None:
    """Read a job, run it, print the result."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    ours = InProcess(Path(job["model"]), job["dtype"], quantize=job["quantize"], device=job["device"])
    ours.run(Workload.from_json(job["warm_up"]))
    runs = {values["name"]: asdict(ours.run(Workload.from_json(values))) for values in job["workloads"]}
    print(json.dumps({"about": ours.stages[0].numerics, "runs": runs}))


if __name__ == "__main__":
    main()
