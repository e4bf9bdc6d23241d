"""The kernel sets that this machine's CPU runs, for tests that hold for each of them.

Without a compiler or the instructions the native one is skipped; sources that do not compile are no such reason.
"""

import pytest
import torch

from tramontane.stages.kernels.native.build import NativeUnavailable, library


def _reason_against_native():
    try:
        library()
    except NativeUnavailable as reason:
        if not str(reason).startswith(("there is no C++ compiler", "the CPU has no")):
            raise
        return str(reason)
    return None


_REASON = _reason_against_native()
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"no native kernels: {_REASON}")
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NATIVE = pytest.param("native", marks=needs_native)
KERNELS = [NATIVE, "cpu", "reference"]
