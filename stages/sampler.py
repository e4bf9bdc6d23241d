"""Chooses the next token of each row that needs one, and scores given ones.

Order: banned ids out, temperature, top-k, top-p, min-p, renormalise once; ties go to the lower id. Temperature 0 is
greedy and ignores the filters. Each row draws one uniform number, a pure function of its seed and position, and takes
the id at which the cumulative probability, summed over the ids in order, passes it.

A row's bits do not depend on the other rows: every reduction runs along the vocabulary, one row at a time inside its
operator, and float64 holds the running sums.

M sampled rows, K scored rows, V rows of the head, I sampleable ids, R rows of a subset.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tramontane.stages.microbatch import BoolArray, Float32Array, Int32Array, SampledRows
from tramontane.stages.noise import uniform

FIRST_RANKS = 128
"""Ids that are ranked at first in a row with top-k or top-p."""


def sample(
    logits_MV: Tensor,
    rows: SampledRows,
    position_M: Int32Array,
    sampleable_ids: int,
) -> tuple[Int32Array, Float32Array, BoolArray]:
    """`StepResult`'s token, log_probability and finite for each row. [M] each

    `position_M` is the absolute position that the sampled token will have. Ids from `sampleable_ids` on are never
    chosen. The log probability is that under the model's own softmax: over all rows of the head, temperature 1, no
    filters, nothing banned. A row whose logits hold NaN or infinity, or whose ids are all banned, has no token to
    choose: its `finite` is False, its token 0 and its log probability 0.
    """
    logits_MV = logits_MV.float()
    usable_M = logits_MV.abs().amax(-1) < torch.inf
    allowed_MI = _without_banned(logits_MV[:, :sampleable_ids], rows)
    top = allowed_MI.max(-1)
    usable_M = usable_M & (top.values > -torch.inf)
    token_M = top.indices
    drawn_R = np.flatnonzero(rows.temperature > 0)
    if len(drawn_R):
        index = torch.as_tensor(drawn_R, device=logits_MV.device)
        every = len(drawn_R) == len(rows.row)
        scaled_RI = allowed_MI - top.values[:, None] if every else allowed_MI[index] - top.values[index, None]
        token_M[index] = _draw(scaled_RI, rows, position_M, drawn_R)
    token_M = torch.where(usable_M, token_M, 0)
    log_probability_M = torch.log_softmax(logits_MV, -1).gather(1, token_M[:, None])[:, 0]
    log_probability_M = torch.where(usable_M, log_probability_M, 0.0)
    return (
        token_M.to("cpu", torch.int32).numpy(),
        log_probability_M.cpu().numpy(),
        usable_M.cpu().numpy(),
    )


def score(logits_KV: Tensor, target_K: Int32Array) -> Float32Array:
    """Natural log probability of each row's target under the model's own softmax; NaN where its logits hold NaN. [K]"""
    target_K1 = torch.tensor(target_K, device=logits_KV.device, dtype=torch.int64)[:, None]
    scores_K: Float32Array = torch.log_softmax(logits_KV.float(), -1).gather(1, target_K1)[:, 0].cpu().numpy()
    return scores_K


def _without_banned(logits_MI: Tensor, rows: SampledRows) -> Tensor:
    """The logits with minus infinity at each row's banned ids."""
    if not len(rows.banned):
        return logits_MI
    row = np.repeat(np.arange(len(rows.row)), rows.banned_count)
    counts = rows.banned < logits_MI.shape[1]
    allowed_MI = logits_MI.clone()
    allowed_MI[torch.as_tensor(row[counts]), torch.as_tensor(rows.banned[counts].astype(np.int64))] = -torch.inf
    return allowed_MI


def _draw(scaled_RI: Tensor, rows: SampledRows, position_M: Int32Array, drawn_R: NDArray[np.int64]) -> Tensor:
    """Ids drawn for the rows `drawn_R`, all of positive temperature. [R]

    `scaled_RI` are their logits less the row's largest, so that no temperature, however small, overflows; it is
    divided in place.
    """
    device = scaled_RI.device
    scaled_RI /= torch.tensor(rows.temperature[drawn_R], device=device)[:, None]
    probability_RI = torch.softmax(scaled_RI, -1)
    filtered = (rows.top_k[drawn_R] > 0) | (rows.top_p[drawn_R] < 1) | (rows.min_p[drawn_R] > 0)
    if filtered.all():
        probability_RI = _filter(scaled_RI, probability_RI, rows, drawn_R)
    elif filtered.any():
        index = torch.as_tensor(np.flatnonzero(filtered), device=device)
        probability_RI[index] = _filter(scaled_RI[index], probability_RI[index], rows, drawn_R[filtered])

    cumulative_RI = probability_RI.cumsum(-1, dtype=torch.float64)
    noise_R = torch.tensor(uniform(rows.seed[drawn_R], position_M[drawn_R]), device=device)
    # The noise is below 1, so the target stays below the total, and the first id past it has a probability above 0.
    target_R = noise_R * cumulative_RI[:, -1]
    return torch.searchsorted(cumulative_RI, target_R[:, None], right=True)[:, 0]


def _filter(scaled_RI: Tensor, probability_RI: Tensor, rows: SampledRows, index: NDArray[np.int64]) -> Tensor:
    """The probabilities with 0 where top-k, top-p or min-p take an id away. [R, I], for the sampled rows `index`."""
    device, ids = scaled_RI.device, scaled_RI.shape[1]
    top_k_R = torch.tensor(rows.top_k[index], device=device, dtype=torch.int64)
    top_k_R = torch.where(top_k_R > 0, top_k_R, ids).clamp(max=ids)
    top_p_R = torch.tensor(rows.top_p[index], device=device, dtype=torch.float64)
    min_p_R = torch.tensor(rows.min_p[index], device=device)

    count_R, cut_R, tied_R = _cut(scaled_RI, probability_RI, top_k_R, top_p_R)
    kept_RI = scaled_RI >= cut_R[:, None]
    tied = tied_R.nonzero()[:, 0]
    if len(tied):
        equal, above = scaled_RI[tied] == cut_R[tied, None], scaled_RI[tied] > cut_R[tied, None]
        room = count_R[tied] - above.sum(-1)
        kept_RI[tied] = above | (equal & (equal.cumsum(-1) <= room[:, None]))
    kept_RI &= probability_RI >= (min_p_R * probability_RI.amax(-1))[:, None]
    return torch.where(kept_RI, probability_RI, 0.0)


def _cut(scaled_RI: Tensor, probability_RI: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the likeliest ids top-k and top-p leave, the logit of the last one, and whether others equal it. [R]

    Sorting a whole vocabulary costs many times what the draw costs, and few ids are left as a rule: only the first
    `FIRST_RANKS` ids are ranked, and more in rows where those do not suffice.
    """
    rows, ids = scaled_RI.shape
    count_R = torch.full((rows,), ids, device=scaled_RI.device)
    cut_R = torch.full((rows,), -torch.inf, device=scaled_RI.device)
    tied_R = torch.zeros(rows, dtype=torch.bool, device=scaled_RI.device)
    open_R = ((top_k_R < ids) | (top_p_R < 1)).nonzero()[:, 0]
    ranks = FIRST_RANKS
    while len(open_R):
        ranks = min(ranks, ids)
        top = scaled_RI[open_R].topk(ranks)
        cumulative = probability_RI[open_R].gather(1, top.indices).cumsum(-1, dtype=torch.float64)
        # An id stays while those before it have not reached p; the first always stays.
        reached_after = 1 + (cumulative < top_p_R[open_R, None]).sum(-1)
        reached_after = torch.where(top_p_R[open_R] < 1, reached_after, ids)
        count = torch.minimum(top_k_R[open_R], reached_after).clamp(max=ids)
        known = (count < ranks) | (ranks == ids)
        done, count = open_R[known], count[known]
        count_R[done] = count
        cut_R[done] = top.values[known].gather(1, count[:, None] - 1)[:, 0]
        after = top.values[known].gather(1, count.clamp(max=ranks - 1)[:, None])[:, 0]
        tied_R[done] = (after == cut_R[done]) & (count < ids)
        open_R = open_R[~known]
        ranks *= 16
    return count_R, cut_R, tied_R
