"""Is run B better or worse than run A, or can one not tell?

For each figure the ratio B / A gets a confidence interval, from resampled blocks of time (`resampling.py`), and a
verdict by where the interval lies against a threshold that matters, 5 % unless told:

    TTFT p50: 80.0 -> 96.1 ms, ratio 1.20 in [1.12, 1.29]   worse: wholly above 1.05
    ITL p50:  20.0 -> 20.1 ms, ratio 1.00 in [0.99, 1.02]   same: wholly within [0.95, 1.05]
    TTFT p99: 310 -> 365 ms, ratio 1.18 in [0.88, 1.57]     unclear: longer or repeated runs would tell

Runs of one plan (same load, seed and window) got the same requests at the same times. Then both are resampled by the
same blocks, so that what the plan did to both cancels, and much smaller changes are told.

Many figures are many chances to be wrong. So that all intervals hold together in 95 of 100 comparisons, each is made at
1 - 5 % / figures (Bonferroni). Found with simulated queues, exponential service, a minute at 10 requests a second: a
server like the other called worse in 1 or 2 of 100 comparisons at half load, in up to 10 where queues or the machine's
moods outlast the blocks; a server 20 % slower in 43 of 100 with plans of different seeds, in 96 with one plan. No
statistics on one run each can rule out that the machine was slower during one of them: repeat what matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import special

from tramontane.client.loadtest.finding import Severity
from tramontane.client.loadtest.judging.quantiles import LEAST_BEYOND, Floats, beyond, quantile
from tramontane.client.loadtest.judging.resampling import BLOCKS, Draws, blocks_of, draws, rerun_quantiles, rerun_sums
from tramontane.client.loadtest.result import CONFIDENCE, RunResult

LEAST_WINDOW_S = 5.0
"""A window below has blocks shorter than a request."""
LATENCY_QUANTILES = (0.5, 0.95, 0.99)


class Verdict(StrEnum):
    """What a figure's interval says."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "same"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure in both runs."""

    name: str
    """Such as `ttft p95 ms` or `output tokens/s`."""
    a: float
    b: float
    ratio: float
    """b / a."""
    low: float | None
    high: float | None
    """Its interval; all intervals of a comparison hold together with 95 % confidence. None where it is not known."""
    less_is_better: bool
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs side by side."""

    changes: tuple[Change, ...]
    threshold: float
    warnings: tuple[str, ...]
    """Sentences on what else differs."""

    @property
    def exit_status(self) -> int:
        """1 where any figure is worse, for CI; else 0."""
        return int(any(change.verdict is Verdict.WORSE for change in self.changes))


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of one run, and what it was in each imitated rerun."""

    value: float
    reruns: Floats


def compare(a: RunResult, b: RunResult, *, threshold: float = 0.05, seed: int = 0) -> Comparison:
    """Compare two runs of one load and one workload.

    Raises:
        ValueError: they cannot be compared, because they were asked different things, or one has no valid figures.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"the threshold lies between 0 and 1; not {threshold}")
    _must_be_comparable(a, b)
    random = np.random.default_rng(seed)
    taken_of_a = draws(random)
    one_plan = a.load.is_open and (a.load, a.window_s) == (b.load, b.window_s)
    of_a, of_b = _figures(a, taken_of_a), _figures(b, taken_of_a if one_plan else draws(random))
    names = [name for name in of_a if name in of_b and of_a[name].value > 0]
    level = 1 - (1 - CONFIDENCE) / max(1, len(names))
    return Comparison(
        changes=tuple(_change(name, of_a[name], of_b[name], level, threshold) for name in names),
        threshold=threshold,
        warnings=(*_warnings(a, b), *_one_sided(of_a, of_b)),
    )


def verdict(low: float | None, high: float | None, threshold: float, *, less_is_better: bool) -> Verdict:
    """Where the interval of a ratio lies against 1 - threshold and 1 + threshold.

    >>> [str(verdict(*interval, 0.05, less_is_better=True)) for interval in ((1.1, 1.3), (0.97, 1.04), (0.9, 1.3))]
    ['worse', 'same', 'unclear']
    """
    if low is None or high is None:
        return Verdict.UNCLEAR
    if low > 1 + threshold:
        return Verdict.WORSE if less_is_better else Verdict.BETTER
    if high < 1 - threshold:
        return Verdict.BETTER if less_is_better else Verdict.WORSE
    return Verdict.SAME if low >= 1 - threshold and high <= 1 + threshold else Verdict.UNCLEAR


def _change(name: str, a: _Figure, b: _Figure, level: float, threshold: float) -> Change:
    ratio = b.value / a.value
    low, high = _interval(ratio, a.reruns, b.reruns, level)
    less_is_better = name.endswith(" ms")
    return Change(
        name=name,
        a=a.value,
        b=b.value,
        ratio=ratio,
        low=low,
        high=high,
        less_is_better=less_is_better,
        verdict=verdict(low, high, threshold, less_is_better=less_is_better),
    )


def _interval(ratio: float, of_a: Floats, of_b: Floats, level: float) -> tuple[float | None, float | None]:
    """That of a difference of logarithms, by Student's t with the blocks' degrees of freedom.

    0 has no logarithm. A figure that is 0 in all of B, such as goodput, went down to nothing: there the interval is 0
    itself. Where it is 0 in some reruns only, nothing is known.
    """
    if not of_b.any():
        return 0.0, 0.0
    if not ((of_a > 0).all() and (of_b > 0).all()):
        return None, None
    error = float(np.log(of_b / of_a).std(ddof=1))
    factor = math.exp(special.stdtrit(BLOCKS - 1, (1 + level) / 2) * error)
    return ratio / factor, ratio * factor


def _figures(run: RunResult, taken: Draws) -> dict[str, _Figure]:
    """All figures of a run that have enough samples."""
    samples, window_s = run.samples, run.window_s
    blocks = blocks_of(samples.arrived_s, window_s)
    several = np.array([value is not None for value in samples.tpots_ms], dtype=np.bool_)
    tpots = [value for value in samples.tpots_ms if value is not None]
    gaps = [gap for gaps in samples.itls_ms for gap in gaps]
    gap_blocks = np.repeat(blocks, [len(each) for each in samples.itls_ms])
    found = _quantiles("ttft", samples.ttfts_ms, blocks, taken)
    found |= _quantiles("itl", gaps, gap_blocks, taken)
    found |= _quantiles("tpot", tpots, blocks[several], taken)
    found |= _quantiles("e2el", samples.e2els_ms, blocks, taken)
    whole = [each for each in run.timeline if window_s[0] <= each.at_s and each.at_s + 1 <= window_s[1]]
    if whole:
        middles_s = [each.at_s + 0.5 for each in whole]
        output = [each.output_tokens for each in whole]
        found["output tokens/s"] = _rate(output, [1.0] * len(whole), blocks_of(middles_s, window_s), taken)
    if run.throughput.goodput_per_s is not None:
        found["goodput/s"] = _goodput(samples.met, blocks, window_s[1] - window_s[0], taken)
    return found


def _quantiles(measure: str, values: Sequence[float], blocks: np.ndarray, taken: Draws) -> dict[str, _Figure]:
    qs = [q for q in LATENCY_QUANTILES if values and beyond(len(values), q) >= LEAST_BEYOND]
    if not qs:
        return {}
    reruns = rerun_quantiles(values, blocks, qs, taken)
    return {
        f"{measure} p{q * 100:g} ms": _Figure(quantile(values, q), column)
        for q, column in zip(qs, reruns.T, strict=True)
    }


def _rate(amounts: Sequence[float], durations_s: Sequence[float], blocks: np.ndarray, taken: Draws) -> _Figure:
    """Of 60 whole seconds some of 24 blocks hold three and some two, so each rerun has its own duration."""
    reruns_s = rerun_sums(durations_s, blocks, taken)
    return _Figure(sum(amounts) / sum(durations_s), rerun_sums(amounts, blocks, taken) / np.maximum(reruns_s, 1e-9))


def _goodput(met: Sequence[bool], blocks: np.ndarray, seconds: float, taken: Draws) -> _Figure:
    """Of the requests that arrived in the window; blocks are equally long."""
    return _Figure(sum(met) / seconds, rerun_sums([float(each) for each in met], blocks, taken))


def _must_be_comparable(a: RunResult, b: RunResult) -> None:
    asked = {
        "load": (a.load.kind, b.load.kind),
        "rate": (a.load.rate, b.load.rate),
        "burstiness": (a.load.burstiness, b.load.burstiness),
        "users": (a.load.users, b.load.users),
        "load's detail": (a.load.detail, b.load.detail),
        "workload": (a.workload, b.workload),
    }
    for what, (of_a, of_b) in asked.items():
        if of_a != of_b:
            hint = "; `--words` gives both kinds of servers the same" if what == "workload" else ""
            raise ValueError(f"the runs cannot be compared: {what} is {of_a} in A and {of_b} in B{hint}")
    for name, run in (("A", a), ("B", b)):
        invalid = next((each.text for each in run.findings if each.severity is Severity.INVALID), None)
        if invalid is not None:
            raise ValueError(f"the runs cannot be compared: {name} is invalid, {invalid}")
        if run.window_s[1] - run.window_s[0] < LEAST_WINDOW_S:
            raise ValueError(f"the runs cannot be compared: {name}'s window is below {LEAST_WINDOW_S:g} s")


def _one_sided(of_a: Iterable[str], of_b: Iterable[str]) -> Iterable[str]:
    """Figures for which one run has too few samples."""
    few = {name: "B" for name in of_a if name not in of_b} | {name: "A" for name in of_b if name not in of_a}
    for name, run in few.items():
        yield f"{name} is not compared: {run} has too few samples"


def _warnings(a: RunResult, b: RunResult) -> Iterable[str]:
    """What else differs, or makes a verdict doubtful."""
    others = {
        "seed": (a.load.seed, b.load.seed),
        "measured window": (a.window_s, b.window_s),
        "model": (a.target.model, b.target.model),
        "target's kind": (a.target.kind, b.target.kind),
        "dtype": (a.target.dtype, b.target.dtype),
        "machine": (a.machine, b.machine),
        "number of workers": (a.workers, b.workers),
    }
    for what, (of_a, of_b) in others.items():
        if of_a != of_b:
            yield f"the {what} differs: {of_a} in A, {of_b} in B"
    for name, run in (("A", a), ("B", b)):
        missed = run.counts.failed + run.counts.cut
        if missed:
            yield f"{missed} of {run.counts.sent} requests of {name} failed or were cut; no latency speaks of them"
        if run.stationary is False:
            yield f"{name} never became stationary"
        if any(each.severity is Severity.WRONG for each in run.findings):
            yield f"{name} gave wrong answers"
