"""When requests come, before it is known what they ask: an arrival process as the command line names it."""

from __future__ import annotations

from dataclasses import dataclass

from tramontane.client.loadtest.load import arrivals
from tramontane.client.loadtest.load.asks import NOTHING_COUNTED, fitted_to, make_asks, texts_to_count
from tramontane.client.loadtest.load.counting import Counts
from tramontane.client.loadtest.load.trace import Recording, replay
from tramontane.client.loadtest.load.workload import Workload, notes
from tramontane.client.loadtest.plan import Load, Plan
from tramontane.client.loadtest.result import TargetInfo

CLOSED_ASKS = 2000
"""Different requests of a closed loop, whose number is not known beforehand; then they begin again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A load and its intended arrivals; none of a closed loop."""

    load: Load
    arrivals_s: tuple[float, ...] = ()

    def plan(self, workload: Workload, info: TargetInfo, counts: Counts = NOTHING_COUNTED) -> Plan:
        """The same arrivals with requests of this workload; `counts` are of the texts that `texts_to_count` names.

        Raises:
            ValueError: the workload does not fit the model, or the run has no arrivals.
        """
        count = len(self.arrivals_s) if self.load.is_open else CLOSED_ASKS
        if not count:
            raise ValueError(f"{self.load.kind} gives no arrival within {self.load.duration_s:g} s; let it last longer")
        seed, vocabulary, context = self.load.seed, info.vocabulary_tokens, info.context_tokens
        workload = fitted_to(workload, seed, vocabulary=vocabulary, context=context, counts=counts)
        asks = make_asks(workload, count, seed, vocabulary=vocabulary, context=context, counts=counts)
        return Plan(load=self.load, asks=asks, arrivals_s=self.arrivals_s, notes=notes(workload))

    def texts_to_count(self, workload: Workload, info: TargetInfo) -> list[str]:
        """What the server's tokenizer must count before the plan is made."""
        return texts_to_count(workload, self.load.seed, info.context_tokens)


def closed(users: int, duration_s: float, warmup_s: float, seed: int) -> Schedule:
    """Users who wait for their answers. Raises ValueError for none."""
    if not 1 <= users <= 100_000:
        raise ValueError(f"users is {users}; it must lie in 1 .. 100,000")
    return Schedule(load=_load("closed", duration_s, warmup_s, seed, users=users))


def at_rate(
    rate: float, duration_s: float, warmup_s: float, seed: int, *, process: str = "poisson", burstiness: float = 1.0
) -> Schedule:
    """A rate that does not change: `constant`, `poisson` or `gamma` gaps. Raises ValueError for what cannot be."""
    match process:
        case "constant":
            arrivals_s = arrivals.constant(rate, duration_s)
        case "poisson":
            arrivals_s = arrivals.poisson(rate, duration_s, seed)
        case _:
            arrivals_s = arrivals.gamma(rate, burstiness, duration_s, seed)
    load = _load(process, duration_s, warmup_s, seed, rate=rate, burstiness=burstiness if process == "gamma" else None)
    return Schedule(load=load, arrivals_s=arrivals_s)


def in_steps(levels: tuple[tuple[float, float], ...], warmup_s: float, seed: int) -> Schedule:
    """One rate after another, each for its seconds. Raises ValueError."""
    arrivals_s = arrivals.steps(levels, seed)
    duration_s = sum(seconds for _, seconds in levels)
    detail = ", ".join(f"{rate:g}/s for {seconds:g} s" for rate, seconds in levels)
    rate = sum(rate * seconds for rate, seconds in levels) / duration_s
    return Schedule(load=_load("steps", duration_s, warmup_s, seed, rate=rate, detail=detail), arrivals_s=arrivals_s)


def as_ramp(rates: tuple[float, float], duration_s: float, warmup_s: float, seed: int) -> Schedule:
    """A rate that grows or falls evenly. Raises ValueError."""
    arrivals_s = arrivals.ramp(*rates, duration_s, seed)
    detail = f"from {rates[0]:g}/s to {rates[1]:g}/s"
    load = _load("ramp", duration_s, warmup_s, seed, rate=sum(rates) / 2, detail=detail)
    return Schedule(load=load, arrivals_s=arrivals_s)


def replayed(
    recording: Recording,
    speed: float,
    warmup_s: float,
    seed: int,
    info: TargetInfo,
    characters: float,
    counts: Counts = NOTHING_COUNTED,
) -> Plan:
    """A trace's arrivals and requests. Raises ValueError."""
    trace = replay(
        recording,
        seed,
        vocabulary=info.vocabulary_tokens,
        context=info.context_tokens,
        speed=speed,
        characters_per_token=characters,
        counts=counts,
    )
    # Just after the last arrival, so that it lies in the window.
    duration_s = trace.arrivals_s[-1] + 0.001
    detail = f"{recording.name}, {speed:g} times as fast" if speed != 1 else recording.name
    if trace.start:
        detail += f"; its first arrival, at {trace.start}, is the run's start"
    load = _load("trace", duration_s, warmup_s, seed, rate=len(trace.asks) / duration_s, detail=detail)
    return Plan(load=load, asks=trace.asks, arrivals_s=trace.arrivals_s, notes=trace.notes)


def _load(kind: str, duration_s: float, warmup_s: float, seed: int, **words: object) -> Load:
    if not 0 <= warmup_s < duration_s:
        raise ValueError(f"warmup is {warmup_s:g} s; it must be less than the duration, {duration_s:g} s")
    return Load(kind=kind, duration_s=duration_s, warmup_s=warmup_s, seed=seed, **words)  # type: ignore[arg-type]
