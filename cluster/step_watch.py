"""Whether the oldest microbatch in the pipe is late, or hangs: by what such a step costs here, and by a limit. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from tramontane.cluster.step_cost import StepCost, StepLoad

LATE_TIMES, LATE_LEAST_S = 4.0, 5.0
"""A step is late after so many times its cost, and at least so long."""
HANG_TIMES = 10.0
"""A step never hangs before so many times its cost, whatever the limit."""


class Progress(StrEnum):
    """How the oldest step gets on."""

    FINE = "fine"
    LATE = "late"
    HUNG = "hung"


class Verdict(NamedTuple):
    """... and for how long it has waited for its oldest step."""

    progress: Progress
    waited_s: float


class StepWatch:
    """Judges one pipeline at each look. Times are the caller's, in seconds.

    Costs are believed only for sizes of which a step has come back; for others the hang limit alone counts. Looks come
    at a steady pace; one that comes much later than the one before shows that the watcher itself was stopped, and the
    wait begins anew.

    >>> watch, load = StepWatch(stages=1, hang_limit_s=45.0), StepLoad(8, 0, 80)
    >>> watch.came_back(load)
    >>> cost = StepCost(base_s=2.0, decode_row_s=0.0, prompt_row_s=0.0, key_s=0.0)
    >>> paces = [watch.look(now, 0.0, load, cost).progress.value for now in range(50)]
    >>> paces.index("late"), paces.index("hung")  # after 8 s and after 45
    (9, 46)
    """

    LONGEST_LOOK_S = 3.0

    def __init__(self, stages: int, hang_limit_s: float) -> None:
        self._stages = stages
        self._hang_limit_s = hang_limit_s
        self._seen: set[tuple[int, ...]] = set()
        self._looked_s: float | None = None
        self._since_s = 0.0

    def came_back(self, load: StepLoad) -> None:
        """A step of this size is done."""
        self._seen.add(_size(load))

    def look(self, now: float, since_s: float, oldest: StepLoad | None, cost: StepCost | None) -> Verdict:
        """How the oldest step of the pipe gets on; None where the pipe is empty. `since_s` is when it was sent, or the
        result before it came.

        A pipeline of so many stages may take that many times a step's cost for it.
        """
        if self._looked_s is not None and now - self._looked_s > self.LONGEST_LOOK_S:
            self._since_s = now
        self._looked_s = now
        if oldest is None:
            return Verdict(Progress.FINE, 0.0)
        waited_s = now - max(since_s, self._since_s)
        known = cost is not None and _size(oldest) in self._seen
        cost_s = self._stages * cost.seconds(oldest) if cost is not None and known else 0.0
        if waited_s > max(self._hang_limit_s, HANG_TIMES * cost_s):
            return Verdict(Progress.HUNG, waited_s)
        if known and waited_s > max(LATE_LEAST_S, LATE_TIMES * cost_s):
            return Verdict(Progress.LATE, waited_s)
        return Verdict(Progress.FINE, waited_s)


def _size(load: StepLoad) -> tuple[int, ...]:
    """Loads of one size differ by less than a factor of two in all that they hold."""
    return tuple(int(amount).bit_length() for amount in load)
