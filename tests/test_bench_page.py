"""The page of a load test: it loads nothing, runs nothing of others, says what it measures, and a browser draws it."""

from __future__ import annotations

import contextlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from sample_results import HOSTILE, poor_run, run

from tramontane.client.loadtest.report.page import render_page
from tramontane.client.loadtest.report.plots import MAX_POINTS, curve, thinned
from tramontane.client.loadtest.result import MEASURES, Finding, Second, Severity


class Loads(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.scripts, self.tags = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]
        if tag == "script":
            self.scripts.append(dict(attributes).get("type", "text/javascript"))


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


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts(one, many):
    for page in (render_page([one]), render_page(many.levels, many), hostile_page()):
        found = Loads(page)
        assert not found.addresses
        assert found.scripts == ["application/json", "text/javascript", "text/javascript"]
        assert not {"img", "link", "iframe", "object", "embed"} & set(found.tags)
        assert "default-src 'none'" in page


def test_the_page_shows_hostile_text_as_text():
    page = hostile_page()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<img" not in page.partition("<script>")[0]
    figures = json.loads(page.partition('id="figures">')[2].partition("</script>")[0])
    assert "<img" not in json.dumps(figures), "plotly would read it as HTML"


def test_the_page_defines_every_measure(one):
    page = render_page([one])
    for name, meaning in MEASURES.items():
        assert f"<dt>{name}</dt><dd>{html.escape(meaning, quote=False)}</dd>" in page.replace("&#39;", "'")


def test_the_page_of_a_run_without_figures():
    page = render_page([poor_run()])
    assert "data-figure" not in page.partition("<script")[0]
    assert "nan" not in page.partition("<script")[0].lower()


def test_every_figures_axes_name_their_units(one, many):
    for result in (render_page([one]), render_page(many.levels, many)):
        figures = json.loads(result.partition('id="figures">')[2].partition("</script>")[0])
        for figure in figures:
            axes = [value for name, value in figure["layout"].items() if re.match("[xy]axis", name)]
            assert all(
                axis.get("title", {}).get("text")
                for axis in axes
                if axis.get("visible", True) and axis.get("showticklabels", True) and "ticksuffix" not in axis
            )


def test_a_curve_of_many_samples_is_thinned_but_keeps_its_tail():
    x, y = curve(range(1_000_000))
    assert len(x) <= MAX_POINTS
    assert x[-100:].tolist() == list(range(999_900, 1_000_000))
    assert (x[0], y[-1]) == (0, 100)


def test_a_long_timeline_is_thinned_without_losing_requests():
    second = Second(at_s=0, arrived=2, ended=2, failed=1, open=3, output_tokens=40, ttft_ms=5.0)
    step, thin = thinned([replace(second, at_s=at, open=at) for at in range(4000)])
    assert step == 3
    assert len(thin) <= MAX_POINTS
    assert sum(each.failed for each in thin) == 4000
    assert (thin[0].open, thin[-1].at_s) == (2, 3999)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed")
def test_a_browser_draws_the_plots_and_has_nothing_to_complain_of(tmp_path, many):
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
    assert done.stdout.count("data-drawn") == 4, "the four plots of a sweep; those of its levels are folded away"
    assert "CONSOLE" not in done.stderr
