"""How much a pipeline is worth loading with, by what its steps cost: sequences that run, and prompts beside decode."""

from __future__ import annotations

import math

from tramontane.cluster.pacing import WORTH_A_PASS
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.step_cost import StepCost, StepCosts, StepLoad, keys_seen

STEP_OF_PEAK = 1.5
"""The longest step while others decode, in decode steps of as many rows as are worth while."""
STEP_OF_DECODE = 2.0
"""... and at least so many times what its own decode rows take alone."""
LEAST_ROWS = 4
"""Decode rows of a step that are always worth while, so that a mistaken estimate cannot serialise the users."""
KEYS_KEEP = 0.95


class Capacity:
    """Limits of one pipeline, each the operator's where one was given, else from measured costs.

    >>> from tramontane.stages.kv_layout import KVLayout
    >>> layout = KVLayout(block=16, chunk=64, windows=(None,), rings=(9,), pool_blocks=(99,))
    >>> options = SchedulerOptions(layout=layout, context=128, max_batch_tokens=1024, max_waiting=8)
    >>> capacity = Capacity(options, groups=1, costs=StepCosts())
    >>> capacity.seats, capacity.prompt_rows(StepLoad(5, 0, 0), position=0)  # before anything was measured
    (1024, 1024)
    >>> capacity.costs.cost = StepCost(base_s=1 / 128, decode_row_s=1 / 1024, prompt_row_s=1 / 2048, key_s=0.0)
    >>> capacity.seats, round(capacity.max_step_s, 3)
    (24, 0.047)
    >>> [capacity.prompt_rows(StepLoad(rows, 0, 0), position=0) for rows in (5, 24)]
    [70, 64]
    """

    def __init__(self, options: SchedulerOptions, groups: int, costs: StepCosts) -> None:
        self.costs = costs
        self._options = options
        self._groups = groups
        self._row_keys = 1.0
        """Keys that a decode row looks at, on a running mean."""

    @property
    def cost(self) -> StepCost | None:
        """None while nothing was measured."""
        return self.costs.cost

    @property
    def rows(self) -> int:
        """Decode rows of a step that are worth while; a step's rows, where that is unknown."""
        most = self._options.max_batch_tokens
        if self.cost is None:
            return most
        return int(min(max(self.cost.rows_worth_while(self._row_keys), LEAST_ROWS), most))

    @property
    def seats(self) -> int:
        """Sequences that may run. Never more than the decode rows of a round can be: whoever still prefills then finds
        a row free in some microbatch."""
        most = self._groups * self._options.max_batch_tokens
        return min(self._options.max_running or self._groups * self.rows, most)

    @property
    def decode_step_s(self) -> float:
        """A decode step of as many rows as are worth while."""
        assert self.cost is not None, "nothing was measured"
        return self.cost.seconds(StepLoad(self.rows, 0, self.rows * self._row_keys))

    @property
    def max_step_s(self) -> float:
        """The longest that a step may take while others decode, unless its decode rows alone take half of it."""
        if self._options.max_step_s is not None:
            return self._options.max_step_s
        return STEP_OF_PEAK * self.decode_step_s if self.cost is not None else math.inf

    def prompt_rows(self, decode: StepLoad, position: int) -> int:
        """Prompt rows, from this position on, that a step may take beside these decode rows.

        A round always takes `WORTH_A_PASS` of them, so that no prompt waits for ever.
        """
        if self.cost is None:
            return self._options.max_batch_tokens
        decode_s = self.cost.seconds(decode)
        spare_s = max(self.max_step_s, STEP_OF_DECODE * decode_s) - decode_s
        rows = self.cost.prompt_rows_within(spare_s, keys_seen(position + 1, self._options.layout.windows))
        return int(min(max(rows, -(-WORTH_A_PASS // self._groups)), self._options.max_batch_tokens))

    def prompt_row_beside_s(self, decoding: int) -> float:
        """Seconds for each prompt row while so many sequences decode, the time of their own rows included."""
        assert self.cost is not None, "nothing was measured"
        rows = -(-decoding // self._groups)
        decode = StepLoad(rows, 0, rows * self._row_keys)
        return self.cost.prompt_row_s + self.cost.seconds(decode) / self.prompt_rows(decode, position=0)

    def launched(self, decode: StepLoad) -> None:
        """A step with these decode rows leaves."""
        if decode.decode_rows:
            self._row_keys += (1 - KEYS_KEEP) * (decode.keys / decode.decode_rows - self._row_keys)
