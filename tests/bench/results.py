"""From rounds of turns to figures: medians, ratios and shares of a limit. Pure.

A round is one turn of every contestant, with the ceilings measured before and after it. A figure's share of its limit
and its ratio to ours are taken round by round, against what the machine did in that round, and then the median of them:
neighbours' load moves both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.contestants import Turn
from bench.limits import Ceilings, Floor, floor
from bench.pipeline_tax import Replay, SplitBound, best_split
from bench.workloads import Workload
from tramontane.stages.config import ModelConfig

OURS = "ours"


@dataclass
class Round:
    """One turn of every contestant."""

    before: Ceilings
    after: Ceilings
    turns: dict[str, Turn]
    """By the contestant's name; one that failed is missing."""
    replay: Replay | None = None
    others_busy_cpus: float = 0.0
    """CPUs that other people's processes kept busy, mean of both ends; what they take is missing in all figures."""

    @property
    def ceilings(self) -> Ceilings:
        """The mean of both ends."""
        return self.before.mean(self.after)


@dataclass(frozen=True)
class Figure:
    """What one contestant did on one workload."""

    workload: str
    contestant: str
    tokens_per_s: tuple[float, ...]
    """One a round."""
    of_limit: float
    """Median share of the limit."""
    of_ours: float | None
    """Median ratio to ours in process; None where that did not run."""
    same_first: float | None
    """Share of requests whose first token is also ours: whether it is the same model."""

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.tokens_per_s)


@dataclass(frozen=True)
class Pipeline:
    """Two stages through everything against their own steps with nothing between; medians over the rounds."""

    split: tuple[int, ...]
    stage_s: tuple[float, ...]
    """Each stage's steps back to back."""
    wall_s: float
    """Of the whole path."""
    of_floor: float
    """Its rate, as a share of the slower stage's own."""
    busy: tuple[float, ...]
    """Each stage's busy share in the middle of the run."""
    bound: SplitBound

    @property
    def of_bound(self) -> float:
        """Busy share, as a part of what the best split in whole layers allows."""
        return statistics.fmean(self.busy) / self.bound.mean


@dataclass(frozen=True)
class Results:
    """All that was measured of one model, and what it is held against."""

    config: ModelConfig
    number: str
    """What weights are made of: float32, bfloat16 or int8."""
    workloads: tuple[Workload, ...]
    rounds: Sequence[Round]
    experts: Mapping[str, float] = field(default_factory=dict)
    """Experts a layer that each workload's decode steps were counted to touch."""

    def floor(self, workload: Workload, ceilings: Ceilings) -> Floor:
        """The least time that it can take on a machine with these ceilings."""
        experts = self.experts.get(workload.name)
        return floor(self.config, workload.lengths, workload.new_tokens, ceilings, self.number, experts)

    def limit(self, workload: Workload, ceilings: Ceilings) -> float:
        """Tokens a second at most."""
        return self.floor(workload, ceilings).tokens_per_s(workload.counted, workload.counted_tokens)

    def median_limit(self, workload: Workload) -> float:
        """Over the rounds."""
        return statistics.median(self.limit(workload, each.ceilings) for each in self.rounds)

    def median_floor(self, workload: Workload) -> Floor:
        """That of the round in the middle."""
        floors = [self.floor(workload, each.ceilings) for each in self.rounds]
        return sorted(floors, key=lambda each: each.prefill_s + each.decode_s)[len(floors) // 2]

    def figure(self, workload: Workload, contestant: str) -> Figure | None:
        """None where it never ran."""
        figures, shares, ratios, same = [], [], [], []
        for each in self.rounds:
            value = _tokens_per_s(each, workload, contestant)
            if value is None:
                continue
            figures.append(value)
            shares.append(value / self.limit(workload, each.ceilings))
            ours = _tokens_per_s(each, workload, OURS)
            if ours is not None:
                ratios.append(value / ours)
                same.append(_same_first(each.turns[contestant], each.turns[OURS], workload.name))
        if not figures:
            return None
        return Figure(
            workload.name,
            contestant,
            tuple(figures),
            statistics.median(shares),
            statistics.median(ratios) if ratios else None,
            statistics.median(same) if same else None,
        )

    def pipeline(self, workload: str, served: str) -> Pipeline | None:
        """From the rounds that have both a replay and that contestant's run; None without any."""
        pairs = [
            (each.replay, each.turns[served].runs[workload])
            for each in self.rounds
            if each.replay is not None and served in each.turns
        ]
        if not pairs:
            return None
        split = pairs[0][0].split
        stage_s = _medians(replay.stage_s for replay, _ in pairs)
        return Pipeline(
            split,
            stage_s,
            statistics.median(run["wall_s"] for _, run in pairs),
            statistics.median(replay.floor_s / run["wall_s"] for replay, run in pairs),
            _medians([run["busy"][name] for name in sorted(run["busy"])] for _, run in pairs),
            best_split(split, stage_s),
        )


def _medians(rows: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Column by column."""
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))


def _tokens_per_s(each: Round, workload: Workload, contestant: str) -> float | None:
    turn = each.turns.get(contestant)
    if turn is None or workload.name not in turn.runs:
        return None
    run = turn.runs[workload.name]
    return workload.tokens_per_s(run["wall_s"], run["first_s"])


def _same_first(turn: Turn, ours: Turn, workload: str) -> float:
    pairs = list(zip(turn.runs[workload]["tokens"], ours.runs[workload]["tokens"], strict=True))
    return sum(mine[0] == theirs[0] for mine, theirs in pairs) / len(pairs)
