"""Each part of a step alone, beside what it reads and computes: where a kernel set stands below the ceilings.

linear      the dense model's FFN (three products): the weights are read once for all rows
experts     gate, two experts a row: few rows touch few experts, 32 touch all of them
attention   four products and the keys. Decode reads every sequence's keys for one row each, prefill shares them
head        the final norm and product over the vocabulary, only for rows that are sampled
sampling    from float32 logits; greedy, and with top-k 50 and top-p 0.9

One row is bound by reading; from where the two ceilings cross (some ten rows on a CPU without bfloat16 instructions,
some fifty with) arithmetic counts. A call is made for all layers in turn, so that weights come from memory and not from
a cache, and the time is the median of a layer's. Keys and values are written before they are read: memory that nobody
has touched is one page of zeros, and quick. The tiny models lie in the cache: their shares may be above 100 %.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from driving import Drive, greedy_rows, make_layout

from bench.children import in_child
from bench.inprocess import load_stage
from bench.limits import WEIGHT_BYTES, Ceilings, Cost, attention_cost, experts_touched, keys_seen, weights
from tramontane.stages.config import ModelConfig
from tramontane.stages.microbatch import Microbatch, SampledRows
from tramontane.stages.stage import Stage

BLOCK = 32


@dataclass(frozen=True)
class Shapes:
    """Which sizes are tried."""

    rows: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    """Sequences, and the position of each."""
    prefill: tuple[tuple[int, int], ...]
    """Rows of one chunk, and its first position."""
    budget_s: float
    """For each part; at least three passes are made."""


FULL = Shapes(
    rows=(1, 8, 32, 512),
    decode=((1, 256), (1, 4095), (8, 512), (32, 512)),
    prefill=((512, 0), (512, 3584)),
    budget_s=1.0,
)
QUICK = Shapes(rows=(1, 8), decode=((1, 63), (8, 63)), prefill=((64, 0), (64, 448)), budget_s=0.1)


@dataclass(frozen=True)
class Step:
    """A decode step of so many rows, made of its parts."""

    rows: int
    parts: tuple[tuple[int, Part], ...]
    """And how often each comes."""

    @property
    def seconds(self) -> float:
        return sum(count * part.seconds for count, part in self.parts)

    def limit_s(self, ceilings: Ceilings, number: str) -> float:
        """Each part as long as the longer of its reading and its arithmetic."""
        return sum(count * part.cost.seconds(ceilings, number) for count, part in self.parts)

    def serial_s(self, ceilings: Ceilings, number: str) -> float:
        """Each part reads, then computes."""
        return sum(count * part.cost.serial_s(ceilings, number) for count, part in self.parts)


def decode_steps(parts: Sequence[Part], layers: int) -> Iterator[Step]:
    """Those steps of which every part was measured."""
    by_name = {(part.name, part.shape.split(" at")[0]): part for part in parts}
    for rows in (1, 8, 32):
        wanted = (
            ("attention decode", f"{rows} x 1", layers),
            ("experts", _rows(rows), layers),
            ("head", _rows(rows), 1),
        )
        if all((name, shape) in by_name for name, shape, _ in wanted):
            yield Step(rows, tuple((count, by_name[name, shape]) for name, shape, count in wanted))


@dataclass(frozen=True)
class Part:
    """One line of the table."""

    name: str
    shape: str
    seconds: float
    """Of one call: one layer, or one head."""
    cost: Cost


def measure_kernels(
    model: Path, dense: Path, dtype: str, threads: int, shapes: Shapes, quantize: str | None = None
) -> tuple[str, list[Part]]:
    """The kernel set's name and all parts, measured in a process of its own."""
    name, parts = in_child(_measure, model, dense, dtype, threads, shapes, quantize)
    return name, parts


def _measure(model: Path, dense: Path, dtype: str, threads: int, shapes: Shapes, quantize: str | None) -> Any:
    torch.set_num_threads(threads)
    parts = []
    with torch.inference_mode():
        for name, folder in (("linear", dense), ("experts", model)):
            bench = Bench(folder, dtype, quantize, shapes.budget_s)
            parts += [bench.feed_forward(name, rows) for rows in shapes.rows]
        parts += [bench.attention("decode", [(position, 1)] * count) for count, position in shapes.decode]
        parts += [bench.attention("prefill", [(first, rows)]) for rows, first in shapes.prefill]
        for rows in shapes.rows[:3]:
            parts += bench.head(rows)
    return bench.stage.numerics, parts


class Bench:
    """A whole model on one stage, whose kernels are called one by one."""

    def __init__(self, folder: Path, dtype: str, quantize: str | None, budget_s: float) -> None:
        self._budget_s = budget_s
        self.config = ModelConfig.load(folder)
        self.stage: Stage = load_stage(folder, self.config, range(self.config.layers), dtype, quantize)
        self._kernels = self.stage._kernels
        self._layers = list(self.stage._layers.values())
        self._dtype = dtype
        self._weight_bytes = WEIGHT_BYTES["int8" if quantize else dtype]

    def rows(self, count: int) -> torch.Tensor:
        """Rows of unit scale, as they enter a block."""
        return self._kernels.enter(torch.randn(count, self.config.dim).to(getattr(torch, self._dtype)))

    def feed_forward(self, name: str, count: int) -> Part:
        """Experts, or the FFN of a dense model."""
        each, rows, config = weights(self.config), self.rows(count), self.config
        touched, chosen = experts_touched(config, count), config.experts_per_token or 1
        cost = Cost(
            self._weight_bytes * (each.gate + touched * each.expert), 2.0 * count * (each.gate + chosen * each.expert)
        )
        calls = [lambda layer=layer: self._kernels.experts(layer, rows) for layer in self._layers]
        return Part(name, _rows(count), median_s(calls, self._budget_s), cost)

    def attention(self, name: str, pieces: list[tuple[int, int]]) -> Part:
        """Pieces are given as (first position, rows)."""
        config, each, count = self.config, weights(self.config), sum(rows for _, rows in pieces)
        microbatch, layout = self._microbatch(pieces)
        plan = self._kernels.plan(microbatch, layout, (0,))[0]
        rows, storage = self.rows(count), self.stage.pools[0].storage
        calls = [
            lambda layer=layer, index=index: self._kernels.attention(layer, rows, plan, storage, index)
            for index, layer in enumerate(self._layers)
        ]
        seconds = median_s(calls, self._budget_s)
        keys = sum(keys_seen(config, *piece) for piece in pieces) // config.layers
        products = Cost(self._weight_bytes * each.attention, 2.0 * count * each.attention)
        cost = products + attention_cost(config, keys, self._dtype, reread=name == "decode")
        where = f"at {pieces[0][0]}"
        shape = f"{len(pieces)} x 1 {where}" if name == "decode" else f"{_rows(count)} {where}"
        return Part(f"attention {name}", shape, seconds, cost)

    def head(self, count: int) -> Iterator[Part]:
        """The head, then two ways to sample from its logits."""
        rows, config = self.rows(count), self.config
        size = weights(config).head
        yield Part(
            "head",
            _rows(count),
            median_s([lambda: self.stage.logits(rows)], self._budget_s),
            Cost(self._weight_bytes * size, 2.0 * count * size),
        )
        logits, position = self.stage.logits(rows), np.full(count, 100, np.int32)
        for name, options in (("greedy", {}), ("top-k, top-p", SAMPLED)):
            choose = partial(self._kernels.sample, logits, sampled_rows(count, **options), position, config.vocab)
            seconds = median_s([choose], self._budget_s)
            yield Part(f"sampling {name}", _rows(count), seconds, Cost(logits.nbytes, 0.0))

    def _microbatch(self, pieces: list[tuple[int, int]]) -> tuple[Microbatch, Any]:
        """Sequences that stand where they are wanted, in pools that have been written."""
        chunk = max(rows for _, rows in pieces)
        layout = make_layout(self.config, chunk=chunk, block=BLOCK, sequences=len(pieces))
        drive = Drive([self.stage], layout, epoch=self.stage.epoch + 1)
        self.stage.pools[0].fill(np.arange(layout.pool_blocks[0], dtype=np.int32), 0.1)
        sequences = [drive.sequence([3] * (first + rows)) for first, rows in pieces]
        for sequence, (first, _) in zip(sequences, pieces, strict=True):
            sequence.cached = first
        return drive.microbatch(*((sequence, piece[1]) for sequence, piece in zip(sequences, pieces, strict=True))), (
            layout
        )


SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


def sampled_rows(count: int, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> SampledRows:
    """So many rows that are sampled alike."""
    rows = greedy_rows(list(range(count)))
    rows.temperature[:], rows.top_k[:], rows.top_p[:] = temperature, top_k, top_p
    return rows


def median_s(calls: list[Callable[[], object]], budget_s: float) -> float:
    """The median over passes of the mean over the calls of a pass, after one pass to warm up."""
    for call in calls:
        call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - begin) / len(calls))
    return statistics.median(times)


def _rows(count: int) -> str:
    return f"{count} row{'s' if count > 1 else ''}"
