"""Did the server keep up? In one sentence: the window is cut into 20 parts, and if the number of open requests grew (or
shrank) from part to part more steadily than chance would have it, the run never became stationary.

A server that keeps up has about as many requests open at the end as at the start: what one part adds, another takes
away. One that does not keep up adds about the same in each. At 12 requests a second against a server that ends 10,
each 3 s add about 6, and the latencies say how long the run was, not how fast the server is.

Simulated queues, one server and eight, exponential service, 300 runs each: with 300 requests in the window, no alarm at
70 % load, 0.3 % at 90 %, 1.7 % at 95 %; 68 % found at 120 %, 99 % at 150 %. With 1,000 requests, 97 % at 120 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.record import Record

PARTS = 20
LEAST_WINDOW_S = 5.0
LEAST_REQUESTS = 30
STEADY = ("constant", "poisson", "gamma")
"""Loads whose rate does not change; of the others the number of open requests follows the load."""


def stationary(records: Sequence[Record], load: Load, window_s: tuple[float, float]) -> bool | None:
    """Whether open requests neither piled up nor drained over the window.

    None where nothing can be said: below 5 s or 30 requests, where the load itself changes, and of a closed loop, whose
    users wait instead of piling up.
    """
    if load.kind not in STEADY or window_s[1] - window_s[0] < LEAST_WINDOW_S:
        return None
    arrivals_s = np.sort([record.intended_s for record in records])
    ends_s = np.sort([record.ended_s for record in records])
    borders_s = np.linspace(*window_s, PARTS + 1)
    arrived = np.searchsorted(arrivals_s, borders_s)
    if arrived[-1] - arrived[0] < LEAST_REQUESTS:
        return None
    return not _drifts(np.diff(arrived - np.searchsorted(ends_s, borders_s)))


def _drifts(growth: np.ndarray) -> bool:
    """Whether the mean growth of a part differs from 0, by Student's t at 5 % a side.

    The parts of a queue that keeps up undo each other, so their sum varies less than t expects and alarms are rarer
    than 5 %; close to full load each part is nearly a coin toss of its own, and t is right.
    """
    limit = special.stdtrit(len(growth) - 1, 0.95)
    return bool(abs(growth.mean()) * math.sqrt(len(growth)) > limit * growth.std(ddof=1))
