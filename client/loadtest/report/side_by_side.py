"""Several runs in one table: the levels of a sweep, runs beside each other, and the two of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tramontane.client.loadtest.report.sections import Section, about
from tramontane.client.loadtest.report.wording import DASH, interval, load_words, number, offered
from tramontane.client.loadtest.result import RunResult, SweepResult

if TYPE_CHECKING:
    from tramontane.client.loadtest.judging.compare import Comparison


def about_sweep(sweep: SweepResult) -> Section:
    """What all levels have in common; the load is said for all of them."""
    first, last = sweep.levels[0], sweep.levels[-1]
    load = f"{len(sweep.levels)} levels from {offered(first.load)} to {offered(last.load)}; the first: "
    load += load_words(first.load)
    shared = about(first)
    return replace(shared, rows=tuple((name, load if name == "load" else cell) for name, cell in shared.rows))


def levels(results: Sequence[RunResult]) -> Section:
    """A row per run."""

    def row(result: RunResult) -> tuple[str, ...]:
        ttft, itl = result.latencies.get("ttft"), result.latencies.get("itl")
        cells = [number(found.at(q) if found else None) for found, q in ((ttft, 0.5), (ttft, 0.95), (ttft, 0.99))]
        cells += [number(found.at(q) if found else None) for found, q in ((itl, 0.5), (itl, 0.95))]
        rates = result.throughput
        cells += [number(rates.output_tokens_per_s), number(rates.requests_per_s), number(rates.goodput_per_s)]
        missed = [str(kept.objective) for kept in result.objectives if kept.met is False]
        verdict = "MISSED" if missed else "kept" if any(kept.met for kept in result.objectives) else DASH
        counts = result.counts
        return offered(result.load), *cells, str(counts.refused), str(counts.broken), verdict

    latencies, rates = ("ttft p50", "p95", "p99", "itl p50", "p95"), ("tokens/s", "requests/s", "goodput/s")
    heads = (*latencies, *rates, "refused", "failed", "objectives")
    return Section(title="Levels; latencies in ms", columns=heads, rows=tuple(map(row, results)))


def changes(comparison: Comparison) -> Section:
    """A row per figure. The intervals of all ratios hold together with 95 % confidence."""
    rows = tuple(
        (each.name, number(each.a), number(each.b), f"{each.ratio:.3f}", interval(each.low, each.high), each.verdict)
        for each in comparison.changes
    )
    note = f"A change below {comparison.threshold * 100:g} % does not matter. "
    note += "All intervals hold together with 95 % confidence."
    heads = ("A", "B", "B / A", "95 %", "verdict")
    return Section(title="B against A", columns=heads, rows=rows, note=note)
