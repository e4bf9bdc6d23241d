"""Compile the native kernels now: `python -m tramontane.stages.kernels.native`. Ends well without them, too."""

from __future__ import annotations

import logging

from tramontane.stages.kernels.native.build import NativeUnavailable, library

log = logging.getLogger("tramontane")

logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    log.info("native kernels are ready: %s", library()._name)
except NativeUnavailable as reason:
    log.warning("no native kernels: %s", reason)
