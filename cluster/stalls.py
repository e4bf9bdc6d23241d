"""How long an event loop stands still: whatever it does in one go, everybody else waits for."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

EVERY_S = 0.01
"""Between two looks; a stall may be so much longer than it seems."""
RECENT_S = 60


class Longest:
    """The longest of some durations, ever and over the last minute.

    >>> longest = Longest()
    >>> for now_s, seconds in ((10.0, 0.2), (11.0, 0.05), (50.0, 0.1)):
    ...     longest.add(now_s, seconds)
    >>> [longest.ever_s, longest.recent_s(60.0), longest.recent_s(100.0), longest.recent_s(200.0)]
    [0.2, 0.2, 0.1, 0.0]
    """

    def __init__(self) -> None:
        self.ever_s = 0.0
        self._recent: deque[tuple[int, float]] = deque()
        """A second and the longest in it, in order of time; one that a longer one follows is left out."""

    def add(self, now_s: float, seconds: float) -> None:
        """Something has lasted so long, until now."""
        self.ever_s = max(self.ever_s, seconds)
        while self._recent and self._recent[-1][1] <= seconds:
            self._recent.pop()
        if not self._recent or self._recent[-1][0] < int(now_s):
            self._recent.append((int(now_s), seconds))
        self._forget(now_s)

    def recent_s(self, now_s: float) -> float:
        """The longest of the last minute."""
        self._forget(now_s)
        return self._recent[0][1] if self._recent else 0.0

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < int(now_s) - RECENT_S:
            self._recent.popleft()


class LoopWatch:
    """Looks at an event loop from within: a timer that is late says how long the loop has stood still."""

    def __init__(self) -> None:
        self.all = Longest()
        self.own = Longest()
        """Without the time for which the loop's thread was ready and other threads had the machine's cores."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Watch the loop that runs here."""
        self._queueing = Queueing()
        self._again()

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._queueing.close()

    def _again(self) -> None:
        self._queued_s = self._queueing.seconds()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(EVERY_S, self._look, loop.time() + EVERY_S)

    def _look(self, due_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        late_s = max(0.0, now_s - due_s)
        self.all.add(now_s, late_s)
        self.own.add(now_s, max(0.0, late_s - (self._queueing.seconds() - self._queued_s)))
        self._again()


class Queueing:
    """How long the calling thread has been ready to run without a core, as Linux counts it; 0 where nobody does."""

    def __init__(self) -> None:
        path = Path("/proc/thread-self/schedstat")
        self._file = os.open(path, os.O_RDONLY) if path.exists() else None

    def seconds(self) -> float:
        """Since the thread began."""
        return 0.0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1]) / 1e9

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
