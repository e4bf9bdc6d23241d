"""The last stage's answer to a microbatch: which rows need logits, and what is chosen and scored from them.

Letters: M sampled rows, K scored rows, N = M + K, V rows of the head.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tramontane.stages.kernels import Kernels
from tramontane.stages.microbatch import Int32Array, Microbatch, StepResult

NO_SCORES = np.empty(0, np.float32)


def asked_rows(microbatch: Microbatch) -> Int32Array:
    """The rows that need logits, the sampled before the scored, as indices on the token axis. [N]"""
    sampled, scored = microbatch.sampled.row, microbatch.scored.row
    return np.concatenate([sampled, scored]) if len(scored) else sampled


def choose(
    kernels: Kernels, microbatch: Microbatch, logits_NV: Tensor, sampleable_ids: int, unnamed_ids: Int32Array
) -> StepResult:
    """Sample and score, given the float32 logits of `asked_rows`.

    Ids from `sampleable_ids` on are never chosen, nor are the `unnamed_ids` below it.
    """
    sampled, scored = microbatch.sampled.banning(unnamed_ids), microbatch.scored
    position_M = microbatch.position[sampled.row] + 1
    logits_MV, scores = logits_NV, NO_SCORES
    if len(scored.row):
        logits_MV, logits_KV = logits_NV.split([len(sampled.row), len(scored.row)])
        scores = kernels.score(logits_KV, scored.target)
    token, log_probability, finite = kernels.sample(logits_MV, sampled, position_M, sampleable_ids)
    return StepResult(
        epoch=microbatch.epoch,
        step=microbatch.step,
        token=token,
        log_probability=log_probability,
        finite=finite,
        score=scores,
    )
