"""Computes the memory that a stage takes beside its keys and values, from the model's shape alone. No torch.

The results hold for the native CPU kernels. For CUDA the weights hold, and the buffers roughly. torch's own products,
which serve on CPUs without a compiler, hold bfloat16 weights in float32 on some CPUs, which is twice as much.

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
    """Bytes. A stage needs `weights` all the time, `loading` beside them at first, and later its KV and `buffers`."""

    weights: int
    loading: int
    """What reading and packing a layer takes; given back before there are keys and values."""
    buffers: int
    """What the largest step takes."""

    def need(self, kv: int) -> int:
        """The most that the stage takes at any time, with so many bytes of keys and values.

        >>> StageMemory(weights=100, loading=30, buffers=10).need(kv=5), StageMemory(
        ...     weights=100, loading=30, buffers=10
        ... ).need(kv=50)
        (130, 160)
        """
        return self.weights + max(self.loading, kv + self.buffers)


def stage_memory(config: ModelConfig, span: range, *, dtype: str, quantize: str | None, rows: int) -> StageMemory:
    """The memory of the stage that has the layers of `span`, and whose steps have at most `rows` rows."""
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
    """The tensors that a stage holds. A tied embedding serves as head, too, and is packed once more for that."""
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
    """The activations of a step in float32, all of them together, though not all are in use at one moment."""
    heads, kv_heads, chosen = config.heads, config.kv_heads, config.experts_per_token or 1
    attention = 4 * config.dim + (3 * heads + 2 * kv_heads) * config.head_dim
    experts = 2 * config.dim + config.experts + chosen * (2 * config.ffn_dim + config.dim)
    head = 2 * config.vocab if span.stop == config.layers else 0
    return 4 * rows * (attention + experts + head)
