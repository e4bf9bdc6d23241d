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
    sampling = interface.Sampling(
        count, _ids(logits_MV, sampleable_ids), logits_MV.stride(0), *(array.ctypes.data for array in given)
    )
    sampled = interface.Sampled(token.ctypes.data, log_probability.ctypes.data, finite.ctypes.data)
    engine.call("sample", ctypes.byref(sampling), logits_MV.data_ptr(), ctypes.byref(sampled))
    return token, log_probability, finite


def score(engine: Engine, logits_KV: Tensor, target_K: Int32Array, sampleable_ids: int) -> Float32Array:
    """As `stages.sampler.score`."""
    scores = np.empty(len(target_K), np.float32)
    if not len(scores):
        return scores
    logits_KV = _rows(logits_KV)
    ids = _ids(logits_KV, sampleable_ids)
    assert target_K.min() >= 0, "a target below 0"
    known = target_K < ids
    target = np.ascontiguousarray(np.where(known, target_K, 0), np.int32)
    engine.call(
        "score",
        len(scores),
        ids,
        logits_KV.stride(0),
        logits_KV.data_ptr(),
        target.ctypes.data,
        scores.ctypes.data,
    )
    return np.where(known, scores, np.float32(-np.inf))


def _rows(logits: Tensor) -> Tensor:
    """Float32, with each row's numbers side by side."""
    logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _ids(logits: Tensor, sampleable_ids: int) -> int:
    return min(sampleable_ids, logits.shape[1])
