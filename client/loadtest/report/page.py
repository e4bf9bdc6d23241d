"""One HTML page that holds everything: figures, plots, plotly itself. It can be mailed, kept, and opened without a net.

Names and errors come from servers and are shown, never run: jinja escapes them, and the page's own policy lets exactly
its two scripts run, by their digests, and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from tramontane.client.loadtest.report.plots import Plot, run_plots
from tramontane.client.loadtest.report.sections import INTERVAL_ROW, Section, about, run_sections
from tramontane.client.loadtest.report.side_by_side import about_sweep, levels
from tramontane.client.loadtest.report.sweep_plots import sweep_plots
from tramontane.client.loadtest.report.wording import (
    DASH,
    Verdict,
    number,
    offered,
    percent,
    sweep_findings,
    sweep_verdict,
    verdict,
)
from tramontane.client.loadtest.result import MEASURES, Finding, RunResult, Severity, SweepResult, worst_first

_HERE = Path(__file__).parent
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
    figures: list[Any] = []
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plotly, script = get_plotlyjs(), (_HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        title=f"Load test of {runs[0].target.model}",
        first=runs[0],
        tone=tone,
        verdict=said,
        findings=worst_first(findings),
        tiles_of_all=_sweep_tiles(sweep) if sweep is not None else _run_tiles(runs[0]) if len(runs) == 1 else [],
        overview=_shown(levels(runs)) if len(runs) > 1 else None,
        about=_shown(about_sweep(sweep) if sweep is not None else about(runs[0])),
        overview_plots=_numbered(sweep_plots(sweep), figures) if sweep is not None else [],
        runs=[_run(run, figures, verdict(run), len(runs)) for run in runs],
        measures=MEASURES,
        figures=figures,
        plotly=plotly,
        script=script,
        digests=[_digest(plotly), _digest(script)],
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


def _run(run: RunResult, figures: list[Any], said: Verdict, runs: int) -> dict[str, Any]:
    """What the template shows of one run; of several, each is folded away under its name."""
    return {
        "name": offered(run.load),
        "folded": runs > 1,
        "tone": said[0],
        "verdict": said[1],
        "plots": _numbered(run_plots(run), figures),
        "tables": [_shown(section) for section in run_sections(run)],
        "about": _shown(about(run)),
        "tiles": _run_tiles(run) if runs > 1 else [],
    }


def _run_tiles(run: RunResult) -> list[Tile]:
    counts, rates = run.counts, run.throughput
    lost = counts.failed + counts.cut
    tiles = [_latency_tile(run, measure, name) for measure, name in (("ttft", "TTFT"), ("itl", "ITL"), ("e2el", "E2E"))]
    tiles.append(Tile(name="Output", value=number(rates.output_tokens_per_s), unit="tokens/s"))
    tiles.append(Tile(name="Completed", value=number(rates.requests_per_s), unit="requests/s"))
    if rates.goodput_per_s is not None:
        note = f"{percent(rates.goodput_share)} of all requests met every objective"
        tiles.append(Tile(name="Goodput", value=number(rates.goodput_per_s), unit="requests/s", note=note))
    tiles.append(Tile(name="Failed or cut", value=str(lost), unit="requests", note=f"of {counts.sent} sent"))
    return tiles


def _latency_tile(run: RunResult, measure: str, name: str, where: str = "") -> Tile:
    found = run.latencies.get(measure)
    median, p95 = (found.at(0.5), found.at(0.95)) if found else (None, None)
    return Tile(name=f"{name} p95", value=number(p95), unit="ms", note=f"p50 {number(median)} ms {where}")


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


def _numbered(plots: list[Plot], figures: list[Any]) -> list[dict[str, Any]]:
    """The plots with each one's place in `figures`, where the page's script finds its data."""
    shown = []
    for plot in plots:
        shown.append({"plot": plot, "number": len(figures), "height": plot.figure.layout.height})
        figures.append(json.loads(plot.figure.to_json()))
    return shown


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
