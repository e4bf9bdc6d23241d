"""Which rates a sweep tries: doubling until an objective is missed, then halving the interval between. Pure.

From 1 request a second, where the true limit is 5 and 10 % is exact enough:

    1 holds, 2 holds, 4 holds, 8 misses, 5.66 misses, 4.76 holds, 5.19 misses: 4.76 is the best, to within 10 %
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Search:
    """The highest rate that holds, found by bisection on the logarithm."""

    lowest: float
    highest: float
    tolerance: float
    """Of the result, as a share: 0.1 is 10 %."""
    held: float | None = None
    """The highest rate that held."""
    missed: float | None = None
    """The lowest that did not."""

    def __post_init__(self) -> None:
        if not 0 < self.lowest <= self.highest < math.inf:
            raise ValueError(
                f"rates are {self.lowest:g} .. {self.highest:g}; the first must be above 0, the last no less"
            )
        if not 0.001 <= self.tolerance <= 1:
            raise ValueError(f"tolerance is {self.tolerance:g}; it must lie in 0.001 .. 1")

    def next_rate(self) -> float | None:
        """What to try now; None when the answer is known."""
        if self.held is None:
            return self.lowest if self.missed is None else None
        if self.missed is None:
            return None if self.held >= self.highest else min(self.held * 2, self.highest)
        if self.missed <= self.held * (1 + self.tolerance):
            return None
        return math.sqrt(self.held * self.missed)

    def learn(self, rate: float, *, holds: bool) -> None:
        """What became of the rate that was tried."""
        if holds:
            self.held = rate if self.held is None else max(self.held, rate)
        else:
            self.missed = rate if self.missed is None else min(self.missed, rate)
