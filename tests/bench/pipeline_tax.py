"""What two stages lose to everything between them, and how much of each stage a split in whole layers can use.

The floor is a replay: a run of ours in process writes down every microbatch and the rows that entered each stage; then
two processes, a stage and a thread each, compute their steps back to back, both at once and with nothing between them.
They share memory bandwidth as a pipeline's stages do, and wait for nobody. A pipeline that keeps its stages busy takes
as long as the slower of the two.

Stages are seldom even, since layers are whole and the head goes to the last. The best split keeps its costliest stage
always busy and the others in proportion.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.children import children, in_child
from bench.inprocess import EPOCH, MAX_BATCH_TOKENS, InProcess, load_stage, serving_layout
from bench.workloads import Workload
from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Microbatch
from tramontane.stages.split import split_as, split_layers

STAGES = 2
WARM_UP_STEPS = 4
Steps = list[tuple[Microbatch, bytes | None]]


@dataclass(frozen=True)
class Replay:
    """Seconds that each stage's steps took, computed back to back."""

    split: tuple[int, ...]
    stage_s: tuple[float, ...]

    @property
    def floor_s(self) -> float:
        """No pipeline of these stages is quicker."""
        return max(self.stage_s)


@dataclass(frozen=True)
class SplitBound:
    """How even stages of whole layers can be."""

    split: tuple[int, ...]
    busy: tuple[float, ...]
    """The most that each stage can be busy."""

    @property
    def mean(self) -> float:
        """Over the stages."""
        return statistics.fmean(self.busy)


def best_split(split: Sequence[int], stage_s: Sequence[float]) -> SplitBound:
    """The best cut into as many stages, by what a layer and the head were measured to cost.

    Layers take 1 s each at the first stage, so 1 s of the last one's 3 s is the head: 5 and 3 layers take 5 s and 4 s.

    >>> best_split([6, 2], [6.0, 3.0])
    SplitBound(split=(5, 3), busy=(1.0, 0.8))
    """
    layers, stages = sum(split), len(split)
    layer_s = sum(stage_s[:-1]) / sum(split[:-1])
    head_s = max(0.0, stage_s[-1] - split[-1] * layer_s)

    def costs(last: int) -> tuple[tuple[int, ...], list[float]]:
        rest, others = layers - last, stages - 1
        counts = (*(rest // others + (index < rest % others) for index in range(others)), last)
        return counts, [count * layer_s for count in counts[:-1]] + [last * layer_s + head_s]

    counts, seconds = min((costs(last) for last in range(1, layers - stages + 2)), key=lambda each: max(each[1]))
    return SplitBound(counts, tuple(round(second / max(seconds), 4) for second in seconds))


class Recording:
    """A run written down, to be replayed in any round. A context manager: its files go when it is left."""

    def __init__(self, model: Path, dtype: str, workload: Workload, quantize: str | None = None) -> None:
        self._model, self._dtype, self._quantize = model, dtype, quantize
        config = ModelConfig.load(model)
        self.spans = split_layers(config, STAGES)
        self.split = tuple(len(span) for span in self.spans)
        self._layout = serving_layout(config, self.spans, dtype)
        self._folder = tempfile.TemporaryDirectory(prefix="tramontane-replay-")
        self._files = [Path(self._folder.name) / f"stage-{index}" for index in range(STAGES)]
        in_child(_record, model, dtype, workload, self.split, self._files, quantize)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def replay(self) -> Replay:
        """All stages at once, each in a process of its own with one thread."""
        context = children()
        together, answers = context.Barrier(STAGES), context.SimpleQueue()
        common = (self._model, self._dtype, self._quantize, self.split, self._layout, together, answers)
        processes = [
            context.Process(target=_replay, args=(index, file, *common)) for index, file in enumerate(self._files)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, f"a replayed stage ended with {process.exitcode}"
        seconds = dict(answers.get() for _ in processes)
        return Replay(self.split, tuple(seconds[index] for index in range(STAGES)))


def _record(model: Path, dtype: str, workload: Workload, split: tuple[int, ...], files: list[Path], quantize: Any):
    torch.set_num_threads(STAGES)
    steps: list[Steps] = [[] for _ in split]

    def note(microbatch: Microbatch, passed: list[memoryview]) -> None:
        for stage, rows in enumerate([None, *map(bytes, passed)]):
            steps[stage].append((microbatch, rows))

    InProcess(model, dtype, split=split, quantize=quantize).run(workload, note)
    for file, of_stage in zip(files, steps, strict=True):
        file.write_bytes(pickle.dumps(of_stage))


def _replay(
    index: int,
    file: Path,
    model: Path,
    dtype: str,
    quantize: str | None,
    split: tuple[int, ...],
    layout: KVLayout,
    together: Any,
    answers: Any,
) -> None:
    torch.set_num_threads(1)
    config = ModelConfig.load(model)
    stage = load_stage(model, config, split_as(config, split)[index], dtype, quantize)
    steps: Steps = pickle.loads(file.read_bytes())
    # A few to warm up, bound as of their own epoch; then all of them.
    for epoch, chosen in ((EPOCH, steps[:WARM_UP_STEPS]), (EPOCH + 1, steps)):
        stage.bind(epoch, layout, config.context, MAX_BATCH_TOKENS)
        chosen = [(replace(microbatch, epoch=epoch), rows) for microbatch, rows in chosen]
        together.wait()
        begin = time.perf_counter()
        for microbatch, rows in chosen:
            if rows is not None:
                stage.inbox(len(microbatch.tokens))[:] = rows
            stage.step(microbatch)
        seconds = time.perf_counter() - begin
    answers.put((index, seconds))
