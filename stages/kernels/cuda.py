"""The CUDA kernel set: torch operators, few of them and none that makes the host wait for the device within a layer.

Attention in bfloat16 is one call of Flash Attention (`torch.nn.attention.varlen`) on packed lengths, with grouped heads
and the window. float32, which Flash Attention does not take, is the reference's, a piece at a time.

Flash Attention 2, which torch builds in, reads a block table only with pages of a multiple of 256 rows, and ours are
smaller: so the positions that a piece sees are gathered in order first. They end with the piece's last query, and that
is where Flash Attention aligns window and causality; that they start inside a block does not matter then.

Experts are sorted and counted on the device: rows lie by expert, and one grouped product works for all of them.

What is tested where: the planning, with it every argument of the attention call, and the experts on the CPU, with a
plain stand-in for `varlen_attn`; the rest by tests marked `gpu`, on a machine that has one.

Letters: T rows, S pieces, P places seen by all pieces one after another, D dim, H query heads, K KV heads, h head_dim,
F ffn_dim, E experts, A experts a token, X some heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.stages import sampler
from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import Block, one_by_one
from tramontane.stages.kernels.places import Places
from tramontane.stages.kernels.reference import ReferenceKernels, ReferencePlan
from tramontane.stages.kernels.torch_rows import TorchRows, rope_angles
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int32Array, Int64Array, Microbatch
from tramontane.stages.weights import LayerWeights

ALIGNED_BYTES = 16
"""Grouped products want the rows of their operands to begin at multiples of so many bytes."""


@dataclass(frozen=True, eq=False)
class CudaLayer:
    """One layer's weights on the device; products of the same rows lie in one matrix."""

    attention_norm_D: Tensor
    qkv: Tensor
    """[(H + 2 K) x h, D]"""
    o: Tensor
    """[D, H x h]"""
    ffn_norm_D: Tensor
    gate: Tensor | None
    """[E, D]; None in a dense model, which has one expert."""
    w13: Tensor
    """Gate projections above up projections. [E, 2 F, D]"""
    w2: Tensor
    """[E, D, F]"""


@dataclass(frozen=True, eq=False)
class CudaPlan:
    """What the layers of one window class share in one step."""

    written_T: Tensor
    """The place of each row's key and value; int64."""
    cos_T1h: Tensor
    sin_T1h: Tensor
    """Of each row's angles, for both halves of a head; the first half's sine is negative. float32."""
    pieces: ReferencePlan | VarlenPieces
    """For attention a piece at a time, or by one call."""


@dataclass(frozen=True, eq=False)
class VarlenPieces:
    """The arguments of `varlen_attn`."""

    place_P: Tensor
    """Where the keys and values are that the pieces see, piece after piece, each in the order of positions."""
    query_ends: Tensor
    """Queries up to each piece, 0 first; int32. [S + 1]"""
    key_ends: Tensor
    """The same for `place_P`. [S + 1]"""
    most_queries: int
    """Of any piece."""
    most_keys: int
    """Of any piece."""
    window: int | None
    """Positions that a query sees, its own included; None is all."""


class CudaKernels(TorchRows):
    """See the module's docstring. `attend` takes the place of `varlen_attn`, for any dtype.

    Raises:
        ValueError: grouped products do not take a size of the experts.
    """

    sample = staticmethod(sampler.sample)
    score = staticmethod(sampler.score)

    def __init__(
        self, config: ModelConfig, dtype: str, device: str, attend: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__(config, dtype, device)
        self.row_invariant = False
        self._reference = ReferenceKernels(config, dtype, device)
        aligned = ALIGNED_BYTES // self._dtype.itemsize
        for field, value in (("hidden_size", config.dim), ("intermediate_size", config.ffn_dim)):
            if config.experts and value % aligned:
                raise ValueError(f"{field} is {value}; on CUDA, experts in {dtype} take multiples of {aligned}")
        self._varlen: Callable[..., Any] | None = attend
        if attend is None and dtype == "bfloat16":
            from torch.nn.attention.varlen import varlen_attn

            self._varlen = varlen_attn
        self._gqa_options: dict[str, bool] = {}
        # Before torch 2.12 grouped heads need no asking for.
        if self._varlen is not None and "enable_gqa" in inspect.signature(self._varlen).parameters:
            self._gqa_options = {"enable_gqa": config.kv_heads < config.heads}
        self.name = f"cuda-{'plain' if self._varlen is None else 'varlen'}-{dtype}"

    def pack_layer(self, weights: LayerWeights) -> CudaLayer:
        def stacked(matrices: Sequence[Sequence[Tensor]]) -> Tensor:
            """One matrix of several below one another, for each expert; never two copies of all on the device."""
            outputs = [len(matrix) for matrix in matrices[0]]
            stack = torch.empty(
                len(matrices), sum(outputs), matrices[0][0].shape[1], dtype=self._dtype, device=self._device
            )
            for expert, parts in zip(stack, matrices, strict=True):
                for part, matrix in zip(expert.split(outputs), parts, strict=True):
                    part.copy_(matrix)
            return stack

        def there(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, copy=True)

        return CudaLayer(
            attention_norm_D=there(weights.attention_norm_D),
            qkv=stacked([(weights.q, weights.k, weights.v)])[0],
            o=there(weights.o),
            ffn_norm_D=there(weights.ffn_norm_D),
            gate=None if weights.gate is None else there(weights.gate),
            w13=stacked(list(zip(weights.w1, weights.w3, strict=True))),
            w2=stacked([(matrix,) for matrix in weights.w2]),
        )

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, CudaPlan]:
        """Each class's pieces, and the rotations that all share."""
        cos_T1h, sin_T1h = self._rotations(microbatch)
        plans = {}
        for index in classes:
            places = Places(microbatch, layout, index)
            plan = self._plan_varlen if self._varlen is not None else self._reference.plan_pieces
            plans[index] = CudaPlan(self._index(places.written), cos_T1h, sin_T1h, plan(microbatch, places))
        return plans

    def _rotations(self, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        angle_T1h = rope_angles(self._config, self._index(microbatch.position))
        cos, sin = angle_T1h.cos(), angle_T1h.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def _plan_varlen(self, microbatch: Microbatch, places: Places) -> VarlenPieces:
        first_S = microbatch.first.astype(np.int64)
        low_S = places.first_visible(first_S)
        length_S = microbatch.length.astype(np.int64)
        seen_S = first_S + length_S - low_S
        piece_P = np.repeat(np.arange(len(seen_S)), seen_S)
        position_P = np.arange(len(piece_P)) + np.repeat(low_S - (np.cumsum(seen_S) - seen_S), seen_S)
        return VarlenPieces(
            place_P=self._index(places.of(piece_P, position_P)),
            query_ends=self._ends(length_S),
            key_ends=self._ends(seen_S),
            most_queries=int(length_S.max()),
            most_keys=int(seen_S.max()),
            window=places.window,
        )

    def _ends(self, lengths_S: Int64Array) -> Tensor:
        return self._index(np.concatenate([[0], lengths_S.cumsum()])).to(torch.int32)

    def attention(self, layer: CudaLayer, rows_TD: Tensor, plan: CudaPlan, storage: Tensor, index: int) -> Tensor:
        config = self._config
        heads_TXh = F.linear(self._norm(rows_TD, layer.attention_norm_D), layer.qkv).unflatten(1, (-1, config.head_dim))
        turned_TXh = self._turned(heads_TXh[:, : config.heads + config.kv_heads], plan)
        queries_THh, keys_TKh = turned_TXh.split([config.heads, config.kv_heads], dim=1)
        # Places of all blocks in a row; views, so that writing reaches the storage.
        key_pool, value_pool = storage[index].flatten(1, 2).unbind(0)
        key_pool.index_copy_(0, plan.written_T, keys_TKh)
        value_pool.index_copy_(0, plan.written_T, heads_TXh[:, -config.kv_heads :])
        attended_THh = self._attend_pieces(queries_THh, key_pool, value_pool, plan.pieces)
        return rows_TD + F.linear(attended_THh.flatten(1), layer.o)

    def _turned(self, heads_TXh: Tensor, plan: CudaPlan) -> Tensor:
        """RoPE: the pairs (i, i + h/2) turned by their angles."""
        wide_TXh = heads_TXh.float()
        other_TXh = wide_TXh.roll(self._config.head_dim // 2, dims=-1)
        return torch.addcmul(wide_TXh * plan.cos_T1h, other_TXh, plan.sin_T1h).to(self._dtype)

    def _attend_pieces(
        self, queries_THh: Tensor, keys: Tensor, values: Tensor, pieces: ReferencePlan | VarlenPieces
    ) -> Tensor:
        if isinstance(pieces, ReferencePlan):
            return self._reference.attend_pieces(queries_THh, keys, values, pieces)
        assert self._varlen is not None
        attended_THh: Tensor = self._varlen(
            queries_THh.contiguous(),
            keys[pieces.place_P],
            values[pieces.place_P],
            pieces.query_ends,
            pieces.key_ends,
            pieces.most_queries,
            pieces.most_keys,
            scale=self._config.head_dim**-0.5,
            window_size=(-1 if pieces.window is None else pieces.window - 1, 0),
            **self._gqa_options,
        )
        return attended_THh

    def _norm(self, rows_TD: Tensor, weight_D: Tensor) -> Tensor:
        # The weight apart, so that rounding is the reference's: after the division and after the product.
        normed_TD: Tensor = F.rms_norm(rows_TD, (self._config.dim,), eps=self._config.norm_eps)
        return weight_D * normed_TD

    def experts(self, layer: CudaLayer, rows_TD: Tensor) -> Tensor:
        normed_TD = self._norm(rows_TD, layer.ffn_norm_D)
        if layer.gate is None:
            return rows_TD + F.linear(_gated(F.linear(normed_TD, layer.w13[0])), layer.w2[0])
        chosen = self._config.experts_per_token
        # Stable, so that of equal logits the lower expert comes first.
        ranked = F.linear(normed_TD, layer.gate).float().sort(dim=1, descending=True, stable=True)
        share_TA = ranked.values[:, :chosen].softmax(1)
        expert_TA = ranked.indices[:, :chosen]
        order = expert_TA.flatten().argsort(stable=True)
        # Rows up to the end of each expert's; a count by comparison, since torch's own would wait for the device.
        every_E = torch.arange(self._config.experts, device=self._device)
        ends_E = (expert_TA.flatten() == every_E[:, None]).sum(1).cumsum(0).to(torch.int32)
        hidden = _gated(F.grouped_mm(normed_TD[order // chosen], layer.w13.mT, offs=ends_E))
        outputs = F.grouped_mm(hidden, layer.w2.mT, offs=ends_E)
        outputs_TAD = torch.empty_like(outputs).index_copy_(0, order, outputs).unflatten(0, (-1, chosen))
        summed_TD: Tensor = rows_TD + (outputs_TAD * share_TA[..., None]).sum(1)
        return summed_TD.to(self._dtype)

    def blocks(self, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
        return one_by_one(self, blocks, rows_TD)

    def head(self, head: tuple[Tensor, Tensor], rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        norm_D, head_VD = head
        rows_MD = rows_TD if asked_M is None else rows_TD[self._index(asked_M)]
        return F.linear(self._norm(rows_MD, norm_D), head_VD).float()


def _gated(both: Tensor) -> Tensor:
    """SiLU of the first half of each row times the second. [.., F]"""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
