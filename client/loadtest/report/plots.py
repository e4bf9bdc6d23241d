"""The plots of one run, as plotly figures: how latencies spread, what happened when, where time and CPU went.

Colours tell series apart for colour-blind readers on light and on dark ground alike, and never alone: dashes and marks
differ too. The page sets fonts and grids, which depend on the reader's theme. Figures stay light: a curve has at most
`MAX_POINTS`. Texts are escaped, because plotly reads some HTML in them.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tramontane.client.loadtest.report.sections import BREAKDOWN_PARTS
from tramontane.client.loadtest.report.wording import number, percent, printable
from tramontane.client.loadtest.result import Breakdown, RunResult, Second, ServerView

MAX_POINTS = 1500

BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#2f7fc1", "#d08400", "#0f9873", "#b9609e", "#d5502a", "#808890"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
DASHES = ("solid", "dash", "dot", "dashdot")
_ROLES = {"gateway": ORANGE, "router": GREEN, "stage": BLUE, "controller": PURPLE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One figure with what the page says around it."""

    title: str
    caption: str
    figure: go.Figure
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


def figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure with what all have in common."""
    look = {"template": None, "height": height, "margin": {"l": 8, "r": 12, "t": 36, "b": 8}, "showlegend": True}
    legend = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return go.Figure(layout=look | {"legend": legend} | layout)


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis that names its unit."""
    return {"title": {"text": title, "standoff": 6}, "automargin": True, "zeroline": False} | settings


def escaped(text: str) -> str:
    """The text as plotly shows it letter by letter."""
    return html.escape(printable(text))


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
    return ordered[kept].round(3), ((kept + 1) / count * 100).round(4)


def _distributions(result: RunResult) -> Plot:
    samples = result.samples
    gaps = [gap for itls in samples.itls_ms for gap in itls]
    measured = {
        "ttft": ("TTFT", samples.ttfts_ms),
        "itl": ("ITL", gaps),
        "tpot": ("TPOT", [tpot for tpot in samples.tpots_ms if tpot is not None]),
        "e2el": ("end to end", samples.e2els_ms),
    }
    plot = figure(420, xaxis=axis("ms, logarithmic", type="log"), yaxis=axis("% of samples", range=[0, 101]))
    colours = dict(zip(measured, COLOURS, strict=False))
    for (measure, (name, values)), dash in zip(measured.items(), DASHES, strict=True):
        if values:
            x, y = curve(values)
            line = {"color": colours[measure], "dash": dash, "shape": "hv"}
            plot.add_scatter(x=np.maximum(x, 1e-3), y=y, name=name, mode="lines", line=line)
    for kept in result.objectives:
        goal = kept.objective
        plot.add_scatter(
            x=[goal.limit_ms],
            y=[goal.q * 100],
            name=escaped(str(goal)),
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": colours.get(goal.measure, GREY)},
        )
    caption = "The share of samples that took at most so long."
    if result.objectives:
        caption += " An objective is kept where its curve passes above its cross."
    return Plot(title="Latency distribution", caption=caption, figure=plot, wide=True)


def thinned(timeline: Sequence[Second]) -> tuple[int, list[Second]]:
    """The timeline in at most `MAX_POINTS` steps, and how many seconds each of them spans.

    Counts are summed over a step; of open requests the most is kept, of medians the middle one.
    """
    step = -(-len(timeline) // MAX_POINTS)
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
    at = [second.at_s + step / 2 for second in seconds]
    rows: list[tuple[str, list[float | None], str]] = [
        ("open requests", [second.open for second in seconds], BLUE),
        ("output tokens/s", [second.output_tokens / step for second in seconds], GREEN),
        ("median TTFT, ms", [second.ttft_ms for second in seconds], PURPLE),
        ("failed requests/s", [second.failed / step for second in seconds], RED),
    ]
    empty = figure(640, showlegend=False, margin={"l": 64, "r": 12, "t": 12, "b": 8})
    plot = make_subplots(rows=len(rows), shared_xaxes=True, vertical_spacing=0.05, figure=empty)
    for place, (name, values, colour) in enumerate(rows, 1):
        line = {"color": colour, "width": 1.6, "shape": "hvh"}
        mode = "lines+markers" if None in values else "lines"  # a value between two gaps would draw no line
        trace = go.Scatter(x=at, y=values, name=name, mode=mode, line=line, marker={"size": 3}, connectgaps=False)
        if colour == RED:
            trace = go.Bar(x=at, y=values, name=name, marker={"color": colour})
        plot.add_trace(trace, row=place, col=1)
        plot.update_yaxes(axis(name, rangemode="tozero"), row=place, col=1)
    plot.update_xaxes(zeroline=False, range=[0, result.timeline[-1].at_s + 1])
    plot.update_xaxes(axis("s from the run's start"), row=len(rows), col=1)
    _mark(plot, result)
    caption = "Grey: warm-up and drain, sent but not measured."
    if result.stalls:
        caption += " Orange: stalls, in which requests were open and not one message came."
    if result.faults:
        caption += " Red lines: faults."
    return Plot(title="Timeline", caption=caption, figure=plot, wide=True)


def _mark(plot: go.Figure, result: RunResult) -> None:
    """Bands over all rows for what was not measured and for stalls; a line per fault."""
    start, end = result.window_s
    last = result.timeline[-1].at_s + 1
    unmeasured = [(0.0, start, GREY, "warm-up"), (end, float(last), GREY, "drain")]
    stalled = [(stall.start_s, stall.end_s, ORANGE, "") for stall in result.stalls]
    for left, right, colour, name in unmeasured + stalled:
        if right > left:
            band = {"type": "rect", "x0": left, "x1": right, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
            plot.add_shape(band | {"fillcolor": colour, "opacity": 0.22, "line": {"width": 0}, "layer": "below"})
            if name and right - left > last / 12:
                _label(plot, (left + right) / 2, name, "center")
    for fault in result.faults:
        line = {"type": "line", "x0": fault.at_s, "x1": fault.at_s, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
        plot.add_shape(line | {"line": {"color": RED, "width": 1.5, "dash": "dash"}})
        _label(plot, fault.at_s, fault.fault, "left" if fault.at_s < last / 2 else "right")


def _label(plot: go.Figure, at: float, text: str, anchor: str) -> None:
    place = {"x": at, "y": 1, "xref": "x", "yref": "paper", "xanchor": anchor, "yanchor": "top"}
    plot.add_annotation(place | {"text": escaped(text), "showarrow": False, "font": {"size": 11}})


def _breakdown(parts: Breakdown) -> Plot:
    values = [max(float(getattr(parts, field)), 0.0) for _, field in BREAKDOWN_PARTS]
    whole = sum(values) or 1.0
    plot = figure(220, barmode="stack", xaxis=axis("ms"), yaxis={"visible": False})
    plot.update_layout(legend={"traceorder": "normal", "maxheight": 0.9})
    for (name, _), value, colour in zip(BREAKDOWN_PARTS, values, (GREY, ORANGE, GREEN, BLUE, PURPLE), strict=True):
        label = f"{number(value)} ms" if value > whole / 8 else ""
        bar = {"x": [value], "y": [""], "orientation": "h", "marker": {"color": colour}}
        text = {"text": [label], "textposition": "inside", "insidetextfont": {"color": "white"}}
        hover = f"{number(value)} ms, {percent(value / whole)}"
        plot.add_bar(name=name, hovertemplate=hover, **bar, **text)
    caption = "From the intended arrival to the end, on the mean of completed requests."
    return Plot(title="Where the time went", caption=caption, figure=plot, wide=True)


def _busy(server: ServerView) -> Plot:
    names = list(server.stage_busy)
    plot = _bars(names, [share * 100 for share in server.stage_busy.values()], [BLUE] * len(names), "% of the time")
    plot.update_xaxes(range=[0, 100])
    caption = "Share of the time that each stage spent inside its steps."
    return Plot(title="Stages busy", caption=caption, figure=plot)


def _processes(server: ServerView) -> Plot:
    names = [f"{process.role} {process.name}" for process in server.processes]
    colours = [_ROLES.get(process.role, GREY) for process in server.processes]
    plot = _bars(names, [process.cores for process in server.processes], colours, "CPU cores")
    return Plot(title="CPU by process", caption="CPU seconds per second over the window.", figure=plot)


def _bars(names: Sequence[str], values: Iterable[float], colours: list[str], unit: str) -> go.Figure:
    values = list(values)
    plot = figure(80 + 26 * len(names), xaxis=axis(unit), showlegend=False, bargap=0.3)
    plot.update_layout(margin={"t": 8}, yaxis={"automargin": True, "autorange": "reversed", "ticksuffix": " "})
    texts = {"text": [number(value) for value in values], "textposition": "auto", "cliponaxis": False}
    plot.add_bar(x=values, y=[*map(escaped, names)], orientation="h", marker={"color": colours}, **texts)
    return plot
