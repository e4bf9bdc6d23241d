"""The native CPU kernel set: C++ over vectors, one call for all blocks of a step. `interface.h` is where the two meet.

    vectors.hpp    a vector of 8 or 16 floats
    amx.hpp        products by AMX, for CPUs that have it
    tiles.hpp      how weights lie; the tile, the innermost loop of products; the step that attention shares
    groups.hpp     the same for 8 bits, in groups that share a scale
    products.hpp   products of some rows with a matrix, the norm
    cache.hpp      how keys and values lie
    attend.hpp     attention of some query rows
    attention.hpp  the first half of a block
    experts.hpp    the second half
    sampling.hpp   the next token of rows of logits
    team.hpp       the threads and the memory of a call
    engine.cpp     the functions that Python calls

A row's bits depend on its own sequence only: on no row beside it, no cut of its prompt, no place of a block, no number
of threads or stages. So a row that is computed again is the same row.

A step calls no torch operator that works on several threads: after it they would spin on the cores that ours need.

A variant is a build of all this for some instructions. Each matrix, attention, experts and head, may have another one
(`stages/variants.py`): nothing but rows passes between them.

Rows are float32, between the calls and between stages, and so is all arithmetic on them. What is rounded are weights
and the inputs of products. With bfloat16: to bfloat16, and so are queries, keys, values and the weights of attention.
With int8 (groups.hpp): every 32 neighbouring inputs, of each output and of each row, to whole numbers of -127 .. 127 by
the largest of them; keys and values as the model's dtype says. The gate and norms stay float32.

Letters: T rows, D dim, H query heads, K KV heads, hd head_dim, F ffn_dim, E experts, M some rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import Block, one_by_one
from tramontane.stages.kernels.native import build, interface, sampling
from tramontane.stages.kernels.native.build import NativeUnavailable
from tramontane.stages.kernels.native.engine import Engine
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import (
    BoolArray,
    Float32Array,
    Int32Array,
    Microbatch,
    SampledRows,
)
from tramontane.stages.variants import Variants, numbers_of
from tramontane.stages.weights import TORCH_DTYPES, LayerWeights, own_pages

__all__ = ["NativeKernels", "NativeUnavailable"]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight in panels."""

    memory: Tensor
    outputs: int
    inputs: int

    @property
    def struct(self) -> interface.Matrix:
        """What the library takes; the panels live as long as `self`."""
        return interface.Matrix(self.memory.data_ptr(), self.outputs, self.inputs)


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One layer's weights."""

    struct: interface.Layer
    kept: tuple[object, ...]
    """The memory that the struct points into."""


@dataclass(frozen=True, eq=False)
class PackedHead:
    """The final norm [D] and the output head [V, D]."""

    norm: Tensor
    matrix: PackedMatrix


@dataclass(frozen=True, eq=False)
class NativePlan:
    """One window class in one step."""

    struct: interface.Plan
    kept: tuple[Int32Array, ...]
    """The memory that the struct points into."""


class NativeKernels:
    """See the module's docstring. `Kernels` documents the methods.

    Raises:
        NativeUnavailable: the library cannot be had.
    """

    def __init__(self, config: ModelConfig, dtype: str, quantize: str | None, variants: Variants) -> None:
        engines = {name: Engine(name) for name in sorted(variants.names)}
        self._attention = engines[variants.attention]
        self._experts = engines[variants.experts]
        self._head = engines[variants.head]
        self._config = config
        self._dtype = TORCH_DTYPES[dtype]
        self._weights = interface.WEIGHTS[quantize or dtype]
        self._frequency = _frequency(config)
        self._shape = interface.Shape(
            config.dim,
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.ffn_dim,
            config.experts,
            config.experts_per_token,
            self._weights,
            dtype == "bfloat16",
            config.norm_eps,
            self._frequency.ctypes.data,
        )
        _, compiler = build.find_compiler()
        self.name = f"native-{variants}-{numbers_of(dtype, quantize)}@{build.source_digest()[:8]} {compiler}"
        self.row_invariant = True
        self.row_dtype = torch.float32
        self.torch_computes = False

    def pack_embedding(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    def pack_layer(self, weights: LayerWeights) -> PackedLayer:
        norms = weights.attention_norm_D.float(), weights.ffn_norm_D.float()
        qkv = self._pack(self._attention, _float32(weights.q, weights.k, weights.v))
        o = self._pack(self._attention, weights.o)
        gate = None if weights.gate is None else _float32(weights.gate)
        gate_up = [self._pack(self._experts, w1, w3) for w1, w3 in zip(weights.w1, weights.w3, strict=True)]
        down = [self._pack(self._experts, w2) for w2 in weights.w2]
        matrices = interface.Matrix * len(down)
        struct = interface.Layer(
            norms[0].data_ptr(),
            norms[1].data_ptr(),
            None if gate is None else gate.data_ptr(),
            qkv.struct,
            o.struct,
            matrices(*(each.struct for each in gate_up)),
            matrices(*(each.struct for each in down)),
        )
        return PackedLayer(struct, (norms, qkv, o, gate, gate_up, down))

    def pack_head(self, norm_D: Tensor, head_VD: Tensor) -> PackedHead:
        return PackedHead(norm_D.float(), self._pack(self._head, head_VD))

    def _pack(self, engine: Engine, first: Tensor, second: Tensor | None = None) -> PackedMatrix:
        """A matrix, or two of one shape interleaved, as the engine's variant takes it."""
        kind, library = self._weights, engine.library
        outputs, inputs = first.shape
        size = library.tramontane_packed_bytes(kind, outputs, inputs, second is not None)
        packed = own_pages((size,), torch.uint8)
        # Each copy lives for this call only.
        first = _float32(first)
        if second is None:
            library.tramontane_pack(kind, first.data_ptr(), None, outputs, inputs, packed.data_ptr())
            return PackedMatrix(packed, outputs, inputs)
        second = _float32(second)
        library.tramontane_pack(kind, first.data_ptr(), second.data_ptr(), outputs, inputs, packed.data_ptr())
        half = library.tramontane_panel_columns() // 2
        return PackedMatrix(packed, -(-outputs // half) * half * 2, inputs)

    def allocate(self, blocks: int, block: int, layers: int) -> Tensor:
        """[layers, blocks, numbers of a block]; `cache.hpp` has the picture."""
        numbers = self._attention.library.tramontane_cache_block(ctypes.byref(self._shape), block)
        return own_pages((layers, blocks, numbers), self._dtype)

    def fill(self, storage: Tensor, blocks: Int32Array, value: float) -> None:
        as_bits = torch.int16 if self._dtype == torch.bfloat16 else torch.int32  # numpy has no bfloat16
        numbers, bits = storage.view(as_bits).numpy(), torch.tensor(value, dtype=self._dtype).view(as_bits).item()
        for block in blocks.tolist():
            numbers[:, block] = bits

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, NativePlan]:
        return {index: self._plan(microbatch, layout, index) for index in classes}

    def _plan(self, microbatch: Microbatch, layout: KVLayout, index: int) -> NativePlan:
        table, block, ring = microbatch.tables[index], layout.block, layout.rings[index]
        kept = tuple(
            np.ascontiguousarray(each, np.int32)
            for each in (microbatch.first, microbatch.length, table.blocks, table.held)
        )
        pointers = (each.ctypes.data for each in kept)
        window = layout.windows[index] or 0
        struct = interface.Plan(len(microbatch.tokens), len(microbatch.first), *pointers, block, ring, window)
        # The library reads and writes wherever a table points.
        pool, pieces = layout.pool_blocks[index], len(microbatch.first)
        assert len(table.held) == pieces, f"{len(table.held)} rings of {pieces} pieces"
        flaw = self._attention.library.tramontane_plan_flaw(ctypes.byref(struct), len(table.blocks), pool)
        assert flaw is None, f"{flaw.decode()}: {table.held}, {len(table.blocks)} in all, a pool of {pool}"
        return NativePlan(struct, kept)

    def embed(self, embedding: Tensor, tokens_T: Int32Array) -> Tensor:
        return self._widen(embedding, np.ascontiguousarray(tokens_T, np.int32), len(tokens_T))

    def enter(self, rows_TD: Tensor) -> Tensor:
        return self._widen(rows_TD.contiguous(), None, len(rows_TD))

    def _widen(self, from_XD: Tensor, numbers_T: Int32Array | None, rows: int) -> Tensor:
        to_TD = torch.empty(rows, from_XD.shape[1])
        is_bfloat16 = from_XD.dtype == torch.bfloat16
        numbers = None if numbers_T is None else numbers_T.ctypes.data
        known = self._attention.call(
            "widen", is_bfloat16, from_XD.data_ptr(), len(from_XD), numbers, rows, from_XD.shape[1], to_TD.data_ptr()
        )
        assert known, f"rows {numbers_T} of {len(from_XD)}"
        return to_TD

    def leave(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.contiguous()

    def attention(self, layer: PackedLayer, rows_TD: Tensor, plan: NativePlan, storage: Tensor, index: int) -> Tensor:
        block = _block(Block(layer, plan, storage, index))
        rows_TD, after_TD = rows_TD.contiguous(), torch.empty_like(rows_TD, memory_format=torch.contiguous_format)
        self._attention.call("attention", self._shape, block, rows_TD.data_ptr(), after_TD.data_ptr())
        return after_TD

    def experts(self, layer: PackedLayer, rows_TD: Tensor) -> Tensor:
        rows_TD, after_TD = rows_TD.contiguous(), torch.empty_like(rows_TD, memory_format=torch.contiguous_format)
        self._experts.call(
            "experts",
            self._shape,
            layer.struct,
            len(rows_TD),
            rows_TD.data_ptr(),
            after_TD.data_ptr(),
        )
        return after_TD

    def blocks(self, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
        if self._attention is not self._experts:
            return one_by_one(self, blocks, rows_TD)
        structs = (interface.Block * len(blocks))(*map(_block, blocks))
        rows_TD = rows_TD.contiguous()
        self._attention.call("blocks", self._shape, structs, len(blocks), rows_TD.data_ptr(), rows_TD.data_ptr())
        return rows_TD

    def head(self, head: PackedHead, rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        rows_TD = rows_TD.contiguous()
        numbers = None if asked_M is None else np.ascontiguousarray(asked_M, np.int32)
        logits_MV = torch.empty(len(rows_TD if numbers is None else numbers), head.matrix.outputs)
        known = self._head.call(
            "head",
            self._shape,
            head.norm.data_ptr(),
            head.matrix.struct,
            len(logits_MV),
            rows_TD.data_ptr(),
            len(rows_TD),
            None if numbers is None else numbers.ctypes.data,
            logits_MV.data_ptr(),
        )
        assert known, f"rows {numbers} of {len(rows_TD)}"
        return logits_MV

    def sample(
        self, logits_MV: Tensor, rows: SampledRows, position_M: Int32Array, sampleable_ids: int
    ) -> tuple[Int32Array, Float32Array, BoolArray]:
        return sampling.sample(self._head, logits_MV, rows, position_M, sampleable_ids)

    def score(self, logits_KV: Tensor, target_K: Int32Array) -> Float32Array:
        return sampling.score(self._head, logits_KV, target_K)


def _frequency(config: ModelConfig) -> Float32Array:
    """RoPE's angle of one position, of each pair [hd / 2]: rounded to float32 where torch rounds, by code of our own.

    A power in float64, once rounded, is the same everywhere; torch's in float32 depends on the CPU.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.array([config.rope_theta**exponent for exponent in exponents.tolist()], np.float32)
    return np.float32(1.0) / powers


def _float32(*parts: Tensor) -> Tensor:
    """The rows of the matrices, one below the other, as the library takes them: float32 and contiguous."""
    if len(parts) == 1 and parts[0].dtype == torch.float32 and parts[0].is_contiguous():
        return parts[0]
    lengths = [len(part) for part in parts]
    rows = own_pages((sum(lengths), parts[0].shape[1]), torch.float32)
    for place, part in zip(rows.split(lengths), parts, strict=True):
        place.copy_(part)
    return rows


def _block(block: Block) -> interface.Block:
    storage = block.storage
    cache = storage.data_ptr() + block.place * storage.stride(0) * storage.itemsize
    return interface.Block(ctypes.addressof(block.layer.struct), ctypes.addressof(block.plan.struct), cache)
