"""The small interface between a stage and what computes its blocks, and the choice of a kernel set.

It stands at the height of a block: one call for attention with its norm and residual, one for the experts with theirs.
Packed weights, plans and KV storage are opaque to everything above, so that a kernel set is free to lay them out and
to fuse as it likes.

Letters: T rows of the microbatch, D model dim, M some rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from tramontane.stages.config import ModelConfig
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int32Array, Microbatch
from tramontane.stages.weights import LayerWeights

PackedEmbedding: TypeAlias = Any
PackedLayer: TypeAlias = Any
PackedHead: TypeAlias = Any
KVStorage: TypeAlias = Any
"""Keys and values of some layers of one window class."""
Plan: TypeAlias = Any
"""All that the layers of one window class share in one step: where keys go, what each row sees, rotations."""

NAMES = ("cpu", "cuda", "reference")


class Kernels(Protocol):
    """What computes the blocks of a decoder on one device.

    Rows enter and leave `attention` and `experts` holding values of the model's dtype, so that a model cut into stages
    gives the same bits as the whole.
    """

    @property
    def name(self) -> str:
        """The kernel set and its variant, for the numerics id."""

    @property
    def row_invariant(self) -> bool:
        """Whether a row's bits depend neither on its company nor on how its prompt was cut into chunks."""

    def pack_embedding(self, embedding_VD: Tensor) -> PackedEmbedding:
        """Lay out the embedding; the original may be dropped."""

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        """Lay out one layer's weights; the originals may be dropped."""

    def pack_head(self, norm_D: Tensor, head_VD: Tensor) -> PackedHead:
        """Lay out the final norm and the output head; the originals may be dropped."""

    def allocate(self, blocks: int, block: int, layers: int) -> KVStorage:
        """Storage of `blocks` blocks of `block` positions for each of `layers` layers of one class."""

    def fill(self, storage: KVStorage, blocks: Int32Array, value: float) -> None:
        """Set every key and value of the given blocks, in all layers."""

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, Plan]:
        """Prepare a step for the given window classes (places in `layout.windows`)."""

    def embed(self, embedding: PackedEmbedding, tokens_T: Int32Array) -> Tensor:
        """The rows [T, D] that enter layer 0."""

    def enter(self, rows_TD: Tensor) -> Tensor:
        """Rows that another stage sent, in the model's dtype on the CPU, as the blocks take them."""

    def leave(self, rows_TD: Tensor) -> Tensor:
        """Rows as they travel: the model's dtype, contiguous, on the CPU."""

    def attention(self, layer: PackedLayer, rows_TD: Tensor, plan: Plan, storage: KVStorage, index: int) -> Tensor:
        """Norm, queries, keys and values, RoPE, KV write, attention, output product, residual.

        `index` is the layer's place among those that share `storage`.
        """

    def experts(self, layer: PackedLayer, rows_TD: Tensor) -> Tensor:
        """Norm, gate, the chosen experts (or the one FFN of a dense model), residual."""

    def head(self, head: PackedHead, rows_MD: Tensor) -> Tensor:
        """Norm and output product: float32 logits [M, V]."""


def choose_kernels(config: ModelConfig, *, dtype: str, device: str, name: str | None = None) -> Kernels:
    """The kernel set of that name, by default the one made for the device.

    Raises:
        ValueError: there is no such set, it does not run on the device, or the device is not there.
    """
    chosen = name or torch.device(device).type
    if chosen not in NAMES:
        raise ValueError(f"kernels is {chosen!r}; supported: {', '.join(NAMES)}")
    if chosen in ("cpu", "cuda") and chosen != torch.device(device).type:
        raise ValueError(f"kernels is {chosen!r}, and device is {device!r}; these kernels run on {chosen!r} only")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and this process sees no CUDA device")
    if chosen == "reference":
        from tramontane.stages.kernels.reference import ReferenceKernels

        return ReferenceKernels(config, dtype, device)
    if chosen == "cuda":
        from tramontane.stages.kernels.cuda import CudaKernels

        return CudaKernels(config, dtype, device)
    from tramontane.stages.kernels.cpu import CpuKernels

    return CpuKernels(config, dtype)
