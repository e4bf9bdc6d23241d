"""What a run says while it runs, on stderr: one line that changes where a terminal is there, else one every 10 s."""

from __future__ import annotations

import asyncio
import statistics
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

from rich.status import Status

from tramontane.client.loadtest.generator.driver import Pace
from tramontane.client.loadtest.plan import Plan
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.report.console import ReportConsole
from tramontane.client.loadtest.report.wording import printable

REDRAW_S = 0.5
LINE_S = 10.0


class Progress:
    """Says how far a run is. A quiet one says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = ReportConsole(file=sys.stderr, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(printable(text), style="dim", markup=False, soft_wrap=True)

    @contextmanager
    def watching(self, plan: Plan, pace: Pace, records: list[Record]) -> Iterator[None]:
        """Report on a run as long as the block lasts; `records` grows meanwhile."""
        reporting = asyncio.create_task(self._report(plan, pace, records))
        try:
            yield
        finally:
            reporting.cancel()

    async def _report(self, plan: Plan, pace: Pace, records: list[Record]) -> None:
        if self._console.is_terminal:
            with Status("starting", console=self._console) as status:
                while True:
                    await asyncio.sleep(REDRAW_S)
                    status.update(line(plan, pace.now(), records))
        while True:
            await asyncio.sleep(LINE_S)
            self.say(line(plan, pace.now(), records))


def line(plan: Plan, now_s: float, records: list[Record]) -> str:
    """How a run stands: its clock, its requests, and the latest TTFTs.

    `12 / 60 s | 118 due | 7 open | 111 ended | 0 failed | TTFT 132 ms`
    """
    failed = sum(record.failed for record in records)
    parts = [f"{min(max(now_s, 0.0), plan.load.duration_s):.0f} / {plan.load.duration_s:.0f} s"]
    if plan.load.is_open:
        due = bisect_right(plan.arrivals_s, now_s)
        parts += [f"{due} due", f"{due - len(records)} open"]
    parts += [f"{len(records)} ended", f"{failed} failed"]
    first = [each.message_times_s[0] - each.intended_s for each in records[-50:] if each.message_times_s]
    if first:
        parts.append(f"TTFT {statistics.median(first) * 1000:.0f} ms")
    if now_s > plan.load.duration_s:
        parts.append("draining")
    return " | ".join(parts)
