"""Log files of our own, which rotate; Ray keeps what a process prints, for ever."""

from __future__ import annotations

import logging
import logging.handlers
from pathlib import Path

from tramontane.cluster.log_lines import OneLine, RateLimit, refusals

FILE_BYTES = 50_000_000
FILES = 3
"""The one that is written, and those before it."""
REFUSALS_PER_S = 10.0
REFUSALS_AT_ONCE = 100


def start_log(path: Path, level: str) -> None:
    """Write all that this process logs to this file, a line an event, instead of stderr."""
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES - 1, encoding="utf-8")
    handler.setFormatter(OneLine("%(asctime)s %(levelname).1s %(name)s: %(message)s"))
    refusals.filters = [RateLimit(REFUSALS_PER_S, REFUSALS_AT_ONCE)]
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
