"""The plots of a sweep: each figure against the offered rate, with the objective and the best rate that kept it."""

from __future__ import annotations

from collections.abc import Sequence

from tramontane.client.loadtest.report.charts import (
    COLOURS,
    DASHES,
    GREEN,
    MARKS,
    RED,
    Chart,
    Key,
    from_zero,
    logarithmic,
)
from tramontane.client.loadtest.report.plots import Plot
from tramontane.client.loadtest.report.wording import interval, number, offered, percentile
from tramontane.client.loadtest.result import Quantile, RunResult, SweepResult

HEIGHT = 260


def sweep_plots(sweep: SweepResult) -> list[Plot]:
    """Rate against TTFT, ITL, goodput and output tokens; those for which there are figures."""
    plots = [
        _latency(sweep, "ttft", (0.5, 0.95, 0.99), "Time to first token", in_decades=True),
        _latency(sweep, "itl", (0.5, 0.95), "Inter-token latency", in_decades=False),
        _goodput(sweep),
        _tokens(sweep),
    ]
    return [plot for plot in plots if any(chart.marks for chart in plot.charts)]


def _at(level: RunResult) -> float:
    """Where the level stands on the axis: its rate, or the users of a closed loop."""
    return (level.load.users or 0) if level.load.rate is None else level.load.rate


def _chart(sweep: SweepResult, unit: str, values: Sequence[float], *, in_decades: bool = False) -> Chart:
    users = any(level.load.rate is None for level in sweep.levels)
    x = from_zero("users" if users else "offered, requests/s", map(_at, sweep.levels))
    y = logarithmic(f"{unit}, logarithmic", values) if in_decades else from_zero(unit, values)
    chart = Chart(x=x, y=y, height=HEIGHT)
    if sweep.best_rate is not None:
        chart.upright(sweep.best_rate, GREEN, f"best rate {sweep.best_rate:.4g}")
    return chart


def _draw(
    chart: Chart, points: Sequence[tuple[RunResult, float, Quantile | None]], name: str, unit: str, style: int
) -> None:
    """One series, a mark per level."""
    if not points:
        return
    colour, dash, shape = COLOURS[style], DASHES[style], MARKS[style]
    chart.line([(_at(level), value) for level, value, _ in points], colour, dash)
    chart.keys.append(Key(name=name, colour=colour, dash=dash, shape=shape))
    for level, value, known in points:
        says = f"{offered(level.load)}: {name} {number(value)} {unit}"
        ends = None
        if known is not None and known.low is not None and known.high is not None:
            ends = (known.low, known.high)
            says += f" ({interval(*ends)})"
        chart.mark(_at(level), value, colour, shape, says, ends)


def _latency(sweep: SweepResult, measure: str, quantiles: Sequence[float], title: str, *, in_decades: bool) -> Plot:
    limits = [objective for objective in sweep.objectives if objective.measure == measure]
    series = [(q, _quantiles(sweep, measure, q)) for q in quantiles]
    values = [value for _, points in series for _, value, _ in points]
    chart = _chart(sweep, "ms", [*values, *(limit.limit_ms for limit in limits)], in_decades=in_decades)
    for style, (q, points) in enumerate(series):
        _draw(chart, points, percentile(q), "ms", style)
    for limit in limits:
        chart.line([(chart.x.low, limit.limit_ms), (chart.x.high, limit.limit_ms)], RED, "dash")
        chart.keys.append(Key(name=f"limit of {percentile(limit.q)}: {limit.limit_ms:g} ms", colour=RED, dash="dash"))
    caption = "Of completed requests, with 95 % confidence where there are enough of them."
    return Plot(title=title, caption=caption, charts=(chart,))


def _quantiles(sweep: SweepResult, measure: str, q: float) -> list[tuple[RunResult, float, Quantile | None]]:
    """The levels at which the quantile is known: by enough samples, or as the objective was judged."""
    points: list[tuple[RunResult, float, Quantile | None]] = []
    for level in sweep.levels:
        found = level.latencies.get(measure)
        known = found.quantile(q) if found else None
        judged = next(
            (kept.value_ms for kept in level.objectives if (kept.objective.measure, kept.objective.q) == (measure, q)),
            None,
        )
        value = judged if known is None else known.value
        if value is not None:
            points.append((level, value, known))
    return points


def _goodput(sweep: SweepResult) -> Plot:
    rates = [(level, level.throughput) for level in sweep.levels]
    good = [(level, each.goodput_per_s, None) for level, each in rates if each.goodput_per_s is not None]
    completed = [(level, each.requests_per_s, None) for level, each in rates]
    open_loop = all(level.load.rate is not None for level in sweep.levels)
    values = [*(value for _, value, _ in completed), *(map(_at, sweep.levels) if open_loop else ())]
    chart = _chart(sweep, "requests/s", values)
    if open_loop:
        chart.line([(0.0, 0.0), (max(map(_at, sweep.levels)),) * 2], RED, "dot")
        chart.keys.append(Key(name="offered", colour=RED, dash="dot"))
    _draw(chart, good, "goodput", "requests/s", 0)
    _draw(chart, completed, "completed", "requests/s", 1)
    caption = "Goodput: requests that met every objective. Below the line of what was offered, requests wait or fail."
    return Plot(title="Goodput", caption=caption, charts=(chart,))


def _tokens(sweep: SweepResult) -> Plot:
    points = [(level, level.throughput.output_tokens_per_s, None) for level in sweep.levels]
    chart = _chart(sweep, "tokens/s", [value for _, value, _ in points])
    _draw(chart, points, "output tokens/s", "tokens/s", 0)
    return Plot(title="Output", caption="Tokens are counted when they arrive.", charts=(chart,))
