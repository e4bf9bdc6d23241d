"""The CUDA kernel set: plain torch operators, attention by `torch.nn.attention.varlen`.

It is the reference set with one change: in bfloat16 all pieces' attention is one call of Flash Attention on packed
lengths, with grouped heads and the window. float32, which Flash Attention does not take, stays with the reference.

Flash Attention 2, which torch builds in, reads a block table only with pages of a multiple of 256 rows, and ours are
smaller: so the positions that a piece sees are gathered in order first. They end with the piece's last query, and that
is where Flash Attention aligns window and causality; that they start inside a block does not matter then.

What is tested where: the planning, and with it every argument of the call, on the CPU with a plain stand-in for
`varlen_attn`; the rest by tests marked `gpu`, on a machine that has one.

Letters: T rows, S pieces, P places seen by all pieces one after another, H query heads, K KV heads, h head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels.places import Places
from tramontane.stages.kernels.reference import ReferenceKernels, ReferencePlan
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int64Array, Microbatch


@dataclass(frozen=True, eq=False)
class VarlenPlan(ReferencePlan):
    """The arguments of `varlen_attn` that the layers of one window class share."""

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


class CudaKernels(ReferenceKernels):
    """See the module's docstring. `attend` takes the place of `varlen_attn`, for any dtype."""

    def __init__(
        self, config: ModelConfig, dtype: str, device: str, attend: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__(config, dtype, device)
        self._varlen: Callable[..., Any] | None = attend
        if attend is None and dtype == "bfloat16":
            from torch.nn.attention.varlen import varlen_attn

            self._varlen = varlen_attn
        self.name = f"cuda-{'plain' if self._varlen is None else 'varlen'}-{dtype}"

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, ReferencePlan]:
        """The reference's plan, and what `varlen_attn` takes beside it."""
        plans = super().plan(microbatch, layout, classes)
        if self._varlen is None:
            return plans
        return {
            index: self._plan_varlen(microbatch, Places(microbatch, layout, index), plan)
            for index, plan in plans.items()
        }

    def _plan_varlen(self, microbatch: Microbatch, places: Places, plan: ReferencePlan) -> VarlenPlan:
        first_S = microbatch.first.astype(np.int64)
        low_S = places.first_visible(first_S)
        length_S = microbatch.length.astype(np.int64)
        seen_S = first_S + length_S - low_S
        piece_P = np.repeat(np.arange(len(seen_S)), seen_S)
        position_P = np.arange(len(piece_P)) + np.repeat(low_S - (np.cumsum(seen_S) - seen_S), seen_S)
        return VarlenPlan(
            **vars(plan),
            place_P=self._index(places.of(piece_P, position_P)),
            query_ends=self._ends(length_S),
            key_ends=self._ends(seen_S),
            most_queries=int(length_S.max()),
            most_keys=int(seen_S.max()),
        )

    def _ends(self, lengths_S: Int64Array) -> Tensor:
        return self._index(np.concatenate([[0], lengths_S.cumsum()])).to(torch.int32)

    def _attend_all(self, queries_THh: Tensor, keys: Tensor, values: Tensor, plan: ReferencePlan) -> Tensor:
        if self._varlen is None or not isinstance(plan, VarlenPlan):
            return super()._attend_all(queries_THh, keys, values, plan)
        attended_THh: Tensor = self._varlen(
            queries_THh,
            keys[plan.place_P],
            values[plan.place_P],
            plan.query_ends,
            plan.key_ends,
            plan.most_queries,
            plan.most_keys,
            scale=self._config.head_dim**-0.5,
            window_size=(-1 if plan.window is None else plan.window - 1, 0),
            enable_gqa=self._config.kv_heads < self._config.heads,
        )
        return attended_THh
