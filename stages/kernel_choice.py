"""Which kernels a service computes with: chosen once, for all of its stages, from facts about their nodes. No torch.

    what the operator wants     --kernels
    each stage's node           its CPU, and what stands in the way of native kernels there
    speeds                      of the variants, by CPU: `cpu_speeds.json`, else a probe of the CPU where `serve` runs
      -> the kernels of each stage, and what the operator should know; or a refusal

A *variant* is a build of the native kernels for CPUs with some instructions; another variant rounds otherwise. So the
variant may differ by matrix and by what numbers are held, which are the same for every row, but never by the number of
rows, a chunk or a phase: a row that is computed again must be the same row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from tramontane.stages.cpu import Cpu

DEVICES = {"native": ("cpu",), "cpu": ("cpu",), "cuda": ("cuda",), "reference": ("cpu", "cuda")}
"""The kernel sets, and where each runs. Only native ones have variants."""

MATRICES = ("attention", "experts", "head")
"""The parts of a model that may have variants of their own: the halves of a block, and the head with the sampler."""

Speeds: TypeAlias = Mapping[str, Mapping[str, float]]
"""Of each variant on one CPU, by matrix: how many times as fast as the slowest."""

PROBE_MARGIN = 1.2
"""A probe is short and neighbours are loud: so much faster must a variant be than the first by order, in all it did."""
MIX_MARGIN = 1.1
"""So much faster must another variant than the experts' be in a matrix, since threads and caches change hands."""

TABLE = Path(__file__).with_name("cpu_speeds.json")


@dataclass(frozen=True)
class Variant:
    """One build of the native kernels."""

    name: str
    instructions: tuple[str, ...]
    """As compilers name them."""
    numbers: frozenset[str]
    """Where it computes other bits than the variants after it; see `numbers_of`."""

    @property
    def needs(self) -> frozenset[str]:
        """The instructions as /proc/cpuinfo names them."""
        return frozenset(_FLAGS.get(each, each) for each in self.instructions)


_FLAGS = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
}
_AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
_ALL = frozenset({"float32", "bfloat16", "float32-int8", "bfloat16-int8"})

VARIANTS = (
    Variant("amx", (*_AVX512, "avx512bf16", "amx-tile", "amx-bf16"), frozenset({"bfloat16"})),
    Variant("avx512bf16", (*_AVX512, "avx512bf16"), frozenset({"bfloat16", "bfloat16-int8"})),
    Variant("avx512", _AVX512, _ALL),
    Variant("avx2", ("avx2", "fma"), _ALL),
)
"""By how much they can do: the order for CPUs of which nobody knows more. Instructions are named one by one, so that a
variant's rounding is the same on all CPUs that run it."""


def numbers_of(dtype: str, quantize: str | None) -> str:
    """What numbers a model's rows and weights hold, in one word.

    >>> numbers_of("bfloat16", None), numbers_of("bfloat16", "int8")
    ('bfloat16', 'bfloat16-int8')
    """
    return f"{dtype}-{quantize}" if quantize else dtype


def set_of(wish: str | None) -> str:
    """The kernel set that CPUs take for a wish, which may be a set, a variant or none."""
    return str(wish) if wish in DEVICES else "native"


def check_wish(wish: str | None, *, device: str, quantize: str | None) -> None:
    """Refuse what no machine can do.

    Raises:
        ValueError: there is no such set or variant, it does not run on the device, or does not quantise.
    """
    names = (*DEVICES, *(each.name for each in VARIANTS))
    kind = device.partition(":")[0]
    if wish is not None and wish not in names:
        raise ValueError(f"kernels is {wish!r}; supported: {', '.join(names)}")
    if wish is not None and kind not in DEVICES[set_of(wish)]:
        raise ValueError(
            f"kernels is {wish!r}, and device is {device!r}; these kernels run on {DEVICES[set_of(wish)][0]!r} only"
        )
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}; supported: int8")
    if quantize and (kind != "cpu" or set_of(wish) != "native"):
        raise ValueError(f"quantize is {quantize!r}, and kernels is {wish or kind!r}; only 'native' quantizes")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variant of each matrix."""

    attention: str
    experts: str
    head: str

    @classmethod
    def alike(cls, name: str) -> Variants:
        """The same for all."""
        return cls(attention=name, experts=name, head=name)

    @property
    def names(self) -> frozenset[str]:
        """Those that occur."""
        return frozenset({self.attention, self.experts, self.head})

    def __str__(self) -> str:
        """One word where all are alike.

        >>> print(Variants.alike("avx2"), Variants(attention="avx2", experts="avx512", head="avx512"))
        avx2 attention.avx2-experts.avx512-head.avx512
        """
        if len(self.names) == 1:
            return self.head
        return f"attention.{self.attention}-experts.{self.experts}-head.{self.head}"


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """What one stage computes with."""

    kernels: str
    """One of DEVICES."""
    variants: Variants | None = None
    """Of native kernels."""

    def __str__(self) -> str:
        return self.kernels if self.variants is None else f"{self.kernels} {self.variants}"


@dataclass(frozen=True)
class NodeFacts:
    """What decides which kernels can run on a node."""

    node: str
    """For people; empty where there is but one."""
    cpu: Cpu
    obstacle: str
    """Why native kernels cannot be had there, whatever the CPU; empty where they can."""

    def variants(self, numbers: str) -> tuple[str, ...]:
        """Those that run there, by order; each computes other bits."""
        able = [] if self.obstacle else [each for each in VARIANTS if each.needs <= self.cpu.flags]
        return tuple(each.name for each in able if numbers in each.numbers)

    def reason_against(self, name: str) -> str:
        """Why a variant does not run there."""
        (variant,) = (each for each in VARIANTS if each.name == name)
        if self.obstacle:
            return self.obstacle
        missing = ", ".join(sorted(variant.needs - self.cpu.flags))
        return f"its CPU ({self.cpu.name}) has no {missing}"


@dataclass(frozen=True)
class Decision:
    """What comes out."""

    stages: tuple[KernelChoice, ...]
    remarks: tuple[str, ...]
    """A line each: which nodes keep the others from something better, and why."""


def choose_variants(candidates: Sequence[str], known: Sequence[Speeds]) -> Variants:
    """The best of some variants, given by order, for nodes of these speeds; by order where no node's are known.

    The experts, which are most of a model, choose; attention and head take another variant where that is much faster.
    With nodes that differ, each variant counts as what it is worth where it is worth least, and all matrices are alike.

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
    nodes: Sequence[NodeFacts],
    numbers: str,
    wish: str | None,
    speeds_of: Callable[[Cpu], Speeds | None],
    *,
    allow_mixed: bool = False,
) -> Decision:
    """The kernels of each stage on CPUs, given the node of each.

    `wish` is a kernel set, a variant, or None. With `allow_mixed` each node takes the best that it can run where
    nothing else goes; then stages round differently.

    Raises:
        ValueError: what is wanted does not run everywhere, or nothing runs everywhere; names the nodes and reasons.
    """
    if set_of(wish) != "native":
        return Decision((KernelChoice(kernels=str(wish)),) * len(nodes), ())

    def choose(nodes: Sequence[NodeFacts], candidates: Sequence[str]) -> Variants:
        cpus = {node.cpu.model: node.cpu for node in nodes}
        found = [speeds for cpu in cpus.values() if (speeds := speeds_of(cpu)) is not None]
        measured = [speeds for speeds in found if all(_knows_any(speeds[each], candidates) for each in MATRICES)]
        return choose_variants(candidates, measured)

    able = [node.variants(numbers) for node in nodes]
    if wish not in (None, "native"):
        assert wish is not None
        if numbers not in next(each for each in VARIANTS if each.name == wish).numbers:
            fitting = ", ".join(each.name for each in VARIANTS if numbers in each.numbers)
            raise ValueError(f"kernels is {wish!r}; numbers of {numbers} have {fitting}")
        able = [tuple(name for name in names if name == wish) for names in able]
    common = [each.name for each in VARIANTS if all(each.name in names for names in able)]
    if common:
        chosen = choose(nodes, common)
        choice = KernelChoice(kernels="native", variants=chosen)
        return Decision((choice,) * len(nodes), tuple(_weaker(nodes, able, chosen, choose)))

    lacking = [node for node, names in zip(nodes, able, strict=True) if not names]
    reasons = "; ".join(dict.fromkeys(_told(node, _reason(node, numbers, wish)) for node in lacking or nodes))
    if len(lacking) == len(nodes):
        if wish is not None or numbers.endswith("int8"):
            raise ValueError(f"the native kernels, which were asked for, are not there: {reasons}")
        remark = f"no native kernels, torch's packed products instead: {reasons}"
        return Decision((KernelChoice(kernels="cpu"),) * len(nodes), (remark,))
    if not allow_mixed or (lacking and numbers.endswith("int8")):
        raise ValueError(
            f"no native kernels run on the nodes of all stages: {reasons}; mend that, or take --kernels cpu, or "
            f"--allow-mixed-numerics, with which stages round differently"
        )
    mixed = tuple(
        KernelChoice(kernels="native", variants=choose([node], names)) if names else KernelChoice(kernels="cpu")
        for node, names in zip(nodes, able, strict=True)
    )
    return Decision(mixed, (f"stages round differently: {reasons}",))


def _knows_any(speeds: Mapping[str, float], candidates: Iterable[str]) -> bool:
    return any(speeds.get(candidate, 0.0) > 0 for candidate in candidates)


def _weaker(
    nodes: Sequence[NodeFacts],
    able: Sequence[Sequence[str]],
    chosen: Variants,
    choose: Callable[[Sequence[NodeFacts], Sequence[str]], Variants],
) -> Iterable[str]:
    """A line for each node that keeps others from what they would choose by themselves."""
    wanted = {name for node, names in zip(nodes, able, strict=True) for name in choose([node], names).names}
    told: dict[str, None] = {}
    for node, names in zip(nodes, able, strict=True):
        for name in sorted(wanted - set(names)):
            told[_told(node, f"{node.reason_against(name)}, so that no stage uses {name}, but {chosen}")] = None
    return told


def _reason(node: NodeFacts, numbers: str, wish: str | None) -> str:
    """Why a node runs none of the variants that are in question."""
    if wish not in (None, "native"):
        return node.reason_against(str(wish))
    if node.obstacle:
        return node.obstacle
    return "the CPU has no AVX2 with FMA" if not node.variants(numbers) else "runs none of the others' variants"


def _told(node: NodeFacts, reason: str) -> str:
    return f"{node.node}: {reason}" if node.node else reason


def probed_speeds(speeds: Mapping[str, float]) -> Speeds | None:
    """What a probe says, of all matrices alike; nothing unless another variant than the first by order is much faster.

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
    """What the repository's table says of a CPU; None where it was never measured."""
    return _table().get(cpu.model, {}).get(numbers)
