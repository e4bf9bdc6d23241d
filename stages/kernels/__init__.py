"""The small interface between a stage and what computes its blocks, and the choice of a kernel set.

It stands at the height of a block: one call for attention with its norm and residual, one for the experts with theirs.
Packed weights, plans and KV storage are opaque to everything above, so that a kernel set is free to lay them out and
to fuse as it likes.

Letters: T rows of the microbatch, D model dim, M some rows, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from tramontane.stages.config import ModelConfig
from tramontane.stages.cpu import this_cpu
from tramontane.stages.kernel_choice import NodeKernels, choose_variants, decide, table_speeds
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import BoolArray, Float32Array, Int32Array, Microbatch, SampledRows
from tramontane.stages.variants import KernelChoice, check_requested, kernel_set, numbers_of
from tramontane.stages.weights import LayerWeights

PackedEmbedding: TypeAlias = Any
PackedLayer: TypeAlias = Any
PackedHead: TypeAlias = Any
KVStorage: TypeAlias = Any
"""Keys and values of some layers of one window class."""
Plan: TypeAlias = Any
"""All that the layers of one window class share in one step: where keys go, what each row sees, rotations."""

log = logging.getLogger(__name__)


class Block(NamedTuple):
    """One layer in one step, as `Kernels.attention` takes it."""

    layer: PackedLayer
    plan: Plan
    storage: KVStorage
    place: int
    """The layer's, among those that share the storage."""


class Kernels(Protocol):
    """What computes the blocks of a decoder on one device.

    Rows enter and leave `attention` and `experts` holding values of `row_dtype`, in which they travel, so that a model
    cut into stages gives the same bits as the whole.
    """

    @property
    def name(self) -> str:
        """The kernel set, its variant and what else decides its rounding, for the numerics id."""

    @property
    def row_invariant(self) -> bool:
        """Whether a row's bits depend neither on its company nor on how its prompt was cut into chunks."""

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype of rows between blocks and between stages."""

    @property
    def torch_computes(self) -> bool:
        """Whether rounding depends on torch and the device, and not on the name alone."""

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
        """A copy of rows that another stage sent, in `row_dtype` on the CPU, as the blocks take them."""

    def leave(self, rows_TD: Tensor) -> Tensor:
        """Rows as they travel: `row_dtype`, contiguous, on the CPU."""

    def attention(self, layer: PackedLayer, rows_TD: Tensor, plan: Plan, storage: KVStorage, index: int) -> Tensor:
        """Norm, queries, keys and values, RoPE, KV write, attention, output product, residual.

        `index` is the layer's place among those that share `storage`.
        """

    def experts(self, layer: PackedLayer, rows_TD: Tensor) -> Tensor:
        """Norm, gate, the chosen experts (or the one FFN of a dense model), residual."""

    def blocks(self, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
        """`attention` and `experts` of some blocks in a row, perhaps in place; `one_by_one` will do for any set."""

    def head(self, head: PackedHead, rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        """Norm and output product of all rows [T, D], or of those with the numbers `asked_M`: float32 logits [M, V]."""

    def sample(
        self, logits_MV: Tensor, rows: SampledRows, position_M: Int32Array, sampleable_ids: int
    ) -> tuple[Int32Array, Float32Array, BoolArray]:
        """Choose each row's next token; `sampler.sample`, which is good enough for any set, says how."""

    def score(self, logits_KV: Tensor, target_K: Int32Array) -> Float32Array:
        """Log probability of each row's target, as `sampler.score`."""


def one_by_one(kernels: Kernels, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
    """The blocks, with a call for each half of each."""
    for block in blocks:
        rows_TD = kernels.attention(block.layer, rows_TD, block.plan, block.storage, block.place)
        rows_TD = kernels.experts(block.layer, rows_TD)
    return rows_TD


def choose_kernels(
    config: ModelConfig, *, dtype: str, device: str, name: KernelChoice | str | None = None, quantize: str | None = None
) -> Kernels:
    """The kernels that were chosen; else the set or variant of that name, or of the name in `TRAMONTANE_KERNELS`, else
    the best for the device that runs.

    `quantize` "int8" holds the weights of all products in 8 bits, which native kernels can do.

    Raises:
        ValueError: there is no such set, it does not run on the device or not here, the device is not there, or the set
            does not take the model's sizes.
    """
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and this process sees no CUDA device")
    if not isinstance(name, KernelChoice):
        requested = name or os.environ.get("TRAMONTANE_KERNELS") or None
        check_requested(requested, device=device, quantize=quantize)
        name = choose_here(requested, dtype=dtype, device=kind, quantize=quantize)
    if name.kernels == "reference":
        from tramontane.stages.kernels.reference import ReferenceKernels

        return ReferenceKernels(config, dtype, device)
    if name.kernels == "cuda":
        from tramontane.stages.kernels.cuda import CudaKernels

        return CudaKernels(config, dtype, device)
    if name.kernels == "native":
        from tramontane.stages.kernels.native import NativeKernels, NativeUnavailable

        assert name.variants is not None, f"{name} without variants"
        try:
            return NativeKernels(config, dtype, quantize, name.variants)
        except NativeUnavailable as reason:
            raise ValueError(f"the {name} kernels, which all stages compute with, are not there: {reason}") from None
    from tramontane.stages.kernels.cpu import CpuKernels

    return CpuKernels(config, dtype)


def choose_here(requested: str | None, *, dtype: str, device: str, quantize: str | None) -> KernelChoice:
    """The kernels of a stage that runs by itself, outside a service; logs why where they are not native.

    Raises:
        ValueError: what is requested does not run here.
    """
    if device == "cuda":
        return KernelChoice(kernels=requested or "cuda")
    numbers = numbers_of(dtype, quantize)
    here = kernels_here("", numbers, requested)
    decision = decide([here], numbers, requested, lambda cpu: table_speeds(cpu, numbers))
    for remark in decision.remarks:
        log.warning("%s", remark)
    return decision.stages[0]


def kernels_here(node: str, numbers: str, requested: str | None) -> NodeKernels:
    """The facts of this machine by which kernels are chosen. Compiles the variants that it would choose by itself."""
    from tramontane.stages.kernels.native import build

    facts = NodeKernels(node, this_cpu(), "")
    candidates = [name for name in facts.variants(numbers) if requested in (None, "native", name)]
    if kernel_set(requested) != "native" or not candidates:
        return facts
    speeds = table_speeds(facts.cpu, numbers)
    chosen = choose_variants(candidates, [] if speeds is None else [speeds])
    return replace(facts, obstacle=build.obstacle(sorted(chosen.names)))
