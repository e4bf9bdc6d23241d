"""Which cores of a node each of its stages runs on. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence


def share_of_cores(cores: Sequence[int], index: int, stages: int) -> list[int]:
    """The cores of stage `index` of `stages` on one node: neighbours, as many for each, and nobody's twice if they do.

    >>> [share_of_cores([0, 1, 2, 3, 8], index, 2) for index in range(2)]
    [[0, 1], [2, 3]]

    Where stages outnumber cores, a core has several of them:

    >>> [share_of_cores([0, 1], index, 3) for index in range(3)]
    [[0], [1], [0]]
    """
    size = max(1, len(cores) // stages)
    start = index * size % len(cores)
    return list(cores[start : start + size])


def keep_to(cores: Sequence[int]) -> None:
    """Keep the calling thread, and every thread that it starts from now on, to these cores."""
    os.sched_setaffinity(0, cores)
