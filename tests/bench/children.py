"""Processes of our own for what would otherwise share memory, threads and a warmed allocator with the next measurement.

They are forked from a server that has imported torch and computed nothing, which saves a second or two for each.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import ForkServerContext
from typing import Any


def children() -> ForkServerContext:
    """What makes them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of some module in a process of its own, and return what it returns.

    Raises:
        BrokenProcessPool: the process died.
    """
    with ProcessPoolExecutor(1, children()) as pool:
        return pool.submit(function, *arguments).result()
