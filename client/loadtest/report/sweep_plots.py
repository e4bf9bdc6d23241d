"""The plots of a sweep: each figure against the offered rate, with the objective and the best rate that kept it."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tramontane.client.loadtest.report.plots import BLUE, COLOURS, DASHES, GREEN, ORANGE, RED, Plot, axis, figure
from tramontane.client.loadtest.report.wording import percentile
from tramontane.client.loadtest.result import RunResult, SweepResult

_MARKS = ("circle", "square", "diamond", "triangle-up")


def sweep_plots(sweep: SweepResult) -> list[Plot]:
    """Rate against TTFT, ITL, goodput and output tokens."""
    return [
        _latency(sweep, "ttft", (0.5, 0.95, 0.99), "Time to first token", logarithmic=True),
        _latency(sweep, "itl", (0.5, 0.95), "Inter-token latency", logarithmic=False),
        _goodput(sweep),
        _tokens(sweep),
    ]


def _at(level: RunResult) -> float | None:
    """Where the level stands on the axis: its rate, or the users of a closed loop."""
    return level.load.users if level.load.rate is None else level.load.rate


def _plot(sweep: SweepResult, unit: str, logarithmic: bool = False) -> go.Figure:
    users = any(level.load.rate is None for level in sweep.levels)
    scale = {"type": "log", "dtick": "D2"} if logarithmic else {"rangemode": "tozero"}
    bottom = axis("users" if users else "offered, requests/s", rangemode="tozero")
    plot = figure(380, xaxis=bottom, yaxis=axis(unit + (", logarithmic" if logarithmic else ""), **scale))
    if sweep.best_rate is not None:
        best = sweep.best_rate
        line = {"type": "line", "x0": best, "x1": best, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
        plot.add_shape(line | {"line": {"color": GREEN, "width": 1.5, "dash": "dash"}, "layer": "below"})
        place = {"x": best, "y": 0, "xref": "x", "yref": "paper", "xanchor": "right", "yanchor": "bottom"}
        plot.add_annotation(place | {"text": f"best rate {best:.4g} ", "showarrow": False, "font": {"size": 11}})
    return plot


def _latency(sweep: SweepResult, measure: str, quantiles: Sequence[float], title: str, *, logarithmic: bool) -> Plot:
    plot = _plot(sweep, "ms", logarithmic)
    for q, colour, dash, mark in zip(quantiles, COLOURS, DASHES, _MARKS, strict=False):
        measured = [(level, level.latencies.get(measure)) for level in sweep.levels]
        points = [(level, known) for level, found in measured if found and (known := found.quantile(q)) is not None]
        quantiles_known = [known for _, known in points]
        plot.add_scatter(
            x=[_at(level) for level, _ in points],
            y=[each.value for each in quantiles_known],
            error_y={
                "array": [0.0 if each.high is None else each.high - each.value for each in quantiles_known],
                "arrayminus": [0.0 if each.low is None else each.value - each.low for each in quantiles_known],
                "thickness": 1,
                "width": 3,
            },
            name=percentile(q),
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            marker={"symbol": mark, "size": 8},
        )
    for objective in sweep.objectives:
        if objective.measure == measure:
            ends = [_at(level) for level in (sweep.levels[0], sweep.levels[-1])]
            line = {"color": RED, "width": 1.5, "dash": "longdash"}
            name = f"limit of {percentile(objective.q)}: {objective.limit_ms:g} ms"
            plot.add_scatter(x=ends, y=[objective.limit_ms] * 2, name=name, mode="lines", line=line)
    caption = "Of completed requests, with 95 % confidence. A quantile with too few samples is left out."
    return Plot(title=title, caption=caption, figure=plot)


def _goodput(sweep: SweepResult) -> Plot:
    plot = _plot(sweep, "requests/s")
    x = [_at(level) for level in sweep.levels]
    if all(level.load.rate is not None for level in sweep.levels):
        line = {"color": RED, "width": 1, "dash": "longdash"}
        plot.add_scatter(x=x, y=x, name="offered", mode="lines", line=line)
    rates = [level.throughput for level in sweep.levels]
    series: list[tuple[str, list[float | None], str, int]] = [
        ("completed", [each.requests_per_s for each in rates], ORANGE, 1),
        ("goodput", [each.goodput_per_s for each in rates], BLUE, 0),
    ]
    for name, y, colour, style in series:
        if all(value is None for value in y):
            continue
        look = {"line": {"color": colour, "dash": DASHES[style]}, "marker": {"symbol": _MARKS[style], "size": 8}}
        plot.add_scatter(x=x, y=y, name=name, mode="lines+markers", **look)
    caption = "Goodput: requests that met every objective. Below the line of what was offered, requests wait or fail."
    return Plot(title="Goodput", caption=caption, figure=plot)


def _tokens(sweep: SweepResult) -> Plot:
    plot = _plot(sweep, "tokens/s")
    y = [level.throughput.output_tokens_per_s for level in sweep.levels]
    look = {"line": {"color": BLUE}, "marker": {"size": 8}}
    plot.add_scatter(x=[*map(_at, sweep.levels)], y=y, name="output tokens/s", mode="lines+markers", **look)
    return Plot(title="Output", caption="Tokens are counted when they arrive.", figure=plot)
