"""The kernel sets, and the variants of the native one, that this machine's CPU runs, for tests that hold for each.

Without a compiler or the instructions the native one is skipped; sources that do not compile are no such reason.
"""

from functools import cache

import pytest
import torch

from tramontane.stages.kernel_choice import choose_variants, table_speeds
from tramontane.stages.kernels import kernels_here
from tramontane.stages.kernels.native import NativeKernels
from tramontane.stages.variants import Variants

FACTS = kernels_here("", "float32", None)


def _reason_against_native():
    if not FACTS.obstacle:
        return None if FACTS.variants("float32") else "the CPU has no AVX2 with FMA"
    if not FACTS.obstacle.startswith("there is no C++ compiler"):
        raise RuntimeError(FACTS.obstacle)
    return FACTS.obstacle


_REASON = _reason_against_native()
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"no native kernels: {_REASON}")
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NATIVE = pytest.param("native", marks=needs_native)
KERNELS = [NATIVE, "cpu", "reference"]


@cache
def choices(numbers):
    """Every combination of variants that can be chosen on this machine, the best first.

    They are one variant for all matrices, as a request or a probe gives, and what the table gives for CPUs with fewer
    and fewer instructions.
    """
    names = FACTS.variants(numbers)
    alike = [Variants.alike(name) for name in names]
    speeds = table_speeds(FACTS.cpu, numbers)
    found = [choose_variants(names[first:], [speeds]) for first in range(len(names))] if speeds else []
    return tuple(dict.fromkeys([*found, *alike]))


def native(config, dtype, quantize=None):
    """The native kernels with the variants that are chosen on this machine."""
    return NativeKernels(config, dtype, quantize, choices(f"{dtype}-{quantize}" if quantize else dtype)[0])
