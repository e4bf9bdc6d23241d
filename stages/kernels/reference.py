"""The reference kernel set: the plainest torch that says what a block is. Runs on any device, row by row in attention.

It is what the other sets are compared with, so nothing that computes is shared with them but the ring arithmetic.

Letters: T rows, S pieces, D dim, H query heads, K KV heads, h head_dim, F ffn_dim, E experts, A experts a token, N rows
of a piece, P positions that they see, M some rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.stages import sampler
from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import Block, one_by_one
from tramontane.stages.kernels.places import Places
from tramontane.stages.kernels.torch_rows import TorchRows, rope_angles
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int32Array, Microbatch
from tramontane.stages.weights import LayerWeights


@dataclass(frozen=True, eq=False)
class Piece:
    """What one piece's rows see."""

    rows: slice
    """Its rows on the token axis."""
    position_N: Tensor
    """Their positions in the sequence."""
    seen_P: Tensor
    """The positions that any of its rows sees."""
    place_P: Tensor
    """Where their keys and values are."""


@dataclass(frozen=True, eq=False)
class ReferencePlan:
    """What the layers of one window class share in one step."""

    position_T: Tensor
    """Each row's position in its sequence; int64."""
    written_T: Tensor
    """The place of each row's key and value; int64."""
    window: int | None
    """Positions that a query sees, its own included; None is all."""
    pieces: list[Piece]
    """[S]"""


class ReferenceKernels(TorchRows):
    """See the module's docstring. `Kernels` documents the methods."""

    sample = staticmethod(sampler.sample)
    score = staticmethod(sampler.score)

    def __init__(self, config: ModelConfig, dtype: str, device: str) -> None:
        super().__init__(config, dtype, device)
        self.name = f"reference-{dtype}"
        self.row_invariant = False

    def pack_layer(self, weights: LayerWeights) -> LayerWeights:
        def there(value: Tensor | list[Tensor] | None) -> Tensor | list[Tensor] | None:
            if isinstance(value, list):
                return [each.to(self._device, copy=True) for each in value]
            return None if value is None else value.to(self._device, copy=True)

        return LayerWeights(**{name: there(value) for name, value in vars(weights).items()})  # type: ignore[arg-type]

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, ReferencePlan]:
        return {index: self.plan_pieces(microbatch, Places(microbatch, layout, index)) for index in classes}

    def plan_pieces(self, microbatch: Microbatch, places: Places) -> ReferencePlan:
        """What each piece sees, in one window class."""
        pieces = []
        for number, (start, first, length) in enumerate(
            zip(microbatch.start.tolist(), microbatch.first.tolist(), microbatch.length.tolist(), strict=True)
        ):
            seen_P = np.arange(places.first_visible_to(first), first + length)
            pieces.append(
                Piece(
                    rows=slice(start, start + length),
                    position_N=self._index(np.arange(first, first + length)),
                    seen_P=self._index(seen_P),
                    place_P=self._index(places.of(np.full_like(seen_P, number), seen_P)),
                )
            )
        return ReferencePlan(self._index(microbatch.position), self._index(places.written), places.window, pieces)

    def attention(
        self, layer: LayerWeights, rows_TD: Tensor, plan: ReferencePlan, storage: Tensor, index: int
    ) -> Tensor:
        config = self._config
        normed_TD = self._norm(rows_TD, layer.attention_norm_D)
        queries_THh = self._rope(F.linear(normed_TD, layer.q).unflatten(1, (config.heads, -1)), plan.position_T)
        keys_TKh = self._rope(F.linear(normed_TD, layer.k).unflatten(1, (config.kv_heads, -1)), plan.position_T)
        values_TKh = F.linear(normed_TD, layer.v).unflatten(1, (config.kv_heads, -1))
        # Places of all blocks in a row; views, so that writing reaches the storage.
        key_pool, value_pool = storage[index].flatten(1, 2).unbind(0)
        key_pool[plan.written_T] = keys_TKh
        value_pool[plan.written_T] = values_TKh
        attended_THh = self.attend_pieces(queries_THh, key_pool, value_pool, plan)
        return rows_TD + F.linear(attended_THh.flatten(1), layer.o)

    def attend_pieces(self, queries_THh: Tensor, keys: Tensor, values: Tensor, plan: ReferencePlan) -> Tensor:
        """Attention of every row; `keys` and `values` are the pools, [places, K, h]."""
        return torch.cat(
            [
                self._attend(queries_THh[piece.rows], keys[piece.place_P], values[piece.place_P], piece, plan.window)
                for piece in plan.pieces
            ]
        )

    def _attend(
        self, queries_NHh: Tensor, keys_PKh: Tensor, values_PKh: Tensor, piece: Piece, window: int | None
    ) -> Tensor:
        group = self._config.heads // self._config.kv_heads
        keys_PHh = keys_PKh.repeat_interleave(group, dim=1).float()
        values_PHh = values_PKh.repeat_interleave(group, dim=1).float()
        scores_HNP = torch.einsum("nhd,phd->hnp", queries_NHh.float(), keys_PHh) * self._config.head_dim**-0.5
        distance_NP = piece.position_N[:, None] - piece.seen_P
        hidden_NP = distance_NP < 0
        if window is not None:
            hidden_NP |= distance_NP >= window
        share_HNP = scores_HNP.masked_fill(hidden_NP, -torch.inf).softmax(-1)
        return torch.einsum("hnp,phd->nhd", share_HNP, values_PHh).to(self._dtype)

    def _rope(self, heads_TXh: Tensor, position_T: Tensor) -> Tensor:
        """Turn the pairs (i, i + h/2) by position x theta^(-2i/h)."""
        first, second = heads_TXh.float().chunk(2, dim=-1)
        angle_T1h = rope_angles(self._config, position_T)
        cos, sin = angle_T1h.cos(), angle_T1h.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(self._dtype)

    def _norm(self, rows_TD: Tensor, weight_D: Tensor) -> Tensor:
        wide_TD = rows_TD.float()
        scale_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + self._config.norm_eps)
        return weight_D * (wide_TD * scale_T1).to(self._dtype)

    def experts(self, layer: LayerWeights, rows_TD: Tensor) -> Tensor:
        normed_TD = self._norm(rows_TD, layer.ffn_norm_D)
        if layer.gate is None:
            return rows_TD + self._ffn(layer, 0, normed_TD)
        gate_TE = F.linear(normed_TD, layer.gate).float()
        # Stable, so that of equal logits the lower expert comes first.
        ranked = gate_TE.sort(dim=1, descending=True, stable=True)
        chosen_TA = ranked.indices[:, : self._config.experts_per_token]
        weight_TA = ranked.values[:, : self._config.experts_per_token].softmax(1)
        summed_TD = rows_TD.float().clone()
        for rank in range(self._config.experts_per_token):
            for expert in chosen_TA[:, rank].unique().tolist():
                rows = chosen_TA[:, rank] == expert
                summed_TD[rows] += weight_TA[rows, rank, None] * self._ffn(layer, expert, normed_TD[rows]).float()
        return summed_TD.to(self._dtype)

    def _ffn(self, layer: LayerWeights, expert: int, rows_ND: Tensor) -> Tensor:
        gate_NF = F.silu(F.linear(rows_ND, layer.w1[expert]))
        return F.linear(gate_NF * F.linear(rows_ND, layer.w3[expert]), layer.w2[expert])

    def blocks(self, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
        return one_by_one(self, blocks, rows_TD)

    def head(self, head: tuple[Tensor, Tensor], rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        norm_D, head_VD = head
        rows_MD = rows_TD if asked_M is None else rows_TD[self._index(asked_M)]
        return F.linear(self._norm(rows_MD, norm_D), head_VD).float()
