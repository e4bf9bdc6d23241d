"""The part that the torch kernel sets share: moving rows to a device and back, and the layout of KV.

Nothing here rounds, so that the sets remain independent where they compute, and can be compared with each other.

Letters: T rows, D dim, V vocabulary, K KV heads, h head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.config import ModelConfig
from tramontane.stages.microbatch import Int32Array, Int64Array
from tramontane.stages.weights import TORCH_DTYPES


class TorchRows:
    """The base class of `ReferenceKernels` and `CudaKernels`; `Kernels` documents the methods."""

    def __init__(self, config: ModelConfig, dtype: str, device: str) -> None:
        self._config = config
        self._dtype = self.row_dtype = TORCH_DTYPES[dtype]
        self._device = torch.device(device)

    def pack_embedding(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD.to(self._device)

    def pack_head(self, norm_D: Tensor, head_VD: Tensor) -> tuple[Tensor, Tensor]:
        return norm_D.to(self._device), head_VD.to(self._device, copy=True)

    def allocate(self, blocks: int, block: int, layers: int) -> Tensor:
        """Zeros. [layers, keys or values, blocks, block, K, h]"""
        shape = (layers, 2, blocks, block, self._config.kv_heads, self._config.head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def fill(self, storage: Tensor, blocks: Int32Array, value: float) -> None:
        storage[:, :, self._index(blocks)] = value

    def embed(self, embedding: Tensor, tokens_T: Int32Array) -> Tensor:
        return embedding[self._index(tokens_T)]

    def enter(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.to(self._device, copy=True)

    def leave(self, rows_TD: Tensor) -> Tensor:
        return rows_TD.cpu().contiguous()

    def _index(self, values: Int32Array | Int64Array) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)


def rope_angles(config: ModelConfig, position_T: Tensor) -> Tensor:
    """The angle of each pair of a row, the same for all heads: position x theta^(-2i/h) in float32. [T, 1, h / 2]"""
    half = config.head_dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position_T.device) * 2 / config.head_dim
    return (position_T.float()[:, None] * (1.0 / config.rope_theta**exponent))[:, None]
