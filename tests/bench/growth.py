"""Cost that does not grow: time per token and KV memory of one sequence, from one window to 32.

Under a window a decode step sees at most W keys, and the rolling buffer holds at most W and a chunk. So both columns
rise until the sequence is as long as the window, and then stay: at 32 windows, full attention would hold and read 32
times as much (the last column). One sequence, one stage, in process: known tokens are fed in chunks up to each length,
and its last 32 one at a time, which are timed.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from driving import Drive, Driven, greedy_rows, make_layout

from bench.children import in_child
from bench.inprocess import CHUNK, load_stage
from bench.limits import Ceilings, decode_cost, kv_place_bytes
from tramontane.stages.config import ModelConfig

BLOCK = 32
STEPS = 32
WINDOWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Point:
    """One sequence at some length."""

    windows: int
    tokens: int
    step_ms: float
    limit_ms: float
    kv_bytes: int
    full_kv_bytes: int
    """What full attention would hold."""


def measure_growth(model: Path, dtype: str, threads: int, ceilings: Ceilings) -> list[Point]:
    """All lengths of one model, measured in a process of its own."""
    points: list[Point] = in_child(_measure, model, dtype, threads, ceilings)
    return points


def _measure(model: Path, dtype: str, threads: int, ceilings: Ceilings) -> list[Point]:
    config = ModelConfig.load(model)
    window = config.smallest_window
    assert window is not None, f"{model} has no window"
    stage = load_stage(model, config, range(config.layers), dtype)
    drive = Drive([stage], make_layout(config, chunk=min(window, CHUNK), block=BLOCK))
    torch.set_num_threads(threads)  # after `driving`, which sets one
    draw = np.random.default_rng(1)
    sequence = drive.sequence(draw.integers(3, config.vocab, window * WINDOWS[-1]).tolist())
    place_bytes = kv_place_bytes(config, dtype) * config.layers
    points = []
    for windows in WINDOWS:
        tokens = windows * window
        _feed(drive, sequence, tokens - STEPS)
        times = [_step_s(drive, sequence) for _ in range(STEPS)]
        points.append(
            Point(
                windows=windows,
                tokens=tokens,
                step_ms=statistics.median(times) * 1e3,
                limit_ms=decode_cost(config, [tokens - 1], dtype).seconds(ceilings, dtype) * 1e3,
                kv_bytes=len(sequence.rings[0]) * BLOCK * place_bytes,
                full_kv_bytes=tokens * place_bytes,
            )
        )
    return points


def _feed(drive: Drive, sequence: Driven, until: int) -> None:
    while sequence.cached < until:
        drive.step(drive.microbatch((sequence, min(drive.layout.chunk, until - sequence.cached))))


def _step_s(drive: Drive, sequence: Driven) -> float:
    microbatch = drive.microbatch((sequence, 1), sampled=greedy_rows([0]))
    begin = time.perf_counter()
    drive.step(microbatch)
    return time.perf_counter() - begin
