"""Rows grouped by the expert that they go to, so that an expert is one product over all of its tokens.

Letters: T rows, D dim, A experts a token, P = T x A pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tramontane.stages.kernels.products import Product
from tramontane.stages.microbatch import Int64Array


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a token and an expert that it chose, sorted by expert.

    Two tokens that chose the experts [[2, 0], [0, 3]]:

        experts = [0, 2, 3]    sizes = [2, 1, 1]    token = [0, 1, 0, 1]    back = [2, 0, 1, 3]
    """

    experts: list[int]
    """Those that any token chose."""
    sizes: list[int]
    """How many pairs each of them has."""
    token: Tensor | None
    """The token of each pair [P]; None where there is only one token."""
    back: Tensor | None
    """Where the pair (token, rank) has gone, in the order of tokens and ranks [P]; None where all stayed in place."""

    @classmethod
    def by_expert(cls, chosen_TA: Int64Array, experts: int) -> Pairs:
        """Sort the experts that some tokens chose, given by rank; the layer has `experts` of them."""
        tokens, ranks = chosen_TA.shape
        if tokens == 1:
            # The order of ranks does as well.
            return cls(chosen_TA[0].tolist(), [1] * ranks, None, None)
        flat_P = chosen_TA.reshape(-1)
        order_P = np.argsort(flat_P, kind="stable")
        back_P = np.empty_like(order_P)
        back_P[order_P] = np.arange(len(order_P))
        sizes = np.bincount(flat_P, minlength=experts).tolist()
        used = [expert for expert, size in enumerate(sizes) if size]
        return cls(
            used, [sizes[expert] for expert in used], torch.from_numpy(order_P // ranks), torch.from_numpy(back_P)
        )

    def inputs(self, rows_TD: Tensor) -> Sequence[Tensor]:
        """The rows that each expert takes, in the order of `experts`. [size, D] each"""
        if self.token is None:
            return [rows_TD] * len(self.experts)
        inputs: tuple[Tensor, ...] = rows_TD.index_select(0, self.token).split(self.sizes)
        return inputs


def each_product(weights: list[Product], pairs: Pairs, inputs: Sequence[Tensor]) -> Tensor:
    """Each expert's rows through its product, one expert after another. [P, outputs]

    `weights` has one [outputs, inputs] for every expert of the layer, `inputs` the rows of each in `pairs.experts`.
    """
    return torch.cat([weights[expert](rows) for expert, rows in zip(pairs.experts, inputs, strict=True)])
