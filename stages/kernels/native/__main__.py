"""Compile the native kernels now: `python -m tramontane.stages.kernels.native`. Ends well without them, too."""

from __future__ import annotations

import logging

from tramontane.stages.kernels import choose_here

log = logging.getLogger("tramontane")

logging.basicConfig(level=logging.INFO, format="%(message)s")
for dtype in ("float32", "bfloat16"):
    log.info("%s is served by the kernels %s", dtype, choose_here(None, dtype=dtype, device="cpu", quantize=None))
