"""The kernel sets, the variants of the native one, and what may be requested. No torch.

A *variant* is a build of the native kernels for CPUs with some instructions. Variants round differently.
"""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = {"native": ("cpu",), "cpu": ("cpu",), "cuda": ("cuda",), "reference": ("cpu", "cuda")}
"""The kernel sets, and where each runs. Only native ones have variants."""

MATRICES = ("attention", "experts", "head")
"""The parts of a model that may have variants of their own: the halves of a block, and the head with the sampler."""


@dataclass(frozen=True)
class Variant:
    """One build of the native kernels."""

    name: str
    instructions: tuple[str, ...]
    """The instructions as compilers name them."""
    numbers: frozenset[str]
    """The kinds of numbers (`numbers_of`) for which it computes other bits than the variants after it."""

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
"""The order by instructions, which decides for CPUs of which no speeds are known. Instructions are named one by one, so
that a variant rounds alike on all CPUs that run it."""


def numbers_of(dtype: str, quantize: str | None) -> str:
    """The kind of numbers that a model's rows and weights hold, in one word.

    >>> numbers_of("bfloat16", None), numbers_of("bfloat16", "int8")
    ('bfloat16', 'bfloat16-int8')
    """
    return f"{dtype}-{quantize}" if quantize else dtype


def kernel_set(requested: str | None) -> str:
    """The kernel set of a CPU where a set, a variant or nothing is requested."""
    return str(requested) if requested in DEVICES else "native"


def check_requested(requested: str | None, *, device: str, quantize: str | None) -> None:
    """Refuse a request that no machine can meet.

    Raises:
        ValueError: there is no such set or variant, it does not run on the device, or does not quantise.
    """
    names = (*DEVICES, *(each.name for each in VARIANTS))
    kind = device.partition(":")[0]
    if requested is not None and requested not in names:
        raise ValueError(f"kernels is {requested!r}; supported: {', '.join(names)}")
    if requested is not None and kind not in DEVICES[kernel_set(requested)]:
        raise ValueError(
            f"kernels is {requested!r}, and device is {device!r}; "
            f"these kernels run on {DEVICES[kernel_set(requested)][0]!r} only"
        )
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}; supported: int8")
    if quantize and (kind != "cpu" or kernel_set(requested) != "native"):
        raise ValueError(f"quantize is {quantize!r}, and kernels is {requested or kind!r}; only 'native' quantizes")


@dataclass(frozen=True, kw_only=True)
class Variants:
    """The variant of each matrix."""

    attention: str
    experts: str
    head: str

    @classmethod
    def alike(cls, name: str) -> Variants:
        """One variant for all matrices."""
        return cls(attention=name, experts=name, head=name)

    @property
    def names(self) -> frozenset[str]:
        """The variants that occur."""
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
    """The kernels of one stage."""

    kernels: str
    """One of DEVICES."""
    variants: Variants | None = None
    """The variants of native kernels; None for other sets."""

    def __str__(self) -> str:
        return self.kernels if self.variants is None else f"{self.kernels} {self.variants}"
