"""Reads a stage's own tensors from disk, one layer at a time, through memory maps.

D dim, H query heads, K KV heads, hd head_dim, F ffn_dim, E experts, V vocab. Matrices are [outputs, inputs].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.layouts import Slot
from tramontane.stages.safetensors_header import TensorInfo

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DIGESTED_BYTES = 4096
"""A tensor's digest covers so many of its first and of its last bytes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerWeights:
    """One decoder layer's tensors, in the stage's dtype. Where the file has that dtype they are views of the mapped
    file: pack or copy them, then drop this object.
    """

    attention_norm_D: Tensor
    q: Tensor
    """[H x hd, D]"""
    k: Tensor
    """[K x hd, D]"""
    v: Tensor
    """[K x hd, D]"""
    o: Tensor
    """[D, H x hd]"""
    ffn_norm_D: Tensor
    gate: Tensor | None
    """[E, D]; None in a dense model."""
    w1: list[Tensor]
    """Gate projections [F, D], one an expert; a dense model has one."""
    w2: list[Tensor]
    """Down projections [D, F]."""
    w3: list[Tensor]
    """Up projections [F, D]."""


class WeightReader:
    """The tensors of one stage. Each is read once (a tied embedding once as embedding and once as head)."""

    def __init__(
        self, checkpoint: Checkpoint, span: range, dtype: str, on_progress: Callable[[float], None] = lambda _: None
    ) -> None:
        """`span` are the stage's layers, `dtype` is what they are converted to.

        `on_progress` hears the fraction of the stage's bytes that have been handed out.
        """
        self._checkpoint = checkpoint
        self._dtype = TORCH_DTYPES[dtype]
        self._on_progress = on_progress
        self._files: dict[Path, Any] = {}
        self._unread = {name: checkpoint.tensors[name].size for name in checkpoint.owned(span)}
        self._total = self._left = sum(self._unread.values())
        self.digests: dict[str, bytes] = {}
        """SHA-256 over name, dtype, shape, first and last 4 KiB of each tensor read so far, by name; once all are read,
        of each that this stage owns."""

    @property
    def unread(self) -> tuple[str, ...]:
        """The tensors of this stage that nobody has asked for yet; none when the stage is complete."""
        return tuple(self._unread)

    def embedding(self) -> Tensor:
        """[V, D], in memory of its own."""
        return self._read(Slot("embedding")).clone()

    def norm(self) -> Tensor:
        """The norm before the head. [D], in memory of its own."""
        return self._read(Slot("norm")).clone()

    def head(self) -> Tensor:
        """The output head, or the embedding of a tied model. [V, D], perhaps a view of the mapped file.

        Raises:
            ValueError: a tied model's folder holds a head too, and it differs from the embedding.
        """
        if not self._checkpoint.config.tied:
            return self._read(Slot("head"))
        embedding = self._read(Slot("embedding"))
        name = self._checkpoint.slots.get(Slot("head"))
        if name is not None and not torch.equal(self._read(Slot("head")), embedding):
            file = self._checkpoint.tensors[name].file
            tied_to = self._checkpoint.slots[Slot("embedding")]
            raise ValueError(f"{file}: tie_word_embeddings is true, and tensor {name} differs from {tied_to}")
        return embedding

    def layer(self, index: int) -> LayerWeights:
        """Layer `index`, counted over the whole model."""
        experts = self._checkpoint.config.experts
        every = range(experts) if experts else (None,)
        return LayerWeights(
            attention_norm_D=self._read(Slot("attention_norm", index)).clone(),
            q=self._read(Slot("q", index)),
            k=self._read(Slot("k", index)),
            v=self._read(Slot("v", index)),
            o=self._read(Slot("o", index)),
            ffn_norm_D=self._read(Slot("ffn_norm", index)).clone(),
            gate=self._read(Slot("gate", index)) if experts else None,
            w1=[self._read(Slot("w1", index, expert)) for expert in every],
            w2=[self._read(Slot("w2", index, expert)) for expert in every],
            w3=[self._read(Slot("w3", index, expert)) for expert in every],
        )

    def _read(self, slot: Slot) -> Tensor:
        tensor = self._checkpoint.tensors[self._checkpoint.slots[slot]]
        if tensor.file not in self._files:
            # Maps the file; pages come from disk when they are touched.
            self._files[tensor.file] = safe_open(tensor.file, framework="pt")
        values: Tensor = self._files[tensor.file].get_tensor(tensor.name)
        if tensor.name not in self.digests:
            self.digests[tensor.name] = _digest(tensor, values)
        self._left -= self._unread.pop(tensor.name, 0)
        self._on_progress(1.0 - self._left / self._total)
        return values.to(self._dtype)


def _digest(tensor: TensorInfo, values: Tensor) -> bytes:
    """Over the mapped bytes themselves, so that it tells of just what the stage computes with."""
    content = values.reshape(-1).view(torch.uint8)
    first, last = content[:DIGESTED_BYTES], content[-DIGESTED_BYTES:]
    about = f"{tensor.name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode()
    return hashlib.sha256(about + first.numpy().tobytes() + last.numpy().tobytes()).digest()
