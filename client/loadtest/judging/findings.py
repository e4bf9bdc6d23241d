"""The sentences that a reader of a run must not miss, drawn from its latencies, ends, objectives and course.

Others are drawn where their matter is: of the answers in `checks.py`, of drift and leftovers in `drift.py`, of a shared
machine in `server_view.py`, of an early stop in `assessment.py`, of a sweep in `session.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.judging.measures import Measured
from tramontane.client.loadtest.judging.quantiles import LEAST_BEYOND, beyond
from tramontane.client.loadtest.plan import Load
from tramontane.client.loadtest.result import Distribution, GeneratorLag, ObjectiveResult, Stall

SPOILING_SHARE = 0.1
LEAST_LAG_MS = 2.0
"""What an event loop on a busy machine may be late at any time; below it, timers themselves are not exact."""
COMPARED = (0.5, 0.9, 0.95, 0.99)


def lag_findings(lag: GeneratorLag, latencies: Mapping[str, Distribution]) -> tuple[Finding, ...]:
    """Whether the generator's own lag spoils the figures.

    A latency that is measured is the server's plus at most the generator's lag, so a quantile is overstated by about
    the lag's same quantile. Like is compared with like: with a TTFT of p50 80 ms and p99 300 ms, a lag in sending of
    p50 1 ms and p99 20 ms is 1 % and 7 % and harmless; p50 9 ms or p99 31 ms would be more than a tenth, and the run
    invalid. Lag in sending stands in TTFT alone; lag in reading in each message's time, so in ITL too.
    """
    found = (
        _spoiled("sending", lag.send, "ttft", latencies),
        _spoiled("reading", lag.read, "ttft", latencies),
        _spoiled("reading", lag.read, "itl", latencies),
    )
    return tuple(finding for finding in found if finding is not None)


def findings_of_figures(
    measured: Measured, load: Load, lag: GeneratorLag, is_stationary: bool | None, stalls: Sequence[Stall]
) -> tuple[Finding, ...]:
    """All findings that records and lag give rise to."""
    return (
        *lag_findings(lag, measured.latencies),
        *_on_answers(measured),
        *_on_objectives(measured.objectives, measured.counts.sent, load),
        *_on_the_course(is_stationary, load, stalls),
    )


def _spoiled(
    doing: str, lag: Distribution | None, measure: str, latencies: Mapping[str, Distribution]
) -> Finding | None:
    """The worst quantile at which the lag is too large a part of the measure."""
    if lag is None or measure not in latencies:
        return None
    both = [(q, lag.at(q), latencies[measure].at(q)) for q in COMPARED]
    late = [(ours, q, whole) for q, ours, whole in both if ours is not None and whole is not None]
    spoiled = [
        (ours / whole if whole else float("inf"), q, ours, whole)
        for ours, q, whole in late
        if ours > max(LEAST_LAG_MS, SPOILING_SHARE * whole)
    ]
    if not spoiled:
        return None
    _, q, ours, whole = max(spoiled)
    return Finding(
        severity=Severity.INVALID,
        text=f"the generator's own lag in {doing}, p{q * 100:g} {ours:.1f} ms, is more than a tenth of"
        f" {measure} p{q * 100:g} {whole:.1f} ms: use more workers or another machine",
    )


def _on_answers(measured: Measured) -> Iterable[Finding]:
    counts = measured.counts
    if not counts.sent:
        yield Finding(severity=Severity.INVALID, text="no request arrived in the measured window")
    elif not counts.completed:
        yield Finding(severity=Severity.INVALID, text=f"none of {counts.sent} requests was completed")
    elif counts.broken > counts.sent / 2:
        text = f"{counts.failed} of {counts.sent} requests failed and {counts.cut} were cut: most were not served"
        yield Finding(severity=Severity.INVALID, text=text)
    elif counts.failed or counts.cut:
        refused = f" ({counts.refused} refused)" if counts.refused else ""
        yield _note(
            f"{counts.failed} of {counts.sent} requests failed{refused} and {counts.cut} were cut;"
            " latencies are those of the others, objectives count them as missed"
        )
    if measured.unreadable:
        text = f"{len(measured.unreadable)} answers could not be decoded; the first: {measured.unreadable[0]}"
        yield Finding(severity=Severity.INVALID, text=text)
    if measured.empty:
        yield _note(f"{measured.empty} completed requests brought no token; objectives count them as missed")
    if measured.uncounted:
        yield _note(f"the server did not count the tokens of {measured.uncounted} requests; one per message is assumed")


def _on_objectives(objectives: Sequence[ObjectiveResult], sent: int, load: Load) -> Iterable[Finding]:
    if not load.is_open:
        yield _note("a closed loop slows down with the server and hides overload: no verdict on objectives")
    for kept in objectives:
        if kept.met is False:
            value = "infinite, with failed requests" if kept.value_ms is None else f"{kept.value_ms:.1f} ms"
            yield Finding(severity=Severity.MISSED, text=f"{kept.objective} was missed: it is {value}")
        if kept.met is not None and beyond(max(sent, 1), kept.objective.q) < LEAST_BEYOND:
            yield _note(f"{kept.objective} is judged by {sent} requests, fewer than {LEAST_BEYOND} of them beyond it")


def _on_the_course(is_stationary: bool | None, load: Load, stalls: Sequence[Stall]) -> Iterable[Finding]:
    if is_stationary is False:
        yield _note(
            "the run never became stationary: open requests kept piling up or draining,"
            " so its latencies depend on how long it lasted"
        )
    if stalls:
        longest = max(stalls, key=lambda stall: stall.end_s - stall.start_s)
        yield _note(
            f"{len(stalls)} stall{'s' * (len(stalls) > 1)}: requests were open and no message came, the longest for"
            f" {longest.end_s - longest.start_s:.1f} s from {longest.start_s:.1f} s on"
        )


def _note(text: str) -> Finding:
    return Finding(severity=Severity.NOTE, text=text)
