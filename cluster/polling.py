"""Questions that may hang, asked on threads of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")

JOIN_TIMEOUT_S = 1.0


class Poll(Generic[T]):
    """Asks the same again and again, from `with` on until its end. A call that hangs holds up nobody but this poll."""

    def __init__(self, ask: Callable[[], T | None], period_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """`ask` gives None where there was no answer; what it raises ends the poll."""
        self._ask = ask
        self._period_s = period_s
        self._now = now
        self._answer: T | None = None
        self._answered_s = now()
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._answered_s = self._now()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(JOIN_TIMEOUT_S)

    def latest(self) -> T | None:
        """The last answer; None before the first. Raises what `ask` has raised."""
        if self._failure is not None:
            raise self._failure
        return self._answer

    def silent_s(self) -> float:
        """How long ago the last answer came, or the poll began."""
        return self._now() - self._answered_s

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                answer = self._ask()
                if answer is not None:
                    self._answer, self._answered_s = answer, self._now()
                self._ended.wait(self._period_s)
        except Exception as error:
            self._failure = error


def in_time(job: Callable[[], object], limit_s: float) -> bool:
    """Whether a job ends within its limit. One that does not is left behind on its thread.

    Raises what the job raises.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            job()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    return not thread.is_alive()
