"""Sampling and scoring by the native library, a row at a time; `stages/sampler.py` says what is computed.

Letters: M sampled rows, K scored rows, V rows of the head.
"""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from tramontane.stages.kernels.native import interface
from tramontane.stages.kernels.native.engine import Engine
from tramontane.stages.microbatch import BoolArray, Float32Array, Int32Array, SampledRows
from tramontane.stages.noise import uniform


def sample(
    engine: Engine, logits_MV: Tensor, rows: SampledRows, position_M: Int32Array, sampleable_ids: int
) -> tuple[Int32Array, Float32Array, BoolArray]:
    """As `stages.sampler.sample`."""
    count = len(rows.row)
    token, log_probability, finite = np.zeros(count, np.int32), np.zeros(count, np.float32), np.zeros(count, np.bool_)
    if not count:
        return token, log_probability, finite
    logits_MV = _rows(logits_MV)
    given = [
        np.ascontiguousarray(array, dtype)
        for array, dtype in (
            (rows.temperature, np.float32),
            (rows.top_k, np.int32),
            (rows.top_p, np.float32),
            (rows.min_p, np.float32),
            (
                uniform(rows.seed, position_M) if rows.temperature.any() else np.zeros(count),
                np.float64,
            ),  # greedy ones need none
            (rows.banned, np.int32),
            (rows.banned_count, np.int32),
        )
    ]
    assert all(len(array) == count for array in (*given[:5], given[6])), "options of other rows"
    assert len(given[5]) == given[6].sum(), "banned ids of other rows"
    assert not len(rows.banned) or rows.banned.min() >= 0, "a banned id below 0"
    vocabulary = logits_MV.shape[1]
    sampling = interface.Sampling(
        count,
        min(sampleable_ids, vocabulary),
        vocabulary,
        logits_MV.stride(0),
        *(array.ctypes.data for array in given),
    )
    sampled = interface.Sampled(token.ctypes.data, log_probability.ctypes.data, finite.ctypes.data)
    engine.call("sample", ctypes.byref(sampling), logits_MV.data_ptr(), ctypes.byref(sampled))
    return token, log_probability, finite


def score(engine: Engine, logits_KV: Tensor, target_K: Int32Array) -> Float32Array:
    """As `stages.sampler.score`."""
    scores = np.empty(len(target_K), np.float32)
    if not len(scores):
        return scores
    logits_KV = _rows(logits_KV)
    vocabulary = logits_KV.shape[1]
    assert 0 <= target_K.min() <= target_K.max() < vocabulary, f"targets {target_K} of {vocabulary}"
    target = np.ascontiguousarray(target_K, np.int32)
    engine.call(
        "score",
        len(scores),
        vocabulary,
        logits_KV.stride(0),
        logits_KV.data_ptr(),
        target.ctypes.data,
        scores.ctypes.data,
    )
    return scores


def _rows(logits: Tensor) -> Tensor:
    """Float32, with each row's numbers side by side."""
    logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()
