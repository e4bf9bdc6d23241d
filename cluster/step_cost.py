"""What a step costs here: seconds of a full pipe, from what its microbatch holds.

The router sees results come back. While the pipe is full, the time between two of them is what the later one cost the
busiest stage, links and waking included, so a sum of costs is the time that the pipeline takes. A step's cost is
taken as linear in what it holds, near the loads that are seen: reading all weights, each decode row, each prompt row,
each key that a row looks at.

A short warm-up measures steps of chosen sizes. Live steps go on from there: they are forgotten after some hundred, and
what they say nothing of keeps the warm-up's proportions, as much slower or faster as the machine is now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WORTH_WHILE = 0.25
"""Rows grow until whatever a step costs without them is down to this part of it."""
FORGET = 0.995
"""What a step's evidence weighs after the next one: steps count for some two hundred."""
ANCHOR_STEPS = 50
"""So many live steps weigh as much as the warm-up: under load all steps are much alike and tell no proportions."""
SLOWNESS_KEEP = 0.98
"""The same of how much slower than at the warm-up the machine is."""
REFIT_STEPS = 16
OUTLIER = 4.0
"""A step counts as at most so many times, and at least this part of, what was expected: a process that was stopped
for a while, or results that were read together, say nothing of costs."""
LEAST_S = 1e-6
"""No step takes less, so that nothing is divided by nothing."""


class StepLoad(NamedTuple):
    """What a microbatch holds.

    >>> StepLoad.of([(99, 1, True), (299, 1, True), (0, 8, False)], windows=(200,))
    StepLoad(decode_rows=2, prompt_rows=8, keys=336.0)
    """

    decode_rows: int
    prompt_rows: int
    keys: float
    """Keys that its rows look at, over all of them."""

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, bool]], windows: Sequence[int | None]) -> StepLoad:
        """Of pieces of (first position, rows, whether it decodes), where layers have these windows."""
        decode_rows = sum(decodes for _, _, decodes in pieces)
        prompt_rows = sum(rows for _, rows, decodes in pieces if not decodes)
        keys = 0.0
        for window in windows:
            most = math.inf if window is None else window
            keys += sum(rows * min(first + (rows + 1) / 2, most) for first, rows, _ in pieces) / len(windows)
        return cls(decode_rows, prompt_rows, keys)


def keys_seen(tokens: float, windows: Sequence[int | None]) -> float:
    """Keys that the last of so many tokens looks at, on the mean over the windows; None is full attention."""
    return sum(tokens if window is None else min(tokens, window) for window in windows) / len(windows)


class StepCost(NamedTuple):
    """Seconds of a step as a linear function of its load.

    >>> cost = StepCost(base_s=0.010, decode_row_s=0.001, prompt_row_s=0.002, key_s=0.0)
    >>> cost.seconds(StepLoad(decode_rows=10, prompt_rows=0, keys=500))
    0.02
    >>> round(cost.rows_worth_while(keys_per_row=50))
    30
    """

    base_s: float
    """Whatever it holds: reading all weights, links, waking."""
    decode_row_s: float
    prompt_row_s: float
    key_s: float

    def seconds(self, load: StepLoad) -> float:
        """Of a step with this load."""
        rows_s = self.decode_row_s * load.decode_rows + self.prompt_row_s * load.prompt_rows
        return self.base_s + rows_s + self.key_s * load.keys

    def prompt_rows_within(self, seconds: float, keys_per_row: float) -> float:
        """How many prompt rows take so long in a step that is made anyway."""
        row_s = self.prompt_row_s + self.key_s * keys_per_row
        return seconds / row_s if row_s > 0 else math.inf

    def rows_worth_while(self, keys_per_row: float) -> float:
        """Decode rows of a step from which on twice as many of them would give less than 15 % more tokens a second.

        Tokens a second are rows / (base + rows x row). Their relative gain for a relative gain in rows is the base's
        part of the step; it has fallen to a quarter where all rows together cost three times the base.
        """
        row_s = self.decode_row_s + self.key_s * keys_per_row
        return self.base_s / row_s * (1 / WORTH_WHILE - 1) if row_s > 0 else math.inf


_FEATURES = len(StepCost._fields)


class _Evidence:
    """Sums of a least-squares fit of seconds, each step relative to what was expected of it."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.gram = [[0.0] * _FEATURES for _ in range(_FEATURES)]
        self.moment = [0.0] * _FEATURES

    def add(self, load: StepLoad, seconds: float, expected_s: float, keep: float = 1.0) -> None:
        features = [1.0, *load]
        scale = 1.0 / max(expected_s, LEAST_S) ** 2
        self.weight = self.weight * keep + 1.0
        for index, feature in enumerate(features):
            weighed, row = feature * scale, self.gram[index]
            for other, value in enumerate(features):
                row[other] = row[other] * keep + weighed * value
            self.moment[index] = self.moment[index] * keep + weighed * seconds

    def plus(self, other: _Evidence, scale: float, slowness: float) -> _Evidence:
        """Both together, the other one `scale` times, and as if its steps had taken `slowness` times as long."""
        sum_ = _Evidence()
        for index in range(_FEATURES):
            pairs = zip(self.gram[index], other.gram[index], strict=True)
            sum_.gram[index] = [mine + scale * theirs for mine, theirs in pairs]
            sum_.moment[index] = self.moment[index] + scale * slowness * other.moment[index]
        return sum_

    def fit(self, start: StepCost, sweeps: int) -> StepCost:
        """Non-negative least squares by coordinate descent; what the evidence leaves open stays near `start`."""
        values = [*start]
        for _ in range(sweeps):
            for index, row in enumerate(self.gram):
                if row[index] > 0:
                    rest = sum(g * value for g, value in zip(row, values, strict=True))
                    values[index] = max(0.0, values[index] + (self.moment[index] - rest) / row[index])
        return StepCost(*values)


class StepCosts:
    """Learns the cost of steps on this machine, under its present load."""

    def __init__(self) -> None:
        self.cost: StepCost | None = None
        """None until something was measured."""
        self._warm_up: StepCost | None = None
        self._anchor = _Evidence()
        self._live = _Evidence()
        self._slowness = 1.0
        self._until_refit = REFIT_STEPS

    def warmed_up(self, steps: list[tuple[StepLoad, float]]) -> None:
        """Take the warm-up's steps and their seconds; without any, nothing is known."""
        for load, seconds in steps:
            self._anchor.add(load, seconds, expected_s=seconds)
        if steps:
            mean_s = sum(seconds for _, seconds in steps) / len(steps)
            cost = self._anchor.fit(StepCost(mean_s, 0.0, 0.0, 0.0), sweeps=500)
            if not any(load.prompt_rows for load, _ in steps):  # then a prompt's row is taken for a decode row
                cost = cost._replace(prompt_row_s=cost.decode_row_s)
            self.cost = self._warm_up = cost

    def observe(self, load: StepLoad, seconds: float) -> None:
        """A step of a full pipe has taken so long."""
        if self.cost is None or self._warm_up is None:
            return
        expected_s = max(self.cost.seconds(load), LEAST_S)
        seconds = min(max(seconds, expected_s / OUTLIER), expected_s * OUTLIER)
        self._live.add(load, seconds, expected_s, keep=FORGET)
        self._slowness += (1 - SLOWNESS_KEEP) * (seconds / max(self._warm_up.seconds(load), LEAST_S) - self._slowness)
        self._until_refit -= 1
        if not self._until_refit:
            self._until_refit = REFIT_STEPS
            scale = ANCHOR_STEPS / self._anchor.weight
            self.cost = self._live.plus(self._anchor, scale, self._slowness).fit(self.cost, sweeps=8)
