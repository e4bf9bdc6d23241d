"""The page of a load test: it loads nothing, runs nothing of others, says what it measures, and a browser draws it."""

from __future__ import annotations

import contextlib
import html
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from sample_results import HOSTILE, poor_run, run

from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.report.charts import Axis
from tramontane.client.loadtest.report.page import render_page
from tramontane.client.loadtest.report.plots import MAX_POINTS, MAX_STEPS, curve, run_plots, thinned
from tramontane.client.loadtest.report.sweep_plots import sweep_plots
from tramontane.client.loadtest.result import MEASURES, Second


class Loads(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]


def hostile_page():
    whole = run(fault=True)
    server = replace(
        whole.server,
        stage_busy={HOSTILE: 0.5},
        processes=(replace(whole.server.processes[0], name=HOSTILE, role=HOSTILE),),
    )
    return render_page(
        [
            replace(
                whole,
                target=replace(whole.target, model=HOSTILE),
                findings=(Finding(severity=Severity.WRONG, text=HOSTILE),),
                faults=tuple(replace(fault, fault=HOSTILE, target=HOSTILE, error=HOSTILE) for fault in whole.faults),
                checks=replace(whole.checks, examples=(HOSTILE,)),
                server=server,
            )
        ]
    )


def test_the_page_fetches_nothing_and_runs_nothing(one, many):
    for page in (render_page([one]), render_page(many.levels, many), hostile_page()):
        found = Loads(page)
        assert not found.addresses
        assert not {"script", "img", "link", "iframe", "object", "embed"} & set(found.tags)
        assert """content="default-src 'none'; style-src 'unsafe-inline'\"""" in page
        assert "url(" not in page


def test_the_page_shows_hostile_text_as_text():
    page = hostile_page()
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6  # model, finding, fault, its label, check, stage, process


def test_a_page_is_small(one, many):
    """A soak of eight hours, and a sweep of ten levels."""
    second = one.timeline[0]
    soak = replace(one, timeline=tuple(replace(second, at_s=at, open=at % 97) for at in range(8 * 3600)))
    assert len(render_page([soak])) < 500_000
    ten = replace(many, levels=(*many.levels, *many.levels, *many.levels, one))
    assert len(render_page(ten.levels, ten)) < 1_500_000


def test_the_page_defines_every_measure(one):
    page = render_page([one])
    for name, meaning in MEASURES.items():
        assert f"<dt>{name}</dt><dd>{html.escape(meaning, quote=False)}</dd>" in page.replace("&#39;", "'")


def test_the_page_of_a_run_without_figures():
    page = render_page([poor_run()])
    assert "<figure" not in page
    assert "nan" not in page.lower()


def test_every_charts_axes_name_their_units(one, many):
    plots = [*run_plots(one), *sweep_plots(many)]
    charts = [chart for plot in plots for chart in plot.charts]
    assert len(charts) == 9
    assert all(chart.y.title and chart.y_ticks for chart in charts)
    assert all(chart.x.title and len(chart.x.ticks()) > 2 for chart in charts if chart.with_x)


def test_nothing_lies_outside_its_plane(one, many):
    """So that nothing is cut off at an edge, and every mark is inside by its own size."""
    for plot in [*run_plots(one), *sweep_plots(many)]:
        for chart in plot.charts:
            numbers = [float(each) for curve in chart.curves for each in re.findall(r"[\d.]+", curve.path)]
            assert all(0 <= each <= 1000 for each in numbers)
            assert all(0 < mark.left < 99 and 0 < mark.top < 99 for mark in chart.marks)
            assert all(0 <= each.left <= each.left + each.width <= 100.01 for each in [*chart.bands, *chart.columns])


def test_a_timeline_shows_failures_where_there_were_some(one):
    def rows(result):
        (plot,) = (plot for plot in run_plots(result) if plot.title == "Timeline")
        return [chart.y.title for chart in plot.charts], plot.caption

    names, caption = rows(one)
    assert names == ["open requests", "output tokens/s", "median TTFT, ms", "failed requests/s"]
    assert "All the time 0" not in caption
    names, caption = rows(run())
    assert names == ["open requests", "output tokens/s", "median TTFT, ms"]
    assert caption.endswith("All the time 0: failed requests/s.")


def test_faults_are_named_above_the_plane(one):
    (plot,) = (plot for plot in run_plots(one) if plot.title == "Timeline")
    assert [[line.says for line in chart.lines] for chart in plot.charts] == [["kill:stage=0.1@70s"], [""], [""], [""]]
    page = render_page([one])
    assert page.index("kill:stage=0.1@70s</span></p>") < page.index('<svg class="plane" height="110"')


def test_a_sweep_too_short_for_quantiles_shows_how_its_objectives_were_judged(many):
    few = tuple(
        replace(level, latencies={"ttft": replace(level.latencies["ttft"], quantiles=())}) for level in many.levels
    )
    plots = {plot.title: plot for plot in sweep_plots(replace(many, levels=few))}
    assert plots.keys() == {"Time to first token", "Inter-token latency", "Goodput", "Output"}
    assert [key.name for key in plots["Time to first token"].charts[0].keys] == ["p95", "limit of p95: 1000 ms"]
    nothing = tuple(replace(level, objectives=()) for level in few)
    assert [plot.title for plot in sweep_plots(replace(many, levels=nothing))] == ["Goodput", "Output"]


def test_the_first_tiles_show_what_the_objectives_table_shows(one):
    """Too few samples for a p95 with its interval, yet the objective was judged by one."""
    few = replace(one, latencies={name: replace(each, quantiles=()) for name, each in one.latencies.items()})
    tiles = re.findall(r"<dt>(TTFT p95|ITL p95|E2E p95)</dt>\s*<dd><b>(.*?)</b>", render_page([few]))
    value = {kept.objective.measure: f"{kept.value_ms:.3g}" for kept in one.objectives}
    assert tiles == [("TTFT p95", value["ttft"]), ("ITL p95", value["itl"]), ("E2E p95", "-")]
    some = replace(
        one, latencies={"e2el": replace(one.latencies["e2el"], quantiles=one.latencies["e2el"].quantiles[:2])}
    )
    assert "<dt>E2E p75</dt>" in render_page([some])


def test_a_curve_of_many_samples_is_thinned_but_keeps_its_tail():
    x, y = curve(range(1_000_000))
    assert len(x) <= MAX_POINTS
    assert x[-100:].tolist() == list(range(999_900, 1_000_000))
    assert (x[0], y[-1]) == (0, 100)


def test_a_long_timeline_is_thinned_without_losing_requests():
    second = Second(at_s=0, arrived=2, ended=2, failed=1, open=3, output_tokens=40, ttft_ms=5.0)
    step, thin = thinned([replace(second, at_s=at, open=at) for at in range(4000)])
    assert step == 7
    assert len(thin) <= MAX_STEPS
    assert sum(each.failed for each in thin) == 4000
    assert (thin[0].open, thin[-1].at_s) == (6, 3997)


@pytest.mark.parametrize("lows_and_highs", [(0.0, 1e-9), (0.0, 3.7), (0.0, 999.0), (1e-3, 2e-3), (0.4, 1e7)])
@pytest.mark.parametrize("in_decades", [False, True])
def test_ticks_lie_on_their_axis_and_are_some_but_not_many(lows_and_highs, in_decades):
    low, high = lows_and_highs
    axis = Axis(title="x", low=low or high / 50 * in_decades, high=high, logarithmic=in_decades)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10
    assert all(0 <= at <= 100 and label for at, label in ticks)
    assert ticks == sorted(ticks)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_draws_the_page_and_has_nothing_to_complain_of(tmp_path, many):
    path = tmp_path / "page.html"
    path.write_text(render_page(many.levels, many), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,3000"]
    command += [
        "--enable-logging=stderr",
        "--virtual-time-budget=8000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.as_uri(),
    ]
    with contextlib.chdir(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('<svg class="plane"') == 4 + 3 * 4, (
        "a sweep's four, and a distribution and three rows a level"
    )
    assert "CONSOLE" not in done.stderr
