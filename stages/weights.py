"""Reads a stage's own tensors from disk, one layer at a time, each byte once.

What is read, and what it is converted to, lies in pages of its own (`own_pages`): dropped, they are the system's again.
Freed pieces of the heap would stay with the process, between packed weights that it keeps.

D dim, H query heads, K KV heads, hd head_dim, F ffn_dim, E experts, V vocab. Matrices are [outputs, inputs].
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.layouts import Slot
from tramontane.stages.safetensors_header import TensorInfo
from tramontane.stages.tensor_digest import Hashing

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerWeights:
    """One decoder layer's tensors, in the stage's dtype, in memory that goes when this object does.

    Nobody writes to them: they may still be hashed.
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
    """The tensors of one stage. Each is read once; who asks twice reads it twice, but for a tied embedding."""

    def __init__(
        self, checkpoint: Checkpoint, span: range, dtype: str, on_progress: Callable[[float], None] = lambda _: None
    ) -> None:
        """`span` are the stage's layers, `dtype` is what they are converted to.

        `on_progress` hears the fraction of the stage's bytes that have been handed out.
        """
        self._checkpoint = checkpoint
        self._dtype = TORCH_DTYPES[dtype]
        self._on_progress = on_progress
        self._tied: Tensor | None = None
        """The embedding of a tied model, once it is read."""
        self._unread = {name: checkpoint.tensors[name].size for name in checkpoint.owned(span)}
        self._total = self._left = sum(self._unread.values())
        self._hashing = Hashing()
        self._digests: dict[str, Future[bytes]] = {}
        """Of each tensor read so far, by name."""

    @property
    def unread(self) -> tuple[str, ...]:
        """The tensors of this stage that nobody has asked for yet; none when the stage is complete."""
        return tuple(self._unread)

    def digests(self) -> dict[str, bytes]:
        """Of each tensor read so far, over every byte, by name: once all are read, of each that this stage owns.

        They are taken from the bytes that were read, so they tell of just what the stage computes with. Waits for those
        that are not finished.
        """
        return {name: digest.result() for name, digest in self._digests.items()}

    def embedding(self) -> Tensor:
        """[V, D]; a tied model's may be the head, too, and must not be written to."""
        if not self._checkpoint.config.tied:
            return self._read(Slot("embedding"))
        if self._tied is None:
            self._tied = self._read(Slot("embedding"))
        return self._tied

    def norm(self) -> Tensor:
        """The norm before the head. [D]"""
        return self._read(Slot("norm"))

    def head(self) -> Tensor:
        """The output head, or the embedding of a tied model. [V, D]

        Raises:
            ValueError: a tied model's folder holds a head too, and it differs from the embedding.
        """
        if not self._checkpoint.config.tied:
            return self._read(Slot("head"))
        embedding = self.embedding()
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
            attention_norm_D=self._read(Slot("attention_norm", index)),
            q=self._read(Slot("q", index)),
            k=self._read(Slot("k", index)),
            v=self._read(Slot("v", index)),
            o=self._read(Slot("o", index)),
            ffn_norm_D=self._read(Slot("ffn_norm", index)),
            gate=self._read(Slot("gate", index)) if experts else None,
            w1=[self._read(Slot("w1", index, expert)) for expert in every],
            w2=[self._read(Slot("w2", index, expert)) for expert in every],
            w3=[self._read(Slot("w3", index, expert)) for expert in every],
        )

    def _read(self, slot: Slot) -> Tensor:
        tensor = self._checkpoint.tensors[self._checkpoint.slots[slot]]
        content = own_pages((tensor.size,), torch.uint8)
        _read_into(tensor, content.numpy().data)
        if tensor.name not in self._digests:
            self._digests[tensor.name] = self._hashing.digest(tensor, content.numpy().data)
        self._left -= self._unread.pop(tensor.name, 0)
        self._on_progress(1.0 - self._left / self._total)
        values = content.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
        if values.dtype == self._dtype:
            return values
        return own_pages(tensor.shape, self._dtype).copy_(values)


def own_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor, all 0, of fresh pages that go back to the system with its last view."""
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # In small pages their faults would cost as much as all the reading; a kernel without large ones refuses.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def _read_into(tensor: TensorInfo, content: memoryview) -> None:
    """Read a tensor's bytes into `content`.

    They are copied, not mapped: a file that shrinks meanwhile is an error, not a signal.

    Raises:
        ValueError: the file ends before the tensor does.
    """
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        read = 0
        while read < tensor.size:
            count = stream.readinto(content[read:])
            if not count:
                end, ends = tensor.start + tensor.size, tensor.start + read
                raise ValueError(
                    f"{tensor.file}: truncated: tensor {tensor.name} ends at byte {end}, the file at {ends}"
                )
            read += count
