"""Attention on the CPU over the paged ring: planned once a step for a window class, run once a layer.

Keys and values lie token-major, `[place, (K keys, K values) x hd]`, as the fused product delivers them: one copy
writes a row, one gather reads exactly the places that a query may see. (Against `[block, kv head, place, hd]` the
gather costs the same, and no place out of the window is ever read.)

Decode (pieces of one token) is flash-decoding (Dao et al. 2023, "Flash-Decoding for long-context inference"): the
places that a query sees are cut into jobs of `JOB_PLACES`, all pieces' jobs run as one batch, and a softmax
over the jobs' log-sum-exps joins what belongs together. The query heads that share a key head are the rows of one
product. Places that pad a job point at a row of zeros, so that no NaN can come from them.

Prefill (longer pieces) runs query tile by query tile with just the keys that the tile sees, in logical order.

Letters: T rows, S pieces, J jobs, L places of a job, K KV heads, G query heads of a KV head, H = K x G, hd head_dim,
N rows of a tile, P places of a tile or piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.kernels.places import Places
from tramontane.stages.microbatch import BoolArray, Int64Array, Microbatch

JOB_PLACES = (32, 64, 128, 256)
"""Places of a decode job. Padding a job from one of these lengths to the next does not change its bits; it does with
144, 160, .. 240, where the products are cut differently."""
TILE = 128
"""Queries of a prefill tile, at most."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, eq=False)
class Decode:
    """All pieces of one token."""

    rows: Tensor
    """Their rows on the token axis. [S]"""
    places: Tensor
    """[J x L]"""
    mask: Tensor | None
    """0 or minus infinity [J, 1, 1, L]; None where no job is padded."""
    most: int
    """The most jobs that a piece has."""
    piece: Tensor
    """The piece of each job. [J]"""
    slot: Tensor
    """Each job's place in a matrix [S, most], flat. [J]"""


@dataclass(frozen=True, eq=False)
class Tile:
    """Some queries of one piece."""

    start: int
    stop: int
    """Their rows on the token axis."""
    low: int
    high: int
    """The keys that they see, as places in the piece's gathered keys."""
    mask: Tensor | None
    """[N, P]; None where it is plainly causal from the first key on."""


@dataclass(frozen=True, eq=False)
class Prefill:
    """One piece of more than one token."""

    places: Tensor
    """Of the positions that any of its queries sees, in order. [P]"""
    tiles: list[Tile]
    """In order; together all of its queries."""


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What the layers of one window class share in one step."""

    written: Tensor
    """The place of each row's key and value. [T]"""
    rotation: Tensor
    """cos + i sin of each row's angles, complex [T, 1, hd / 2]; the same for all classes."""
    decode: Decode | None
    """None where no piece has one token."""
    prefills: list[Prefill]
    """One a longer piece."""


def plan_attention(microbatch: Microbatch, places: Places, rotation: Tensor, dtype: torch.dtype) -> AttentionPlan:
    """Plan one class.

    `rotation`, complex [T, 1, hd / 2], is cos + i sin of each row's angles, the same for all classes. `dtype` is that
    of the queries, and so of the masks.
    """
    single = microbatch.length == 1
    masks: dict[tuple[int, int, int], Tensor] = {}
    return AttentionPlan(
        written=torch.from_numpy(places.written),
        rotation=rotation,
        decode=_plan_decode(microbatch, places, np.flatnonzero(single), dtype) if single.any() else None,
        prefills=[_plan_prefill(microbatch, places, int(piece), masks, dtype) for piece in np.flatnonzero(~single)],
    )


def _plan_decode(microbatch: Microbatch, places: Places, pieces_S: Int64Array, dtype: torch.dtype) -> Decode:
    position_S = microbatch.first[pieces_S].astype(np.int64)
    first_S = places.first_visible(position_S)
    visible_S = position_S + 1 - first_S
    longest = int(visible_S.max())
    length = next((length for length in JOB_PLACES if length >= longest), JOB_PLACES[-1])
    jobs_S = -(-visible_S // length)
    most = int(jobs_S.max())
    index_J = np.repeat(np.arange(len(pieces_S)), jobs_S)
    nth_J = np.arange(len(index_J)) - np.repeat(np.cumsum(jobs_S) - jobs_S, jobs_S)
    last_J1 = position_S[index_J, None]
    position_JL = (first_S[index_J] + nth_J * length)[:, None] + np.arange(length)
    seen_JL = position_JL <= last_J1
    padded = not seen_JL.all()
    if padded:
        position_JL = np.minimum(position_JL, last_J1)
    place_JL = places.of(pieces_S[index_J, None], position_JL)
    if padded:
        place_JL = np.where(seen_JL, place_JL, places.zero)
    return Decode(
        rows=torch.from_numpy(microbatch.start[pieces_S].astype(np.int64)),
        places=torch.from_numpy(place_JL.reshape(-1)),
        mask=_mask(seen_JL, dtype)[:, None, None, :] if padded else None,
        most=most,
        piece=torch.from_numpy(index_J),
        slot=torch.from_numpy(index_J * most + nth_J),
    )


def _plan_prefill(
    microbatch: Microbatch, places: Places, piece: int, masks: dict[tuple[int, int, int], Tensor], dtype: torch.dtype
) -> Prefill:
    first, length, start = int(microbatch.first[piece]), int(microbatch.length[piece]), int(microbatch.start[piece])
    low = places.first_visible_to(first)
    tiles = []
    for offset in range(0, length, TILE):
        queries = min(TILE, length - offset)
        query = first + offset
        key = places.first_visible_to(query)
        keys = query + queries - key
        # Tiles of the same shape, as all in the middle of a long chunk are, share one mask.
        shape = (queries, keys, query - key)
        causal = key == query and (places.window is None or places.window >= queries)
        if not causal and shape not in masks:
            masks[shape] = _mask(_visible(*shape, places.window), dtype)
        tiles.append(
            Tile(
                start=start + offset,
                stop=start + offset + queries,
                low=key - low,
                high=key - low + keys,
                mask=None if causal else masks[shape],
            )
        )
    positions = np.arange(low, first + length)
    return Prefill(torch.from_numpy(places.of(np.full_like(positions, piece), positions)), tiles)


def _visible(queries: int, keys: int, ahead: int, window: int | None) -> BoolArray:
    """Which keys each query sees, where the first query's own key is number `ahead`. [N, P]

    >>> _visible(2, 4, 2, window=3).astype(int).tolist()
    [[1, 1, 1, 0], [0, 1, 1, 1]]
    """
    own_N1 = np.arange(queries)[:, None] + ahead
    key_P = np.arange(keys)
    visible_NP = key_P <= own_N1
    if window is not None:
        visible_NP &= key_P > own_N1 - window
    return visible_NP


def _mask(visible: BoolArray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32(-np.inf))).to(dtype)


def attend(queries_TKGh: Tensor, pool: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Softmax(queries x keys) x values for every row. [T, H x hd]

    `pool` [places + 1 block, 2 x K x hd] already holds this step's keys and values.
    """
    rows, kv_heads, group, head_dim = queries_TKGh.shape
    decode = plan.decode
    if decode is not None and not plan.prefills:
        return _attend_decode(queries_TKGh, pool, decode, scale).reshape(rows, -1)
    attended_TKGh = torch.empty_like(queries_TKGh, memory_format=torch.contiguous_format)
    if decode is not None:
        queries_SKGh = queries_TKGh.index_select(0, decode.rows)
        attended_TKGh.index_copy_(0, decode.rows, _attend_decode(queries_SKGh, pool, decode, scale))
    for prefill in plan.prefills:
        kv_2KPh = pool.index_select(0, prefill.places).to(queries_TKGh.dtype)
        kv_2KPh = kv_2KPh.view(-1, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
        for tile in prefill.tiles:
            queries_KGNh = queries_TKGh[tile.start : tile.stop].permute(1, 2, 0, 3)
            keys, values = kv_2KPh[:, :, None, tile.low : tile.high].expand(-1, -1, group, -1, -1).unbind(0)
            causal = tile.mask is None
            attended_KGNh, _ = _flash(queries_KGNh, keys, values, 0.0, causal, attn_mask=tile.mask, scale=scale)
            attended_TKGh[tile.start : tile.stop] = attended_KGNh.permute(2, 0, 1, 3)
    return attended_TKGh.view(rows, -1)


def _attend_decode(queries_SKGh: Tensor, pool: Tensor, decode: Decode, scale: float) -> Tensor:
    """[S, K, G, hd]"""
    pieces, kv_heads, group, head_dim = queries_SKGh.shape
    # Where each piece has one job, jobs are pieces.
    queries_JKGh = queries_SKGh if decode.most == 1 else queries_SKGh.index_select(0, decode.piece)
    kv_JL2Kh = pool.index_select(0, decode.places).to(queries_SKGh.dtype)
    kv_JL2Kh = kv_JL2Kh.view(len(queries_JKGh), -1, 2, kv_heads, head_dim)
    keys, values = kv_JL2Kh.permute(2, 0, 3, 1, 4).unbind(0)
    attended_JKGh: Tensor
    attended_JKGh, lse_JKG = _flash(queries_JKGh, keys, values, 0.0, False, attn_mask=decode.mask, scale=scale)
    if decode.most == 1:
        return attended_JKGh
    # A piece's jobs are weighted by the share of the softmax's sum that each holds; a piece with one job by exactly 1.
    lse_SxKG = lse_JKG.new_full((pieces * decode.most, kv_heads, group), -torch.inf)
    lse_SxKG.index_copy_(0, decode.slot, lse_JKG)
    share_SxKG = lse_SxKG.view(pieces, decode.most, kv_heads, group).softmax(1).view(lse_SxKG.shape)
    weighted_JKGh = attended_JKGh.float() * share_SxKG.index_select(0, decode.slot)[..., None]
    attended_SKGh = torch.zeros(queries_SKGh.shape)
    return attended_SKGh.index_add_(0, decode.piece, weighted_JKGh).to(queries_SKGh.dtype)
