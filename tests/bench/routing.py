"""How many experts the rows of a decode step really touch: the limits of decode are made of that.

If rows chose evenly and each for itself, 8 rows of `mid` would touch 7.2 of 8 experts. Rows of random models come near
that as long as they differ; those that have fallen into the same loop choose alike. So it is counted: a run of ours in
which each layer's choice is made a second time beside the kernels, from the checkpoint's own norm and gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bench.children import in_child
from bench.inprocess import InProcess
from bench.workloads import Workload
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.kernels import one_by_one
from tramontane.stages.layouts import Slot
from tramontane.stages.microbatch import Microbatch


class Counting:
    """A kernel set that counts before it computes. Only `experts` differs from the one within."""

    def __init__(self, kernels: Any, gates: dict[int, tuple[Tensor, Tensor]], chosen: int) -> None:
        self._kernels, self._gates, self._chosen = kernels, gates, chosen
        self.touched: list[int] = []
        """Experts of each call since the list was last emptied."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def experts(self, layer: Any, rows_TD: Tensor) -> Tensor:
        norm_D, gate_ED = self._gates[id(layer)]
        # The length of a row does not change which logits are highest.
        scores_TE = (rows_TD.float() * norm_D) @ gate_ED.T
        self.touched.append(scores_TE.topk(self._chosen).indices.unique().numel())
        return self._kernels.experts(layer, rows_TD)

    def blocks(self, blocks: Any, rows_TD: Tensor) -> Tensor:
        return one_by_one(self, blocks, rows_TD)  # a set that computes them all in one call would not pass by here


def count_touched(model: Path, dtype: str, threads: int, workloads: tuple[Workload, ...]) -> dict[str, float]:
    """Mean experts a layer that the decode steps of each workload touch. In a process of its own."""
    means: dict[str, float] = in_child(_count, model, dtype, threads, workloads)
    return means


def _count(model: Path, dtype: str, threads: int, workloads: tuple[Workload, ...]) -> dict[str, float]:
    torch.set_num_threads(threads)
    ours = InProcess(model, dtype)
    stage = ours.stages[0]
    counting = Counting(stage._kernels, _gates(model, ours), ours.config.experts_per_token)
    stage._kernels = counting
    means = {}
    for workload in workloads:
        of_decode: list[int] = []

        def sort(microbatch: Microbatch, _: object, of_decode: list[int] = of_decode) -> None:
            if microbatch.length.max() == 1:
                of_decode += counting.touched
            counting.touched.clear()

        ours.run(workload, sort)
        if of_decode:
            means[workload.name] = sum(of_decode) / len(of_decode)
    return means


def _gates(model: Path, ours: InProcess) -> dict[int, tuple[Tensor, Tensor]]:
    """The norm before and the gate of each packed layer, by its identity."""
    checkpoint = Checkpoint.open(model, ours.config)

    def read(slot: Slot) -> Tensor:
        tensor = checkpoint.tensors[checkpoint.slots[slot]]
        with safe_open(tensor.file, framework="pt") as file:
            return file.get_tensor(tensor.name).float()

    layers = ours.stages[0]._layers
    return {id(layer): (read(Slot("ffn_norm", index)), read(Slot("gate", index))) for index, layer in layers.items()}
