"""One HTML page that holds everything: figures and plots. It can be mailed, kept, and opened without a net.

Names and errors come from servers and are shown, never run: jinja escapes them, and by the page's own policy no script
runs and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tramontane.client.loadtest.finding import Finding, Severity, worst_first
from tramontane.client.loadtest.report.charts import SHAPES
from tramontane.client.loadtest.report.plots import run_plots
from tramontane.client.loadtest.report.sections import INTERVAL_ROW, Section, about, failures, run_sections
from tramontane.client.loadtest.report.side_by_side import about_sweep, levels
from tramontane.client.loadtest.report.sweep_plots import sweep_plots
from tramontane.client.loadtest.report.wording import (
    DASH,
    Verdict,
    number,
    offered,
    percent,
    percentile,
    sweep_findings,
    sweep_verdict,
    verdict,
)
from tramontane.client.loadtest.result import MEASURES, RunResult, SweepResult

_HERE = Path(__file__).parent
MEDIAN, HIGHEST_SHOWN = 0.5, 0.95
_WIDE_FROM = 6
"""Tables with as many columns take the page's whole width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One key figure."""

    name: str
    value: str
    unit: str = ""
    note: str = ""


def render_page(results: Sequence[RunResult], sweep: SweepResult | None = None) -> str:
    """The page of one run, of several beside each other, or of a sweep and its levels."""
    runs = results or (sweep.levels if sweep is not None else ())
    assert runs, "a page needs a run"
    findings, (tone, said) = _summing_up(runs, sweep)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["shapes"] = SHAPES
    return environment.get_template("page.html.j2").render(
        title=f"Load test of {runs[0].target.model}",
        first=runs[0],
        tone=tone,
        verdict=said,
        findings=worst_first(findings),
        tiles_of_all=_sweep_tiles(sweep) if sweep is not None else _run_tiles(runs[0]) if len(runs) == 1 else [],
        overview=[_shown(levels(runs)), *map(_shown, failures(runs))] if len(runs) > 1 else [],
        about=_shown(about_sweep(sweep) if sweep is not None else about(runs[0])),
        overview_plots=sweep_plots(sweep) if sweep is not None else [],
        runs=[_run(run, verdict(run), len(runs)) for run in runs],
        measures=MEASURES,
        Severity=Severity,
    )


def _summing_up(runs: Sequence[RunResult], sweep: SweepResult | None) -> tuple[list[Finding], Verdict]:
    """What stands on top of the page: findings, and one sentence on all that is shown."""
    if sweep is not None:
        return sweep_findings(sweep), sweep_verdict(sweep)
    if len(runs) == 1:
        return list(runs[0].findings), verdict(runs[0])
    beside = SweepResult(levels=tuple(runs), objectives=(), best_rate=None, first_missed_rate=None)
    return sweep_findings(beside), (None, f"{len(runs)} runs beside each other.")


def _run(run: RunResult, said: Verdict, runs: int) -> dict[str, Any]:
    """What the template shows of one run; of several, each is folded away under its name."""
    return {
        "name": offered(run.load),
        "folded": runs > 1,
        "tone": said[0],
        "verdict": said[1],
        "plots": run_plots(run),
        "tables": [_shown(section) for section in run_sections(run)],
        "about": _shown(about(run)),
        "tiles": _run_tiles(run) if runs > 1 else [],
    }


def _run_tiles(run: RunResult) -> list[Tile]:
    counts, rates = run.counts, run.throughput
    tiles = [_latency_tile(run, measure, name) for measure, name in (("ttft", "TTFT"), ("itl", "ITL"), ("e2el", "E2E"))]
    tiles.append(Tile(name="Output", value=number(rates.output_tokens_per_s), unit="tokens/s"))
    tiles.append(Tile(name="Completed", value=number(rates.requests_per_s), unit="requests/s"))
    if rates.goodput_per_s is not None:
        note = f"{percent(rates.goodput_share)} of all requests met every objective"
        tiles.append(Tile(name="Goodput", value=number(rates.goodput_per_s), unit="requests/s", note=note))
    if run.refusals is not None:
        note = f"of {counts.sent} sent; p50 {number(run.refusals.at(0.5))} ms"
        tiles.append(Tile(name="Refused", value=str(counts.refused), unit="requests", note=note))
    tiles.append(Tile(name="Failed or cut", value=str(counts.broken), unit="requests", note=f"of {counts.sent} sent"))
    return tiles


def _latency_tile(run: RunResult, measure: str, name: str, where: str = "") -> Tile:
    """The quantile that an objective is about, as it was judged; else p95, or the highest below it that is known."""
    found = run.latencies.get(measure)
    notes = [where] if where else []
    for kept in run.objectives:
        if kept.objective.measure == measure:
            notes.insert(0, f"objective below {kept.objective.limit_ms:g} ms")
            q, value = kept.objective.q, kept.value_ms
            break
    else:
        known = [each for each in (found.quantiles if found else ()) if each.q <= HIGHEST_SHOWN]
        q, value = (known[-1].q, known[-1].value) if known else (HIGHEST_SHOWN, None)
    if found is not None and q > MEDIAN and (median := found.at(MEDIAN)) is not None:
        notes.insert(0, f"p50 {number(median)} ms")
    return Tile(name=f"{name} {percentile(q)}", value=number(value), unit="ms", note=", ".join(notes))


def _sweep_tiles(sweep: SweepResult) -> list[Tile]:
    best = f"{sweep.best_rate:.4g}" if sweep.best_rate is not None else DASH
    tiles = [Tile(name="Best rate", value=best, unit="requests/s", note="the highest that kept every objective")]
    at = "at the best rate"
    at_best = next((level for level in sweep.levels if level.load.rate == sweep.best_rate), None)
    if at_best is not None and sweep.best_rate is not None:
        tiles += [_latency_tile(at_best, "ttft", "TTFT", at), _latency_tile(at_best, "itl", "ITL", at)]
        output = number(at_best.throughput.output_tokens_per_s)
        tiles.append(Tile(name="Output", value=output, unit="tokens/s", note=at))
    most = max(level.throughput.output_tokens_per_s for level in sweep.levels)
    tiles.append(Tile(name="Most output", value=number(most), unit="tokens/s", note="of any level"))
    return tiles


def _shown(section: Section) -> dict[str, Any]:
    """A section, and how the page lays it out."""
    width = max(map(len, section.rows), default=0)
    return {"section": section, "wide": width >= _WIDE_FROM, "small": [row[0] == INTERVAL_ROW for row in section.rows]}
