"""Did the server get slower, or leave something behind? What a soak is for, and cheap enough for every run."""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.judging.latency import values_ms
from tramontane.client.loadtest.judging.measures import JUDGED
from tramontane.client.loadtest.judging.quantiles import grouped_distribution
from tramontane.client.loadtest.record import Record
from tramontane.client.loadtest.result import Quantile
from tramontane.client.types import Stats

LEAST_WINDOW_S = 60.0
"""Of a shorter run the quarters are too short to tell a drift from a moment."""
LEAST_CHANGE = 0.1
"""A smaller change is of no interest, however certain."""


def drift_findings(records: Sequence[Record], window_s: tuple[float, float]) -> tuple[Finding, ...]:
    """Medians of the first and the last quarter of a run of at least a minute, where their intervals do not touch.

    TPOT p50 of 20 ms (19 .. 21) in the first quarter and 26 ms (25 .. 27) in the last: it drifted by 30 %.
    """
    start_s, end_s = window_s
    if end_s - start_s < LEAST_WINDOW_S:
        return ()
    quarter_s = (end_s - start_s) / 4
    found = []
    for measure in ("ttft", "tpot"):
        first = _median(records, measure, start_s, start_s + quarter_s)
        last = _median(records, measure, end_s - quarter_s, end_s)
        if first is None or last is None or not _apart(first, last):
            continue
        change = last.value / first.value - 1
        if abs(change) >= LEAST_CHANGE:
            text = (
                f"{measure} p50 drifted by {change:+.0%}: {first.value:.1f} ms in the run's first quarter,"
                f" {last.value:.1f} ms in its last"
            )
            found.append(Finding(severity=Severity.NOTE, text=text))
    return tuple(found)


def leftovers(at_rest: Stats | None) -> tuple[Finding, ...]:
    """What a router still holds after the last request has ended. Other users' requests count too."""
    found = []
    for router in at_rest.routers if at_rest is not None else ():
        held = {
            "waiting": router.waiting,
            "running": router.running,
            "microbatches in flight": router.in_flight_microbatches,
            "KV blocks": sum(router.kv_blocks_used),
        }
        if any(held.values()):
            words = ", ".join(f"{count} {what}" for what, count in held.items() if count)
            text = f"after the last request router {router.name} still holds {words}: a leak, or other users' requests"
            found.append(Finding(severity=Severity.NOTE, text=text))
    return tuple(found)


def _median(records: Sequence[Record], measure: str, start_s: float, end_s: float) -> Quantile | None:
    chosen = [each for each in records if each.ok and each.conduct in JUDGED and start_s <= each.intended_s < end_s]
    found = grouped_distribution([values_ms(record, measure) for record in chosen])
    return found.quantile(0.5) if found else None


def _apart(one: Quantile, other: Quantile) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.high < other.low or other.high < one.low
