"""Products with prepacked weights on the CPU, and which dtype they are computed in.

oneDNN's operators for prepacked weights are private to torch: where they are missing, or do not take the dtype, the
product is a plain `linear`. On the machines measured (AVX2 and AVX512, torch 2.13) the packed float32 product gives a
row the same bits in every company; a plain one does not. A single row is the exception on some CPUs: there one row is
computed as two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_HINT = 32
"""oneDNN chooses the packed layout for about so many rows."""


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself. Without, plain products take 5 to 8 times as long as in float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported is not None and supported())


def _packed_operators() -> tuple[Any, Any] | None:
    try:
        return torch.ops.mkldnn._reorder_linear_weight.default, torch.ops.mkldnn._linear_pointwise.default
    except (AttributeError, RuntimeError):
        return None


PACKED = _packed_operators()


class Product:
    """rows [N, I] -> rows [N, O] with a packed weight [O, I]; `product(rows)` where `product = Product(weight)`."""

    __slots__ = ("_operator", "_pairs", "_weight")

    def __init__(self, weight_OI: Tensor) -> None:
        self._operator: Any = None
        self._pairs = False
        if PACKED is None:
            self._weight = weight_OI.contiguous()
        else:
            reorder, self._operator = PACKED
            self._weight = reorder(weight_OI.contiguous(), ROWS_HINT)
            self._pairs = self._single_row_differs(weight_OI)

    def __call__(self, rows_NI: Tensor) -> Tensor:
        """The product. The rows must be contiguous."""
        if self._operator is None:
            return F.linear(rows_NI, self._weight)
        if self._pairs and rows_NI.shape[0] == 1:
            return self(rows_NI.repeat(2, 1))[:1]
        product: Tensor = self._operator(rows_NI, self._weight, None, "none", [], "")
        return product

    def _single_row_differs(self, weight_OI: Tensor) -> bool:
        """Tried with rows of the weight itself, which have the right size and nothing special about them."""
        rows_NI = torch.stack([weight_OI[0], weight_OI[-1]])
        return not torch.equal(self(rows_NI[:1]), self(rows_NI)[:1])
