"""Ends what is left of a Ray that we started when its `serve` was killed: Ray's own agents outlive a killed driver.

`python -m tramontane.cluster.reaper PID` runs beside `serve` in a process of its own. Its standard input is a pipe that
closes when `serve` ends, however it ends.
"""

from __future__ import annotations

import contextlib
import select
import sys

import psutil

FIRST_PERIOD_S, LONGEST_PERIOD_S = 0.25, 2.0
"""Ray starts most of its processes within seconds, each the child of another. A look takes 2 ms of a core, so the
periods grow by a tenth each."""
GRACE_S = 3.0
"""For what ends by itself."""


def reap(serve: psutil.Process) -> None:
    """Keep in mind all that `serve` has started, and once it has ended, end what is still there."""
    started: set[psutil.Process] = set()
    itself = psutil.Process()
    period_s = FIRST_PERIOD_S
    while not select.select([sys.stdin], [], [], period_s)[0]:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.update(serve.children(recursive=True))
        period_s = min(period_s * 1.1, LONGEST_PERIOD_S)
    for process in list(started):  # born since the last look
        with contextlib.suppress(psutil.NoSuchProcess):
            started.update(process.children(recursive=True))
    started.discard(itself)
    _, left = psutil.wait_procs(started, timeout=GRACE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil knows when a process id has been given to another process


if __name__ == "__main__":
    reap(psutil.Process(int(sys.argv[1])))
