"""The CPU kernel set: prepacked oneDNN products around attention over the paged ring.

Letters: T rows, D dim, H query heads, K KV heads, G = H / K, hd head_dim, h = hd, F ffn_dim, E experts, A experts a
token, P = T x A pairs of a token and an expert, M and N some rows, V vocabulary, C layers of a class.

bfloat16 without hardware for it: weights are widened to float32 at load, products are computed in float32 from values
rounded to bfloat16, and rounded to bfloat16 wherever the native product would be.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.stages import sampler
from tramontane.stages.config import ModelConfig
from tramontane.stages.kernels import Block, one_by_one, products
from tramontane.stages.kernels.cpu_attention import AttentionPlan, attend, plan_attention
from tramontane.stages.kernels.pairs import Pairs, each_product
from tramontane.stages.kernels.places import Places
from tramontane.stages.kernels.products import Product, native_bfloat16
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.microbatch import Int32Array, Microbatch
from tramontane.stages.weights import TORCH_DTYPES, LayerWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's packed weights. Products are given as [outputs, inputs]."""

    attention_norm: Tensor
    """[D]; in float32 times sqrt(D), see `_norm`."""
    qkv: Product
    """[(H + 2K) x hd, D]; queries and keys with each head's pairs (i, i + hd/2) side by side, as RoPE takes them."""
    o: Product
    """[D, H x hd]"""
    ffn_norm: Tensor
    """[D], as `attention_norm`."""
    gate: Product | None
    """[E, D]; None in a dense model."""
    w13: list[Product]
    """Gate above up projection [2F, D], one an expert; a dense model has one."""
    w2: list[Product]
    """Down projections [D, F]."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of the layers of one class."""

    whole: Tensor
    """[C, blocks + 1, block, 2 x K x hd]"""
    layers: list[Tensor]
    """Views of it, one a layer. [places, 2 x K x hd]"""


@dataclass(frozen=True, eq=False)
class Head:
    """The final norm and the output head."""

    norm: Tensor
    """[D], as `Layer.attention_norm`."""
    product: Product
    """[V, D]"""


class CpuKernels:
    """See the module's docstring. `Kernels` documents the methods."""

    sample = staticmethod(sampler.sample)
    score = staticmethod(sampler.score)

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self._config = config
        self._dtype = TORCH_DTYPES[dtype]
        widened = dtype == "bfloat16" and not native_bfloat16()
        # What products and attention are computed in; rows between the calls have it too.
        self._compute = torch.float32 if widened else self._dtype
        self._round: Callable[[Tensor], Tensor] = (lambda x: x.bfloat16().float()) if widened else (lambda x: x)
        self._scale = config.head_dim**-0.5
        self._root_dim = torch.tensor(math.sqrt(config.dim))
        self._root_eps = torch.tensor(math.sqrt(config.dim * config.norm_eps))
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self._frequency = 1.0 / config.rope_theta**exponent
        self.name = f"cpu-{'plain' if products.PACKED is None else 'onednn'}-{dtype}{'-widened' if widened else ''}"
        self.row_invariant = False
        self.row_dtype = self._dtype
        self.torch_computes = True
        if widened:
            log.info(
                "bfloat16 without instructions for it: weights are widened to float32 (twice the memory), products "
                "computed in float32 and rounded"
            )

    def pack_embedding(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    def pack_layer(self, weights: LayerWeights) -> Layer:
        heads, kv_heads = self._config.heads, self._config.kv_heads
        q, k = self._pair(weights.q, heads), self._pair(weights.k, kv_heads)
        return Layer(
            attention_norm=self._pack_norm(weights.attention_norm_D),
            qkv=self._product(torch.cat([q, k, weights.v])),
            o=self._product(weights.o),
            ffn_norm=self._pack_norm(weights.ffn_norm_D),
            gate=None if weights.gate is None else self._product(weights.gate),
            w13=[self._product(torch.cat(pair)) for pair in zip(weights.w1, weights.w3, strict=True)],
            w2=[self._product(w2) for w2 in weights.w2],
        )

    def pack_head(self, norm_D: Tensor, head_VD: Tensor) -> Head:
        return Head(self._pack_norm(norm_D), self._product(head_VD))

    def _product(self, weight: Tensor) -> Product:
        return Product(weight.to(self._compute))

    def _pair(self, weight: Tensor, heads: int) -> Tensor:
        """Rows of each head from (first half, second half) to pairs; queries and keys alike, so products stay."""
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    def _pack_norm(self, weight_D: Tensor) -> Tensor:
        # In float32 the constant of the norm goes into its weight; bfloat16 rounds between the two.
        return weight_D * self._root_dim if self._dtype == torch.float32 else weight_D.to(self._compute)

    def _norm(self, rows_TD: Tensor, weight_D: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps), cast, times the weight: x sqrt(D) / hypot(|x|, sqrt(D eps)).

        The fewest operators: each costs some microseconds, and a small model's decode step is made of them.
        """
        if self._dtype == torch.float32:
            length_T1 = torch.linalg.vector_norm(rows_TD, dim=1, keepdim=True)
            return rows_TD.div(torch.hypot(length_T1, self._root_eps)).mul_(weight_D)
        rows_TD = rows_TD.float()
        length_T1 = torch.linalg.vector_norm(rows_TD, dim=1, keepdim=True)
        normed_TD = rows_TD * (self._root_dim / torch.hypot(length_T1, self._root_eps))
        return self._round(self._round(normed_TD.to(self._compute)).mul_(weight_D))

    def allocate(self, blocks: int, block: int, layers: int) -> Cache:
        # One block more than the pool: its zeros are what padding reads.
        width = 2 * self._config.kv_heads * self._config.head_dim
        whole = torch.zeros(layers, blocks + 1, block, width, dtype=self._dtype)
        return Cache(whole, list(whole.view(layers, -1, width).unbind(0)))

    def fill(self, storage: Cache, blocks: Int32Array, value: float) -> None:
        storage.whole.index_fill_(1, torch.from_numpy(blocks.astype(np.int64)), value)

    def plan(self, microbatch: Microbatch, layout: KVLayout, classes: Sequence[int]) -> dict[int, AttentionPlan]:
        angle_Th = torch.from_numpy(microbatch.position).float()[:, None] * self._frequency
        rotation_T1h = torch.polar(torch.ones_like(angle_Th), angle_Th)[:, None]
        return {
            index: plan_attention(microbatch, Places(microbatch, layout, index), rotation_T1h, self._compute)
            for index in classes
        }

    def embed(self, embedding: Tensor, tokens_T: Int32Array) -> Tensor:
        return embedding.index_select(0, torch.from_numpy(tokens_T)).to(self._compute)

    def enter(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.to(self._compute, copy=True)

    def leave(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.to(self._dtype).contiguous()

    def attention(self, layer: Layer, rows_TD: Tensor, plan: AttentionPlan, storage: Cache, index: int) -> Tensor:
        config, pool = self._config, storage.layers[index]
        width = config.heads * config.head_dim
        qkv = self._round(layer.qkv(self._norm(rows_TD, layer.attention_norm)))
        self._rotate(qkv, plan.rotation)
        # The ring has room for window and chunk, so writing first and reading after is exact.
        pool.index_copy_(0, plan.written, qkv.narrow(1, width, pool.shape[1]).to(self._dtype))
        queries_TKGh = qkv.narrow(1, 0, width).view(len(qkv), config.kv_heads, -1, config.head_dim)
        attended = self._round(attend(queries_TKGh, pool, plan, self._scale))
        return self._round(self._round(layer.o(attended)).add_(rows_TD))

    def _rotate(self, qkv: Tensor, rotation: Tensor) -> None:
        """RoPE on the queries and keys, in place: each pair is a complex number that is turned."""
        heads = self._config.heads + self._config.kv_heads
        turned = qkv.narrow(1, 0, heads * self._config.head_dim).view(len(qkv), heads, -1, 2)
        wide = turned.float()  # the same memory where it is float32 already
        torch.view_as_complex(wide).mul_(rotation)
        if self._dtype != torch.float32:
            turned.copy_(wide.to(self._dtype))

    def experts(self, layer: Layer, rows_TD: Tensor) -> Tensor:
        normed_TD = self._norm(rows_TD, layer.ffn_norm)
        if layer.gate is None:
            hidden_TF = self._swiglu(self._round(layer.w13[0](normed_TD)))
            return self._round(self._round(layer.w2[0](hidden_TF)).add_(rows_TD))
        tokens, chosen = len(rows_TD), self._config.experts_per_token
        # Stable, so that of equal logits the lower expert comes first.
        ranked = torch.sort(self._round(layer.gate(normed_TD)).float(), stable=True, dim=1, descending=True)
        weight_TA = ranked.values.narrow(1, 0, chosen).softmax(1)
        pairs = Pairs.by_expert(ranked.indices.narrow(1, 0, chosen).numpy(), self._config.experts)
        hidden_PF = self._swiglu(self._round(each_product(layer.w13, pairs, pairs.inputs(normed_TD))))
        output_PD = self._round(each_product(layer.w2, pairs, hidden_PF.split(pairs.sizes)))
        if pairs.back is not None:
            output_PD = output_PD.index_select(0, pairs.back)
        # One product a row adds up its contributions by rank, in float32, onto the residual.
        output_TAD = output_PD.view(tokens, chosen, -1).float()
        summed_T1D = torch.baddbmm(rows_TD.unsqueeze(1).float(), weight_TA.unsqueeze(1), output_TAD)
        return self._round(summed_T1D.squeeze(1).to(self._compute))

    def _swiglu(self, both_NF: Tensor) -> Tensor:
        gate_NF, up_NF = both_NF.chunk(2, dim=1)
        return self._round(self._round(F.silu(gate_NF)).mul_(up_NF))

    def blocks(self, blocks: Sequence[Block], rows_TD: Tensor) -> Tensor:
        return one_by_one(self, blocks, rows_TD)

    def head(self, head: Head, rows_TD: Tensor, asked_M: Int32Array | None = None) -> Tensor:
        rows_MD = rows_TD if asked_M is None else rows_TD[torch.from_numpy(asked_M)]
        return self._round(head.product(self._norm(rows_MD, head.norm))).float()
