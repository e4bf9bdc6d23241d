"""What this machine does at best, in the same minute as what is held against it: reading, and products of matrices.

Reading: the sum over 256 MiB, far more than caches hold; it adds 8 numbers an instruction, so memory is what it waits
for. Products: 256 rows through a weight of 2,048 x 2,048, plain or by oneDNN with a packed weight, whichever is quicker
(on AMD, torch's plain float32 product may be half as quick). On a GPU 4 GiB are read, and all three sizes are 8,192.
The best of some repeats counts: what others on the machine take away makes a ceiling lower, nothing makes it higher.
Ceilings drift with the neighbours, so they are taken before and after every round, and so is the time that others'
processes have just then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil
import torch
from torch.nn.functional import linear

from bench.limits import Ceilings

READ_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
SHAPE = {"cpu": (256, 2048), "cuda": (8192, 8192)}
"""Rows of a product, and outputs and inputs of its weight."""
REPEATS, BUDGET_S = 10, 0.25


def measure_ceilings(threads: int, *, int8: bool = False, device: str = "cpu") -> Ceilings:
    """All of them with so many threads, or of the GPU, in a second or two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return Ceilings(
                read_gb_s=READ_BYTES[device] / best_s(torch.ones(READ_BYTES[device] // 4, device=device).sum) / 1e9,
                float32_gflop_s=_product_rate(torch.float32, device),
                bfloat16_gflop_s=_product_rate(torch.bfloat16, device),
                int8_gflop_s=_int8_rate() if int8 else 0.0,
            )
    finally:
        torch.set_num_threads(before)


def others_busy_cpus() -> float:
    """CPUs that somebody else keeps busy: half a second during which we sleep."""
    return psutil.cpu_percent(interval=0.5) / 100 * (psutil.cpu_count() or 1)


def best_s(job: Callable[[], object]) -> float:
    """The shortest of some runs, after one to warm up; at least two, and no more once `BUDGET_S` is spent.

    A GPU's work is waited for.
    """
    job()
    times: list[float] = []
    while len(times) < 2 or (len(times) < REPEATS and sum(times) < BUDGET_S):
        begin = time.perf_counter()
        job()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def _product_rate(dtype: torch.dtype, device: str) -> float:
    rows, width = SHAPE[device]
    inputs = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(width, width, device=device).to(dtype)
    return max(_rate(job, device) for job in _products(inputs, weight))


def _products(rows: torch.Tensor, weight: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
    yield lambda: linear(rows, weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return  # this torch or this device has no packed product of that dtype
    yield lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def _int8_rate() -> float:
    rows, width = SHAPE["cpu"]
    inputs = torch.randint(-127, 127, (rows, width), dtype=torch.int8)
    weight = torch.randint(-127, 127, (width, width), dtype=torch.int8)
    return _rate(lambda: torch._int_mm(inputs, weight), "cpu")


def _rate(job: Callable[[], object], device: str) -> float:
    rows, width = SHAPE[device]
    return 2 * rows * width * width / best_s(job) / 1e9
