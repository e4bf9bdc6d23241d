"""An event loop whose time is a number: sleeping takes none, and everything happens exactly when it is due."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class VirtualLoop(asyncio.SelectorEventLoop):
    """Instead of waiting for a timer, moves its clock to it. Nothing outside the process can wake it."""

    def __init__(self) -> None:
        super().__init__(_NeverWaits(self))
        self.at_s = 0.0

    def time(self) -> float:
        return self.at_s


class _NeverWaits(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._of = loop

    def select(self, timeout: float | None = None) -> list:
        assert timeout is not None, "everyone waits, and no timer runs"
        self._of.at_s += timeout
        return super().select(0)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it to its end, in no time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)
