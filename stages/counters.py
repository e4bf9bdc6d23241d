"""What a stage counts while it works. No torch: whoever gathers the counters needs none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageStats:
    """Counters since the stage was loaded; readers subtract two."""

    busy_ns: int = 0
    """Nanoseconds inside `Stage.step`."""
    steps: int = 0
    """Microbatches stepped through."""
    tokens: int = 0
    """Their rows, prompts and decode together."""

    def after_step(self, busy_ns: int, tokens: int) -> StageStats:
        """The counters after one more step of so many nanoseconds and rows."""
        return StageStats(self.busy_ns + busy_ns, self.steps + 1, self.tokens + tokens)
