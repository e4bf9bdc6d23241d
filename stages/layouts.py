"""Where a checkpoint keeps each tensor: one table of names and one of shapes. No torch.

A `Slot` says what a tensor is for; a layout says what the file calls it. Another format is another table of names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tramontane.stages.config import ModelConfig


class Slot(NamedTuple):
    """The place of one tensor in the model."""

    role: str
    """A key of `SHAPES`."""
    layer: int | None = None
    expert: int | None = None


# D dim, Q heads x head_dim, K kv_heads x head_dim, F ffn_dim, E experts, V vocab. Matrices are [outputs, inputs].
SHAPES = {
    "embedding": "VD",
    "attention_norm": "D",
    "q": "QD",
    "k": "KD",
    "v": "KD",
    "o": "DQ",
    "ffn_norm": "D",
    "gate": "ED",
    "w1": "FD",
    "w2": "DF",
    "w3": "FD",
    "norm": "D",
    "head": "VD",
}

HUGGING_FACE = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "o": "model.layers.{layer}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
HUGGING_FACE_DENSE = HUGGING_FACE | {
    "w1": "model.layers.{layer}.mlp.gate_proj.weight",
    "w2": "model.layers.{layer}.mlp.down_proj.weight",
    "w3": "model.layers.{layer}.mlp.up_proj.weight",
}
HUGGING_FACE_SPARSE = HUGGING_FACE | {
    "gate": "model.layers.{layer}.block_sparse_moe.gate.weight",
    "w1": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    "w2": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    "w3": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
}


def slots(config: ModelConfig) -> Iterator[Slot]:
    """Every tensor of the model, in the order of the forward pass; a tied model has no head of its own."""
    yield Slot("embedding")
    for layer in range(config.layers):
        for role in ("attention_norm", "q", "k", "v", "o", "ffn_norm"):
            yield Slot(role, layer)
        if config.experts:
            yield Slot("gate", layer)
        for expert in range(config.experts) if config.experts else (None,):
            for role in ("w1", "w2", "w3"):
                yield Slot(role, layer, expert)
    yield Slot("norm")
    if not config.tied:
        yield Slot("head")


def tensor_name(slot: Slot, config: ModelConfig) -> str:
    """What the checkpoint calls it.

    >>> from tramontane.stages.config import EXAMPLE
    >>> tensor_name(Slot("w2", layer=3, expert=1), EXAMPLE)
    'model.layers.3.block_sparse_moe.experts.1.w2.weight'
    """
    names: Mapping[str, str] = HUGGING_FACE_SPARSE if config.experts else HUGGING_FACE_DENSE
    return names[slot.role].format(layer=slot.layer, expert=slot.expert)


def tensor_shape(slot: Slot, config: ModelConfig) -> tuple[int, ...]:
    """The shape that it must have.

    >>> from tramontane.stages.config import EXAMPLE
    >>> tensor_shape(Slot("k", layer=0), EXAMPLE)
    (16, 16)
    """
    sizes = {
        "D": config.dim,
        "Q": config.heads * config.head_dim,
        "K": config.kv_heads * config.head_dim,
        "F": config.ffn_dim,
        "E": config.experts,
        "V": config.vocab,
    }
    return tuple(sizes[letter] for letter in SHAPES[slot.role])
