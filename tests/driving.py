"""Drives stages in process: takes blocks, makes microbatches, carries rows from stage to stage, reads logits.

drive = Drive(load_stages(folder, config, [2, 1]), make_layout(config, chunk=8, block=4, sequences=3))
prompt, other = drive.sequence(tokens), drive.sequence(tokens)
logits = drive.logits((prompt, 8), (other, 1))      # the next 8 tokens of one, the next of another, packed
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import KVLayout, blocks_held, ring_blocks
from tramontane.stages.microbatch import (
    BlockTable,
    Microbatch,
    SampledRows,
    ScoredRows,
    StepResult,
    no_sampled_rows,
    no_scored_rows,
)
from tramontane.stages.split import split_as
from tramontane.stages.stage import Stage

# The models are small: more threads would only wait for each other.
torch.set_num_threads(1)


def load_stages(
    folder: Path,
    config: ModelConfig,
    split: Sequence[int] = (),
    *,
    dtype: str = "float32",
    kernels: str | None = None,
    quantize: str | None = None,
    device: str = "cpu",
) -> list[Stage]:
    """The model as stages of so many layers each; by default as one."""
    spans = split_as(config, split or [config.layers])
    options = {"dtype": dtype, "device": device, "kernels": kernels, "quantize": quantize}
    return [Stage.load(config, folder, span, **options) for span in spans]


def make_layout(config: ModelConfig, *, chunk: int, block: int, sequences: int = 1) -> KVLayout:
    """Pools that hold so many sequences of full context."""
    windows = config.window_classes
    rings = tuple(ring_blocks(window, chunk, block, config.context) for window in windows)
    return KVLayout(
        block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=tuple(ring * sequences for ring in rings)
    )


def greedy_rows(rows: Sequence[int]) -> SampledRows:
    """Sample these rows at temperature 0."""
    count = len(rows)
    return SampledRows(
        row=np.array(rows, np.int32),
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.zeros(count, np.uint64),
        banned=np.empty(0, np.int32),
        banned_count=np.zeros(count, np.int32),
    )


@dataclass(eq=False)
class Driven:
    """A sequence: its tokens, how many of them are cached, and its ring of blocks in each class."""

    number: int
    tokens: list[int]
    cached: int = 0
    rings: list[list[int]] = field(default_factory=list)


class Drive:
    """Plays the router for stages in process.

    `poison` fills, before every microbatch, each block that no sequence holds or that is newly taken with NaN.
    """

    def __init__(self, stages: list[Stage], layout: KVLayout, *, epoch: int = 1, poison: bool = False, seed: int = 0):
        self.stages, self.layout, self.epoch, self.poison = stages, layout, epoch, poison
        self.next_step = 0
        self.running: list[Driven] = []
        # In no order, so that neighbours in a ring are not neighbours in the pool.
        shuffled = np.random.default_rng(seed)
        self.free = [shuffled.permutation(blocks).tolist() for blocks in layout.pool_blocks]
        for stage in stages:
            stage.bind(epoch, layout, context=stages[0].config.context, max_tokens=4096)

    def sequence(self, tokens: Sequence[int]) -> Driven:
        sequence = Driven(len(self.running), list(tokens), rings=[[] for _ in self.layout.windows])
        self.running.append(sequence)
        return sequence

    def release(self, sequence: Driven) -> None:
        """Give its blocks back."""
        for free, ring in zip(self.free, sequence.rings, strict=True):
            free.extend(ring)
            ring.clear()
        self.running.remove(sequence)

    def microbatch(
        self,
        *pieces: tuple[Driven, int],
        sampled: SampledRows | None = None,
        scored: ScoredRows | None = None,
    ) -> Microbatch:
        """The next tokens of each sequence, so many of each; takes the blocks that they need."""
        fresh: list[list[int]] = [[] for _ in self.layout.windows]
        tokens, first = [], []
        for sequence, length in pieces:
            assert length <= self.layout.chunk, "a piece longer than a chunk would overrun the ring"
            first.append(sequence.cached)
            tokens += sequence.tokens[sequence.cached : sequence.cached + length]
            sequence.cached += length
            assert sequence.cached <= len(sequence.tokens)
            for index, ring in enumerate(sequence.rings):
                need = blocks_held(sequence.cached, self.layout.block, self.layout.rings[index]) - len(ring)
                taken = [self.free[index].pop() for _ in range(need)]
                ring += taken
                fresh[index] += taken
        if self.poison:
            self._poison(fresh)
        microbatch = Microbatch(
            epoch=self.epoch,
            step=self.next_step,
            tokens=np.array(tokens, np.int32),
            first=np.array(first, np.int32),
            length=np.array([length for _, length in pieces], np.int32),
            sequence=np.array([sequence.number for sequence, _ in pieces], np.int64),
            tables=tuple(
                BlockTable(
                    blocks=np.array([block for sequence, _ in pieces for block in sequence.rings[index]], np.int32),
                    held=np.array([len(sequence.rings[index]) for sequence, _ in pieces], np.int32),
                    fresh=np.array(fresh[index], np.int32),
                )
                for index in range(len(self.layout.windows))
            ),
            sampled=sampled or no_sampled_rows(),
            scored=scored or no_scored_rows(),
        )
        self.next_step += 1
        return microbatch

    def _poison(self, fresh: list[list[int]]) -> None:
        for stage in self.stages:
            for index, pool in stage.pools.items():
                pool.fill(np.array(self.free[index] + fresh[index], np.int32), float("nan"))

    def step(self, microbatch: Microbatch) -> StepResult:
        """Through all stages, as bytes between them."""
        result = self._to_last(microbatch).step(microbatch)
        assert isinstance(result, StepResult)
        return result

    def logits(self, *pieces: tuple[Driven, int]) -> list[torch.Tensor]:
        """Run a microbatch and read the logits of all its rows, by piece."""
        microbatch = self.microbatch(*pieces)
        last = self._to_last(microbatch)
        return list(last.logits(last.forward(microbatch)).split(microbatch.length.tolist()))

    def _to_last(self, microbatch: Microbatch) -> Stage:
        for stage, after in zip(self.stages, self.stages[1:], strict=False):
            rows = stage.step(microbatch)
            assert isinstance(rows, memoryview)
            after.inbox(len(microbatch.tokens))[:] = rows
        return self.stages[-1]

    def whole(self, tokens: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits of every position of one sequence, fed in chunks; its blocks are free afterwards. [T, V]"""
        sequence, size = self.sequence(tokens), chunk or self.layout.chunk
        steps = [min(size, len(tokens) - start) for start in range(0, len(tokens), size)]
        logits = torch.cat([self.logits((sequence, step))[0] for step in steps])
        self.release(sequence)
        return logits

    def packed(self, prompts: Sequence[Sequence[int]], *, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Logits of every position of each prompt, all fed together.

        Each microbatch holds a piece of every prompt that is not done; `sizes`, one a prompt, rotate over the prompts.
        """
        sequences = [self.sequence(prompt) for prompt in prompts]
        found: dict[Driven, list[torch.Tensor]] = {sequence: [] for sequence in sequences}
        while any(sequence.cached < len(sequence.tokens) for sequence in sequences):
            pieces = [
                (sequence, min(size, len(sequence.tokens) - sequence.cached))
                for sequence, size in zip(sequences, sizes, strict=True)
                if sequence.cached < len(sequence.tokens)
            ]
            for (sequence, _), logits in zip(pieces, self.logits(*pieces), strict=True):
                found[sequence].append(logits)
            sizes = [*sizes[1:], *sizes[:1]]
        return [torch.cat(found[sequence]) for sequence in sequences]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Feed a prompt in chunks, then decode so many ids greedily."""
        sequence = self.sequence(prompt)
        while len(sequence.tokens) < len(prompt) + count:
            length = min(self.layout.chunk, len(sequence.tokens) - sequence.cached)
            last = sequence.cached + length == len(sequence.tokens)
            result = self.step(self.microbatch((sequence, length), sampled=greedy_rows([length - 1] if last else [])))
            sequence.tokens += result.token.tolist()
        self.release(sequence)
        return sequence.tokens[len(prompt) :]
