"""What a stage takes in memory beside its keys and values, from the model's shape alone. No torch.

The figures are those of the native CPU kernels, of CUDA's the weights and about the buffers. torch's own products on
CPUs, which serve where there is no compiler, hold bfloat16 weights in float32: twice as much.

Letters: D dim, H heads, K KV heads, h head_dim, F ffn_dim, E experts, A experts a token, V vocabulary, T rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tramontane.stages.config import DTYPE_BYTES, ModelConfig
from tramontane.stages.layouts import Slot, slots, tensor_shape

FLOAT32_ROLES = ("attention_norm", "ffn_norm", "norm", "gate")
"""Held in float32, whatever the model's dtype."""
INT8_GROUP, INT8_SCALE_BYTES, INT8_UNIT_BYTES = 32, 2, 4
"""Of a matrix in 8 bits: weights that share a scale, the scale, and the unit that the scales of an output share."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes. A stage needs its weights, and with them first what loading takes, later its KV and the buffers."""

    weights: int
    loading: int
    """While a layer is read and packed; given back before there are keys and values."""
    buffers: int
    """Of a step of as many rows as there may be."""

    def need(self, kv: int) -> int:
        """The most that it has at any time, with so many bytes of keys and values.

        >>> StageMemory(weights=100, loading=30, buffers=10).need(kv=5), StageMemory(
        ...     weights=100, loading=30, buffers=10
        ... ).need(kv=50)
        (130, 160)
        """
        return self.weights + max(self.loading, kv + self.buffers)


def stage_memory(config: ModelConfig, span: range, *, dtype: str, quantize: str | None, rows: int) -> StageMemory:
    """Of the stage that has the layers of `span`, and steps of so many rows at most."""
    held = {slot: _bytes(slot, config, dtype, quantize) for slot in _slots(config, span)}
    as_read = {slot: _bytes(slot, config, dtype, None) for slot in held}
    # A layer is read whole and then packed, two matrices at a time at most, by way of float32.
    layer = sum(size for slot, size in as_read.items() if slot.layer == span.start)
    single = max(size for slot, size in as_read.items() if slot.role in ("embedding", "head")) if _has_ends(held) else 0
    largest = max(math.prod(tensor_shape(slot, config)) for slot in held)
    return StageMemory(
        weights=sum(held.values()), loading=max(layer, single) + 2 * 4 * largest, buffers=_buffers(config, span, rows)
    )


def _slots(config: ModelConfig, span: range) -> Iterator[Slot]:
    """The places of the model that a stage fills. A tied embedding serves as head, too, and is packed for it."""
    ends = set()
    if span.start == 0:
        ends.add("embedding")
    if span.stop == config.layers:
        ends |= {"norm", "head"}
    every = [*slots(config), *([Slot("head")] if config.tied else [])]
    return (slot for slot in every if (slot.role in ends if slot.layer is None else slot.layer in span))


def _has_ends(held: dict[Slot, int]) -> bool:
    return any(slot.role in ("embedding", "head") for slot in held)


def _bytes(slot: Slot, config: ModelConfig, dtype: str, quantize: str | None) -> int:
    shape = tensor_shape(slot, config)
    numbers = math.prod(shape)
    if slot.role in FLOAT32_ROLES:
        return 4 * numbers
    if quantize is None or slot.role == "embedding":
        return DTYPE_BYTES[dtype] * numbers
    outputs, inputs = shape
    return outputs * (math.ceil(inputs / INT8_GROUP) * (INT8_GROUP + INT8_SCALE_BYTES) + INT8_UNIT_BYTES)


def _buffers(config: ModelConfig, span: range, rows: int) -> int:
    """Activations in float32, each kept apart: what a step takes at most, not what is in use at one moment."""
    heads, kv_heads, chosen = config.heads, config.kv_heads, config.experts_per_token or 1
    attention = 4 * config.dim + (3 * heads + 2 * kv_heads) * config.head_dim
    experts = 2 * config.dim + config.experts + chosen * (2 * config.ffn_dim + config.dim)
    head = 2 * config.vocab if span.stop == config.layers else 0
    return 4 * rows * (attention + experts + head)
