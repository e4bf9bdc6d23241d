"""Comparing runs: alike ones are rarely called worse, a slower server is found, what cannot be compared is refused."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from results_from_records import result_of
from simulated_queue import open_load, queue

from tramontane.client.loadtest.cli import bench
from tramontane.client.loadtest.finding import Finding, Severity
from tramontane.client.loadtest.judging.compare import Verdict, compare, verdict
from tramontane.client.loadtest.judging.objectives import parse_objective
from tramontane.client.loadtest.judging.resampling import BLOCKS, RERUNS, blocks_of, draws, rerun_quantiles, rerun_sums
from tramontane.client.loadtest.report.json_report import to_json

LOAD = open_load(66.0, 6.0, rate=10.0)
RATE, SERVERS, USE = 10.0, 4, 0.5


def run(plan_seed, noise_seed, slowdown=1.0, load=LOAD, **changes):
    """A queue at half load. The plan says arrivals and lengths; noise makes each request a few per cent quicker or
    slower.
    """
    plan, noise = np.random.default_rng(plan_seed), np.random.default_rng(noise_seed)
    arrivals_s = np.sort(plan.uniform(0, load.duration_s, plan.poisson(RATE * load.duration_s)))
    services_s = plan.exponential(USE * SERVERS / RATE, len(arrivals_s)) * slowdown
    services_s *= np.exp(noise.normal(0, 0.05, len(arrivals_s)))
    records = queue(arrivals_s, services_s, SERVERS, tokens=8)
    return result_of(records, replace(load, seed=plan_seed), objectives=[parse_objective("e2el:p95<1s")], **changes)


run_once = functools.cache(run)


def share_called_worse(slowdown, *, one_plan, pairs=20):
    found = [
        compare(
            run_once(pair, 2 * pair + 1), run_once(pair if one_plan else pair + 1000, 2 * pair + 2, slowdown)
        ).exit_status
        for pair in range(pairs)
    ]
    return sum(found) / pairs


@pytest.mark.parametrize("one_plan", [True, False])
def test_a_server_like_the_other_is_rarely_called_worse(one_plan):
    assert share_called_worse(1.0, one_plan=one_plan) <= 0.07


def test_a_server_20_per_cent_slower_is_found_with_one_plan():
    assert share_called_worse(1.2, one_plan=True) >= 0.9


def test_a_faster_server_is_better():
    found = {change.name: change for change in compare(run(1, 2), run(1, 3, 0.7)).changes}
    assert found["ttft p50 ms"].verdict is found["itl p50 ms"].verdict is Verdict.BETTER
    assert found["itl p50 ms"].ratio == pytest.approx(0.7, rel=0.05)
    assert found["itl p50 ms"].low < 0.7 < found["itl p50 ms"].high
    assert found["output tokens/s"].verdict is Verdict.SAME, "it was asked for no more"
    assert compare(run(1, 2), run(1, 3, 0.7)).exit_status == 0


def test_the_command_exits_1_where_b_is_worse(tmp_path):
    for name, slowdown in {"a": 1.0, "like_a": 1.0, "slower": 1.3}.items():
        (tmp_path / name).write_bytes(to_json(run(1, 2 + len(name), slowdown)))

    def compared(name):
        return CliRunner().invoke(bench, ["compare", str(tmp_path / "a"), str(tmp_path / name)])

    assert compared("like_a").exit_code == 0
    assert compared("slower").exit_code == 1
    assert "B is worse: ttft p50 ms" in compared("slower").output


def test_a_run_is_the_same_as_itself():
    found = compare(run(1, 2), run(1, 2))
    assert {(change.ratio, change.low, change.high, change.verdict) for change in found.changes} == {
        (1, 1, 1, Verdict.SAME)
    }
    assert found.warnings == ()
    assert [change.name for change in found.changes] == [
        *("ttft p50 ms", "ttft p95 ms", "itl p50 ms", "itl p95 ms", "itl p99 ms"),
        *("tpot p50 ms", "tpot p95 ms", "e2el p50 ms", "e2el p95 ms", "output tokens/s", "goodput/s"),
    ]


def test_goodput_that_went_down_to_nothing_is_worse():
    base = run(1, 2)
    none = replace(base, samples=replace(base.samples, met=(False,) * len(base.samples.met)))
    assert [(each.name, each.low, each.high) for each in compare(base, none).changes if each.verdict == "worse"] == [
        ("goodput/s", 0, 0)
    ]


def test_a_figure_that_one_run_lacks_is_told():
    base = run(1, 2)
    few = replace(base, samples=replace(base.samples, tpots_ms=(None,) * len(base.samples.tpots_ms)))
    assert compare(base, few).warnings == (
        "tpot p50 ms is not compared: B has too few samples",
        "tpot p95 ms is not compared: B has too few samples",
    )


def test_a_comparison_can_be_repeated():
    assert compare(run(1, 2), run(3, 4), seed=5) == compare(run(1, 2), run(3, 4), seed=5)


@pytest.mark.parametrize(
    ("interval", "less_is_better", "wanted"),
    [
        ((1.06, 1.2), True, "worse"),
        ((1.06, 1.2), False, "better"),
        ((0.5, 0.94), True, "better"),
        ((0.5, 0.94), False, "worse"),
        ((0.96, 1.04), True, "same"),
        ((1.01, 1.2), True, "unclear"),
        ((0.5, 1.5), False, "unclear"),
        ((None, None), True, "unclear"),
    ],
)
def test_verdicts(interval, less_is_better, wanted):
    assert verdict(*interval, 0.05, less_is_better=less_is_better) == wanted


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (run(1, 2, load=replace(LOAD, rate=20.0)), "rate is 10.0 in A and 20.0 in B"),
        (run(1, 2, load=replace(LOAD, kind="gamma")), "load is poisson in A and gamma in B"),
        (run(1, 2, workload="chat"), "workload is 16 tokens in A and chat in B"),
        (run(1, 2, findings=[Finding(severity=Severity.INVALID, text="late")]), "B is invalid, late"),
        (run(1, 2, load=open_load(4.0, rate=10.0)), "window is below 5 s"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, told):
    with pytest.raises(ValueError, match=told):
        compare(run(1, 2), other)


@pytest.mark.parametrize("threshold", [0, 1, -0.1])
def test_the_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match="between 0 and 1"):
        compare(run(1, 2), run(1, 2), threshold=threshold)


def test_what_else_differs_is_told():
    wrong = [Finding(severity=Severity.WRONG, text="")]
    other = run(2, 2, load=replace(LOAD, duration_s=60.0), stationary=False, findings=wrong)
    told = " | ".join(compare(run(1, 2), other).warnings)
    for part in ("seed differs: 1 in A, 2 in B", "window differs", "B never became stationary", "B gave wrong answers"):
        assert part in told


def test_blocks_cut_the_window_evenly():
    assert list(blocks_of([0.0, 1.9, 5.0, 47.9, 48.0], (0.0, 48.0))) == [0, 0, 2, 23, 23]


def test_the_rerun_that_takes_each_block_once_is_the_run_itself():
    random = np.random.default_rng(0)
    samples, once = random.exponential(1, 4000), np.ones((1, BLOCKS), dtype=np.int64)
    blocks = random.integers(0, BLOCKS, 4000)
    wanted = np.quantile(samples, (0.5, 0.95, 0.99), method="inverted_cdf")
    assert list(rerun_quantiles(samples, blocks, (0.5, 0.95, 0.99), once)[0]) == list(wanted)
    assert rerun_sums(samples, blocks, once) == pytest.approx([samples.sum()])


def test_a_rerun_is_the_quantile_of_the_blocks_it_takes():
    random = np.random.default_rng(1)
    samples, taken = random.exponential(1, 2000), draws(random)
    blocks = random.integers(0, BLOCKS, 2000)
    found = rerun_quantiles(samples, blocks, (0.5, 0.95), taken)
    assert found.shape == (RERUNS, 2)
    for row, times in zip(found[:20], taken, strict=False):
        drawn = np.repeat(samples, times[blocks])
        assert list(row) == list(np.quantile(drawn, (0.5, 0.95), method="inverted_cdf"))


def test_many_samples_are_told_apart_finely_enough():
    random = np.random.default_rng(2)
    samples, once = random.exponential(1, 100_000), np.ones((1, BLOCKS), dtype=np.int64)
    found = rerun_quantiles(samples, random.integers(0, BLOCKS, 100_000), (0.5, 0.99), once)[0]
    assert found == pytest.approx(np.quantile(samples, (0.5, 0.99)), rel=0.01)
