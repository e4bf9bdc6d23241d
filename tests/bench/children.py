"""Processes of our own for what would otherwise share memory, threads and a warmed allocator with the next measurement.

They are forked from a server that has imported torch and computed nothing: a second saved for each.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any


def children() -> ForkServerContext:
    """What makes them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.inprocess", "driving"])
    return context


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of some module in a process of its own, and return what it returns."""
    with children().Pool(1) as pool:
        return pool.apply(function, arguments)
