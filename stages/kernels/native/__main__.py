"""Prepare the native kernels now: `python -m tramontane.stages.kernels.native`. Ends well without them, too.

They are compiled, and a CPU that the table does not have is probed, so that the first service waits for neither.
"""

from __future__ import annotations

import logging

from tramontane.stages.kernel_choice import needs_probe
from tramontane.stages.kernels import choose_here, kernels_here
from tramontane.stages.kernels.native import speeds

log = logging.getLogger("tramontane")

logging.basicConfig(level=logging.INFO, format="%(message)s")
for dtype in ("float32", "bfloat16"):
    log.info("%s is served by the kernels %s", dtype, choose_here(None, dtype=dtype, device="cpu", quantize=None))
    here = kernels_here("", dtype, None)
    if needs_probe(here, dtype):
        log.info("this CPU (%s) is not in the table; its variants are probed", here.cpu.model)
        log.info("times as fast as the slowest: %s", speeds.probe(dtype, None))
