"""Measures how fast the variants are on this machine: for `cpu_speeds.json`, and for a CPU that is not in it.

    python -m tramontane.stages.kernels.native.speeds bfloat16 [int8]

prints the speeds of a short probe as JSON and keeps them in the user's cache, so that a CPU is probed once.

It runs one layer of a middling model with 8, 32 and 256 rows: reading memory bounds the first, arithmetic the last. The
variants take turns in each round. Each round gives a ratio to the first variant's speed, and the median of the rounds
counts, so that neighbours who come and go change little.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.config import EXAMPLE
from tramontane.stages.cpu import this_cpu
from tramontane.stages.kernel_choice import NodeKernels
from tramontane.stages.kernels.native import NativeKernels, PackedHead, PackedLayer, build
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import BlockTable, Microbatch, no_sampled_rows, no_scored_rows
from tramontane.stages.variants import MATRICES, Variants, numbers_of
from tramontane.stages.weights import TORCH_DTYPES, LayerWeights

MODEL = replace(
    EXAMPLE, vocab=16_384, dim=1024, heads=16, kv_heads=4, head_dim=64, ffn_dim=2048, experts=8, windows=(None,),
    context=512,
)  # fmt: skip
DECODE_ROWS = (8, 32)
CHUNK_ROWS = 256
BLOCK = 32
PROBE_ROUNDS = 3

Jobs: TypeAlias = dict[tuple[str, str], Callable[[], object]]
"""The calls that are timed, by matrix and shape."""


def measure(dtype: str, quantize: str | None, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """For each matrix: how many times as fast each variant is as the slowest.

    Raises:
        NativeUnavailable: a variant cannot be had here.
    """
    with torch.inference_mode():
        weights = _random_weights(TORCH_DTYPES[dtype])
        jobs = {name: _jobs(NativeKernels(MODEL, dtype, quantize, Variants.alike(name)), *weights) for name in names}
        ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
        for _ in range(rounds):
            for part in jobs[names[0]]:
                seconds = {name: _seconds(jobs[name][part]) for name in names}
                for name in names:
                    of_part = ratios.setdefault(part, {}).setdefault(name, [])
                    of_part.append(seconds[names[0]] / seconds[name])
    found = {}
    for matrix in MATRICES:
        shapes = [of_part for (owner, _), of_part in ratios.items() if owner == matrix]
        gains = {name: _mean([statistics.median(shape[name]) for shape in shapes]) for name in names}
        found[matrix] = {name: round(gain / min(gains.values()), 2) for name, gain in gains.items()}
    return found


def probe(dtype: str, quantize: str | None) -> dict[str, float]:
    """The speed over all matrices of each variant that runs here; measured once, then read from the user's cache.

    Raises:
        NativeUnavailable: a variant cannot be had here.
    """
    cpu, numbers = this_cpu(), numbers_of(dtype, quantize)
    names = NodeKernels("", cpu, "").variants(numbers)
    kept = _kept_in(f"{cpu.model} {' '.join(sorted(cpu.flags))} {numbers}")
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    by_matrix = measure(dtype, quantize, names, PROBE_ROUNDS)
    found = {name: round(_mean([by_matrix[matrix][name] for matrix in MATRICES]), 2) for name in names}
    made = kept.with_suffix(f".{os.getpid()}")
    made.write_text(json.dumps(found))
    os.replace(made, kept)
    return found


def _kept_in(what: str) -> Path:
    return build.cache_folder() / f"probe-{build.digest_of(what)}.json"


def _mean(gains: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(gain) for gain in gains))


def _seconds(job: Callable[[], object]) -> float:
    """The shorter time of two runs, after one to warm up: other work only ever makes a run longer."""
    job()
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        job()
        times.append(time.perf_counter() - begin)
    return min(times)


def _random_weights(dtype: torch.dtype) -> tuple[LayerWeights, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)).to(dtype)

    dim, ffn = MODEL.dim, MODEL.ffn_dim
    layer = LayerWeights(
        attention_norm_D=torch.ones(dim),
        q=matrix(MODEL.heads * MODEL.head_dim, dim),
        k=matrix(MODEL.kv_heads * MODEL.head_dim, dim),
        v=matrix(MODEL.kv_heads * MODEL.head_dim, dim),
        o=matrix(dim, MODEL.heads * MODEL.head_dim),
        ffn_norm_D=torch.ones(dim),
        gate=matrix(MODEL.experts, dim),
        w1=[matrix(ffn, dim) for _ in range(MODEL.experts)],
        w2=[matrix(dim, ffn) for _ in range(MODEL.experts)],
        w3=[matrix(ffn, dim) for _ in range(MODEL.experts)],
    )
    return layer, matrix(MODEL.vocab, dim)


def _jobs(kernels: NativeKernels, weights: LayerWeights, head_VD: Tensor) -> Jobs:
    layer, head = kernels.pack_layer(weights), kernels.pack_head(torch.ones(MODEL.dim), head_VD)
    ring = MODEL.context // BLOCK
    layout = KVLayout(
        block=BLOCK, chunk=CHUNK_ROWS, windows=(None,), rings=(ring,), pool_blocks=(ring * max(DECODE_ROWS),)
    )
    storage = kernels.allocate(layout.pool_blocks[0], BLOCK, 1)
    kernels.fill(storage, np.arange(layout.pool_blocks[0], dtype=np.int32), 0.1)
    return dict(_each_job(kernels, layer, head, layout, storage))


def _each_job(
    kernels: NativeKernels, layer: PackedLayer, head: PackedHead, layout: KVLayout, storage: Tensor
) -> Iterator[tuple[tuple[str, str], Callable[[], object]]]:
    generator = torch.Generator().manual_seed(2)
    pieces = [*(([MODEL.context - 1] * rows, [1] * rows) for rows in DECODE_ROWS)]
    pieces.append(([MODEL.context - CHUNK_ROWS], [CHUNK_ROWS]))
    for first, length in pieces:
        rows = torch.randn(sum(length), MODEL.dim, generator=generator)
        plan = kernels.plan(_microbatch(layout, first, length), layout, [0])[0]
        shape = f"{len(first)} x {length[0]}"
        yield ("attention", shape), partial(kernels.attention, layer, rows, plan, storage, 0)
        yield ("experts", shape), partial(kernels.experts, layer, rows)
        if len(rows) <= max(DECODE_ROWS):
            yield ("head", shape), partial(kernels.head, head, rows)


def _microbatch(layout: KVLayout, first: Sequence[int], length: Sequence[int]) -> Microbatch:
    """A microbatch of pieces with full rings, which lie one behind the other in the pool."""
    held = [layout.rings[0]] * len(first)
    blocks = np.arange(sum(held), dtype=np.int32)
    table = BlockTable(blocks=blocks, held=np.array(held, np.int32), fresh=np.empty(0, np.int32))
    return Microbatch(
        epoch=1,
        step=0,
        tokens=np.zeros(sum(length), np.int32),
        first=np.array(first, np.int32),
        length=np.array(length, np.int32),
        sequence=np.arange(len(first)),
        tables=(table,),
        sampled=no_sampled_rows(),
        scored=no_scored_rows(),
    )


def main(words: Sequence[str]) -> None:
    """Probe for a dtype and, if that is given, a kind of quantised weights."""
    dtype, quantize = words[0], words[1] if len(words) > 1 else None
    sys.stdout.write(json.dumps(probe(dtype, quantize)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
