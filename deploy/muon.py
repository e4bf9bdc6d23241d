"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic iteration of that text, chosen for speed: singular values land near 1, not on it.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(gradient: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, about. [..., rows, columns]"""
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[-2] > gradient.shape[-1]
    x: Tensor = gradient.mT if tall else gradient
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return torch.as_tensor(x.mT if tall else x)


class Muon(torch.optim.Optimizer):
    """For weight matrices, stacked ones too; everything else wants AdamW."""

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; a closure is not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(velocity, group["momentum"]))  # Nesterov's look ahead
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)
