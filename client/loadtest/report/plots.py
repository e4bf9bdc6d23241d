"""The plots of one run: how latencies spread, what happened when, where time and CPU went.

They stay light: a curve has about as many steps as a screen has pixels, a timeline at most `MAX_STEPS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tramontane.client.loadtest.report.charts import (
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Axis,
    Bar,
    Bars,
    Chart,
    Key,
    bars,
    from_zero,
    logarithmic,
)
from tramontane.client.loadtest.report.sections import BREAKDOWN_PARTS
from tramontane.client.loadtest.report.wording import number, percent, percentile, process_words, stage_words
from tramontane.client.loadtest.result import Breakdown, RunResult, Second, ServerView

MAX_STEPS = 600
MAX_POINTS = 1500
"""Of a distribution's curve, before it is drawn."""
_ROLES = {"gateway": ORANGE, "router": GREEN, "stage": BLUE, "controller": PURPLE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """What is drawn, with what the page says around it: charts that share their horizontal axis, or bars."""

    title: str
    caption: str
    charts: tuple[Chart, ...] = ()
    bars: Bars | None = None
    wide: bool = False
    """Takes the page's whole width."""


def run_plots(result: RunResult) -> list[Plot]:
    """Every plot for which the run has figures."""
    plots = []
    if result.samples.ttfts_ms:
        plots.append(_distributions(result))
    if result.timeline:
        plots.append(_timeline(result))
    if result.breakdown is not None:
        plots.append(_breakdown(result.breakdown))
    if result.server is not None:
        if result.server.stage_busy:
            plots.append(_busy(result.server))
        if result.server.processes:
            plots.append(_processes(result.server))
    return plots


def curve(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution: values, ascending, and the percentage of samples up to each.

    Of many samples some are left out evenly, but none of the slowest hundred: the tail is what a reader looks for.

    >>> curve([30.0, 10.0])[0].tolist(), curve([30.0, 10.0])[1].tolist()
    ([10.0, 30.0], [50.0, 100.0])
    """
    ordered = np.sort(np.asarray(values, float))
    count = len(ordered)
    kept = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS - 100)).astype(int))
    kept = np.union1d(kept, np.arange(max(count - 100, 0), count))
    return ordered[kept], (kept + 1) / count * 100


def _distributions(result: RunResult) -> Plot:
    samples = result.samples
    measured = {
        "ttft": ("TTFT", samples.ttfts_ms),
        "itl": ("ITL", [gap for itls in samples.itls_ms for gap in itls]),
        "tpot": ("TPOT", [tpot for tpot in samples.tpots_ms if tpot is not None]),
        "e2el": ("end to end", samples.e2els_ms),
    }
    limits = [kept.objective.limit_ms for kept in result.objectives]
    every = [*limits, *(value for _, values in measured.values() for value in (values and (min(values), max(values))))]
    chart = Chart(x=logarithmic("ms, logarithmic", every), y=Axis(title="% of samples", high=100.0), height=360)
    colours = dict(zip(measured, COLOURS, strict=False))
    for (measure, (name, values)), dash in zip(measured.items(), DASHES, strict=True):
        if values:
            chart.staircase(list(zip(*curve(values), strict=True)), colours[measure], dash)
            chart.keys.append(Key(name=name, colour=colours[measure], dash=dash))
        for quantile in result.latencies[measure].quantiles if measure in result.latencies else ():
            says = f"{name} {percentile(quantile.q)}: {number(quantile.value)} ms"
            chart.mark(quantile.value, quantile.q * 100, colours[measure], "dot", says)
    for kept in result.objectives:
        goal, colour = kept.objective, colours.get(kept.objective.measure, GREY)
        chart.mark(goal.limit_ms, goal.q * 100, colour, "cross", str(goal))
        chart.keys.append(Key(name=str(goal), colour=colour, shape="cross"))
    caption = "The share of samples that took at most so long; the dots are the quantiles of the table."
    if result.objectives:
        caption += " An objective is kept where its curve passes above its cross."
    return Plot(title="Latency distribution", caption=caption, charts=(chart,), wide=True)


def thinned(timeline: Sequence[Second]) -> tuple[int, list[Second]]:
    """The timeline in at most `MAX_STEPS` steps, and how many seconds each of them spans.

    Counts are summed over a step; of open requests the most is kept, of medians the middle one.
    """
    step = -(-len(timeline) // MAX_STEPS)
    return step, [_joined(timeline[start : start + step]) for start in range(0, len(timeline), step)]


def _joined(seconds: Sequence[Second]) -> Second:
    medians = [second.ttft_ms for second in seconds if second.ttft_ms is not None]
    return Second(
        at_s=seconds[0].at_s,
        arrived=sum(second.arrived for second in seconds),
        ended=sum(second.ended for second in seconds),
        failed=sum(second.failed for second in seconds),
        open=max(second.open for second in seconds),
        output_tokens=sum(second.output_tokens for second in seconds),
        ttft_ms=float(np.median(medians)) if medians else None,
    )


def _timeline(result: RunResult) -> Plot:
    step, seconds = thinned(result.timeline)
    end = float(result.timeline[-1].at_s + 1)
    edges = [*(float(second.at_s) for second in seconds), end]
    rows: list[tuple[str, list[float | None], str]] = [
        ("open requests", [second.open for second in seconds], BLUE),
        ("output tokens/s", [second.output_tokens / step for second in seconds], GREEN),
        ("median TTFT, ms", [second.ttft_ms for second in seconds], PURPLE),
        ("failed requests/s", [second.failed / step for second in seconds], RED),
    ]
    shown = [row for row in rows if any(row[1])]
    x = Axis(title="s from the run's start", high=end)
    charts: list[Chart] = []
    for name, values, colour in shown:
        y = from_zero(name, [value for value in values if value is not None])
        chart = Chart(x=x, y=y, height=110, with_x=name == shown[-1][0])
        _mark(chart, result, with_words=not charts)
        chart.levels(edges, values, colour)
        for (left, right), value in zip(pairwise(edges), values, strict=True):
            chart.column(left, right, f"{left:g} s: {number(value)} {name}")
        charts.append(chart)
    caption = "Grey: warm-up and drain, sent but not measured."
    if result.stalls:
        caption += " Orange: stalls, in which requests were open and not one message came."
    if result.faults:
        caption += " Red lines: faults."
    if len(shown) < len(rows):
        caption += f" All the time 0: {', '.join(row[0] for row in rows if row not in shown)}."
    return Plot(title="Timeline", caption=caption, charts=tuple(charts), wide=True)


def _mark(chart: Chart, result: RunResult, *, with_words: bool) -> None:
    """Bands for what was not measured and for stalls; a line per fault."""
    start, end = result.window_s
    chart.band(0.0, start, GREY)
    chart.band(end, chart.x.high, GREY)
    for stall in result.stalls:
        chart.band(stall.start_s, stall.end_s, ORANGE)
    for fault in result.faults:
        chart.upright(fault.at_s, RED, fault.fault if with_words else "")


def _breakdown(parts: Breakdown) -> Plot:
    values = [(name, max(float(getattr(parts, field)), 0.0)) for name, field in BREAKDOWN_PARTS]
    whole = sum(value for _, value in values) or 1.0
    found = tuple(
        Bar(name=name, share=value / whole * 100, colour=colour, text=f"{number(value)} ms, {percent(value / whole)}")
        for (name, value), colour in zip(values, (GREY, ORANGE, GREEN, BLUE, PURPLE), strict=True)
    )
    caption = f"From the intended arrival to the end, on the mean of completed requests: {number(whole)} ms."
    return Plot(title="Where the time went", caption=caption, bars=Bars(bars=found, end_to_end=True), wide=True)


def _busy(server: ServerView) -> Plot:
    found = bars(
        [(stage_words(name), busy, percent(busy), BLUE) for name, busy in server.stage_busy.items()], whole=1.0
    )
    caption = "Share of the time that each stage spent inside its steps; the whole width is all of it."
    return Plot(title="Stages busy", caption=caption, bars=found)


def _processes(server: ServerView) -> Plot:
    found = bars(
        [
            (process_words(process), process.cores, number(process.cores), _ROLES.get(process.role, GREY))
            for process in server.processes
        ]
    )
    return Plot(title="CPU by process", caption="Cores: CPU seconds per second over the window.", bars=found)
