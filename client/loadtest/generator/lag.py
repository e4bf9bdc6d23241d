"""How late an event loop is: a generator that reads late reports its own slowness as the server's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

EVERY_S = 0.02


class LagSampler:
    """Measures all the time how long an event waits for the loop, from a thread of its own.

    A message from the network takes the same way: another thread wakes the loop, and the time until the loop comes to
    it is added to what the client believes of the server. (The loop's own timers would not do: they round up to 1 ms.)

    Knocks have a schedule, and each counts from when it was due: where the whole process stood still, the thread did
    too, and makes up for the knocks that it has missed.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.samples: list[tuple[float, float]] = []
        """When, and how late, in seconds; the times are `now`'s."""
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._knock, name="lag sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    def _knock(self) -> None:
        due = self._loop.time() + EVERY_S
        while not self._over.wait(max(0.0, due - self._loop.time())):
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._answer, due)
            due += EVERY_S

    def _answer(self, due: float) -> None:
        self.samples.append((self._now(), self._loop.time() - due))
