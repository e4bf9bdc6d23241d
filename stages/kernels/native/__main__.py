"""Prepare the native kernels now: `python -m tramontane.stages.kernels.native`. Ends well without them, too.

They are compiled, and a CPU that the table does not have is probed, so that the first service waits for neither.
"""

from __future__ import annotations

import logging

from tramontane.stages.cpu import this_cpu
from tramontane.stages.kernel_choice import NodeKernels, table_speeds
from tramontane.stages.kernels import choose_here
from tramontane.stages.kernels.native import speeds

log = logging.getLogger("tramontane")

logging.basicConfig(level=logging.INFO, format="%(message)s")
cpu = this_cpu()
for dtype in ("float32", "bfloat16"):
    choice = choose_here(None, dtype=dtype, device="cpu", quantize=None)
    log.info("%s is served by the kernels %s", dtype, choice)
    is_open = choice.kernels == "native" and len(NodeKernels("", cpu, "").variants(dtype)) > 1
    if is_open and table_speeds(cpu, dtype) is None:
        log.info("this CPU (%s) is not in the table; its variants are probed", cpu.model)
        log.info("times as fast as the slowest: %s", speeds.probe(dtype, None))
