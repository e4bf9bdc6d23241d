"""Which kernels a service computes with: chosen once, for all of its stages, from facts about their nodes. No torch.

    requested            by the operator: --kernels
    each stage's node    its CPU, and what stands in the way of native kernels there
    speeds               of the variants, by CPU: `cpu_speeds.json`, else a probe of the CPU where `serve` runs
      -> the kernels of each stage, and what the operator should know; or a refusal

The variant may depend on the matrix and on the kind of numbers, which are the same for every row. It never depends on
the number of rows, a chunk or a phase: a row that is computed again must be the same row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from tramontane.stages.cpu import Cpu
from tramontane.stages.variants import MATRICES, VARIANTS, KernelChoice, Variants, kernel_set

Speeds: TypeAlias = Mapping[str, Mapping[str, float]]
"""The speeds of the variants on one CPU, by matrix: how many times as fast as the slowest."""

SpeedsOf: TypeAlias = Callable[[Cpu], Speeds | None]
"""The speeds that are known of a CPU; None where none are."""

PROBE_MARGIN = 1.2
"""The least gain over the first variant by order that counts in a probe, which is short and has loud neighbours."""
MIX_MARGIN = 1.1
"""The least gain for which a matrix takes another variant than the experts: threads and caches change hands then."""

TABLE = Path(__file__).with_name("cpu_speeds.json")

_TORCH = KernelChoice(kernels="cpu")


@dataclass(frozen=True)
class NodeKernels:
    """The facts that decide which kernels can run on a node."""

    node: str
    """The node's name, for people; empty where there is one node only."""
    cpu: Cpu
    obstacle: str
    """Why native kernels cannot be had on the node, whatever its CPU; empty where they can."""

    def variants(self, numbers: str) -> tuple[str, ...]:
        """The variants that run on the node, by order; each computes other bits."""
        able = [] if self.obstacle else [each for each in VARIANTS if each.needs <= self.cpu.flags]
        return tuple(each.name for each in able if numbers in each.numbers)

    def reason_against(self, name: str) -> str:
        """Why a variant does not run on the node."""
        (variant,) = (each for each in VARIANTS if each.name == name)
        if self.obstacle:
            return self.obstacle
        missing = ", ".join(sorted(variant.needs - self.cpu.flags))
        return f"its CPU ({self.cpu.name}) has no {missing}"


@dataclass(frozen=True)
class Decision:
    """The kernels of each stage, and what the operator should know."""

    stages: tuple[KernelChoice, ...]
    remarks: tuple[str, ...]
    """A line each: which nodes keep the others from something better, and why."""


def choose_variants(candidates: Sequence[str], known: Sequence[Speeds]) -> Variants:
    """The best of some variants, given by order, for nodes of these speeds; by order where no node's are known.

    The speeds of the experts, which are most of a model, decide; attention and head take another variant where that is
    much faster. Where nodes differ, a variant counts as what it is worth on the node where it is worth least, and all
    matrices take the same one.

    >>> speeds = {"attention": {"b": 3.0, "a": 1.0}, "experts": {"b": 1.0, "a": 2.0}, "head": {"b": 1.0, "a": 1.0}}
    >>> print(choose_variants(["b", "a"], [speeds]))
    attention.b-experts.a-head.a
    """
    if not known:
        return Variants.alike(candidates[0])

    def worth(matrix: str, candidate: str) -> float:
        return min(
            speeds[matrix].get(candidate, 0.0) / max(speeds[matrix].get(each, 0.0) for each in candidates)
            for speeds in known
        )

    def best(matrix: str) -> str:
        return max(candidates, key=lambda candidate: worth(matrix, candidate))

    experts = best("experts")
    if len(known) > 1:
        return Variants.alike(experts)

    def of(matrix: str) -> str:
        other = best(matrix)
        return other if worth(matrix, other) >= MIX_MARGIN * worth(matrix, experts) else experts

    return Variants(attention=of("attention"), experts=experts, head=of("head"))


def decide(
    nodes: Sequence[NodeKernels],
    numbers: str,
    requested: str | None,
    speeds_of: SpeedsOf,
    *,
    allow_mixed: bool = False,
) -> Decision:
    """The kernels of each stage on CPUs, given the node of each.

    `requested` is a kernel set, a variant, or None. With `allow_mixed`, where no variant runs on all nodes, each node
    takes the best that it can run; then stages round differently.

    Raises:
        ValueError: what is requested does not run everywhere, or nothing does; the message names nodes and reasons.
    """
    if kernel_set(requested) != "native":
        return Decision((KernelChoice(kernels=str(requested)),) * len(nodes), ())
    asked = [each.name for each in VARIANTS if numbers in each.numbers and requested in (None, "native", each.name)]
    if not asked:
        fitting = ", ".join(each.name for each in VARIANTS if numbers in each.numbers)
        raise ValueError(f"kernels is {requested!r}; numbers of {numbers} have {fitting}")
    common = [name for name in asked if all(name in node.variants(numbers) for node in nodes)]
    if common:
        chosen = _best(nodes, common, speeds_of)
        choice = KernelChoice(kernels="native", variants=chosen)
        return Decision((choice,) * len(nodes), _weaker(nodes, numbers, asked, chosen, speeds_of))

    lacking = [node for node in nodes if not set(asked) & set(node.variants(numbers))]
    reasons = "; ".join(dict.fromkeys(_told(node, _reason(node, requested)) for node in lacking))
    if len(lacking) == len(nodes) and not allow_mixed:
        if requested is not None or numbers.endswith("int8"):
            raise ValueError(f"the native kernels, which were asked for, are not there: {reasons}")
        remark = f"no native kernels, torch's packed products instead: {reasons}"
        return Decision((_TORCH,) * len(nodes), (remark,))
    if numbers.endswith("int8") and any(not node.variants(numbers) for node in nodes):
        raise ValueError(f"8-bit weights need native kernels on the nodes of all stages: {reasons}")
    if not allow_mixed:
        raise ValueError(
            f"no native kernels run on the nodes of all stages: {reasons}; mend that, or take --kernels cpu, or "
            f"--allow-mixed-numerics, with which stages round differently"
        )
    return Decision(
        tuple(_own(node, numbers, asked, speeds_of) for node in nodes), (f"stages round differently: {reasons}",)
    )


def _best(nodes: Sequence[NodeKernels], candidates: Sequence[str], speeds_of: SpeedsOf) -> Variants:
    """The best of variants that run on all of the nodes."""
    cpus = {node.cpu.model: node.cpu for node in nodes}
    found = [speeds for cpu in cpus.values() if (speeds := speeds_of(cpu)) is not None]
    known = [speeds for speeds in found if all(set(candidates) & speeds[each].keys() for each in MATRICES)]
    return choose_variants(candidates, known)


def _own(node: NodeKernels, numbers: str, asked: Sequence[str], speeds_of: SpeedsOf) -> KernelChoice:
    """The best kernels that a node can run by itself: a variant of `asked`, else any variant, else torch's products."""
    able = node.variants(numbers)
    names = [name for name in able if name in asked] or able
    return KernelChoice(kernels="native", variants=_best([node], names, speeds_of)) if names else _TORCH


def _weaker(
    nodes: Sequence[NodeKernels], numbers: str, asked: Sequence[str], chosen: Variants, speeds_of: SpeedsOf
) -> tuple[str, ...]:
    """A line for each node that keeps other nodes from a variant that they would choose by themselves."""
    owned = [_own(node, numbers, asked, speeds_of).variants for node in nodes]
    wanted = {name for variants in owned if variants is not None for name in variants.names}
    lines = [
        _told(node, f"{node.reason_against(name)}, so that no stage uses {name}, but {chosen}")
        for node in nodes
        for name in sorted(wanted - set(node.variants(numbers)))
    ]
    return tuple(dict.fromkeys(lines))


def _reason(node: NodeKernels, requested: str | None) -> str:
    """Why a node runs none of the variants that were asked for."""
    if requested not in (None, "native"):
        return node.reason_against(str(requested))
    return node.obstacle or "the CPU has no AVX2 with FMA"


def _told(node: NodeKernels, reason: str) -> str:
    return f"{node.node}: {reason}" if node.node else reason


def needs_probe(node: NodeKernels, numbers: str) -> bool:
    """Whether a node can run several variants, and the table does not say which is the best."""
    return len(node.variants(numbers)) > 1 and table_speeds(node.cpu, numbers) is None


def probed_speeds(speeds: Mapping[str, float]) -> Speeds | None:
    """The speeds that a probe gives for all matrices; None unless a variant is much faster than the first by order.

    >>> probed_speeds({"avx512bf16": 1.0, "avx512": 1.1}) is None
    True
    """
    order = [each.name for each in VARIANTS]
    gain = max(speeds.values()) / speeds[min(speeds, key=order.index)]
    return dict.fromkeys(MATRICES, speeds) if gain >= PROBE_MARGIN else None


@cache
def _table() -> Mapping[str, Mapping[str, Speeds]]:
    rows = json.loads(TABLE.read_text(encoding="utf-8"))
    return {row["cpu"]: row["speeds"] for row in rows}


def table_speeds(cpu: Cpu, numbers: str) -> Speeds | None:
    """The speeds of a CPU in the repository's table; None where the CPU was never measured."""
    return _table().get(cpu.model, {}).get(numbers)
