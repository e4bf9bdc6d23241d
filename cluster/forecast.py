"""When a request would start, and when it would end: from measured costs, real lengths, who runs and who waits."""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items

from tramontane.cluster.capacity import Capacity
from tramontane.cluster.roster import Roster
from tramontane.cluster.sequence import Sequence
from tramontane.cluster.step_cost import StepCost, StepLoad, keys_seen

LOW, TYPICAL = 0.1, 0.5
"""Quantiles of completions' lengths: for what must not be refused by mistake, and for what is likely."""


class OutputLengths:
    """How long completions really become, as shares of their max_tokens: quantiles over the last of them.

    >>> lengths = OutputLengths()
    >>> lengths.remaining(TYPICAL, 100, generated=0), lengths.remaining(TYPICAL, 100, generated=80)
    (50, 10)
    >>> for length in (10, 20, 30, 40, 50, 60, 70, 80, 90, 100): lengths.ended(length, max_tokens=100)
    >>> lengths.remaining(LOW, 100, generated=0), lengths.remaining(TYPICAL, 100, generated=0)
    (20, 60)
    >>> lengths.remaining(TYPICAL, 100, generated=60)  # of those that became longer than 60: 90
    30
    """

    WINDOW, FEW = 256, 8
    START = 0.5
    """The share that counts before a few have ended; as `OutputReserve.START`."""

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self._sorted: list[float] = []

    def ended(self, generated: int, max_tokens: int) -> None:
        """A completion has ended by itself after so many tokens."""
        share = generated / max_tokens
        self._last.append(share)
        insort(self._sorted, share)
        if len(self._last) > self.WINDOW:
            del self._sorted[bisect_right(self._sorted, self._last.popleft()) - 1]

    def remaining(self, quantile: float, max_tokens: int, generated: int) -> int:
        """Tokens still to come, at this quantile of the completions that became longer than this one is; at least 1.

        Where none did, half of what is left.
        """
        shares = self._sorted if len(self._sorted) >= self.FEW else [self.START]
        done = generated / max_tokens
        first, count = bisect_right(shares, done), len(shares)
        share = shares[first + int(quantile * (count - first))] if first < count else (1 + done) / 2
        return max(1, round(share * max_tokens) - generated)


def rounds_until_seat(seats: int, running: Items[int], queued: Iterable[int]) -> int:
    """Decode rounds until a newcomer may run, behind those who queue: each takes the seat that is free first.

    `running` and `queued` are the rounds that each of them still takes.

    >>> rounds_until_seat(3, running=[3, 10], queued=[]), rounds_until_seat(2, running=[3, 10], queued=[])
    (0, 3)
    >>> rounds_until_seat(2, running=[3, 10], queued=[5, 9])  # at 3 the first, at 8 the second, at 10 the newcomer
    10
    """
    free = [*[0] * (seats - len(running)), *running]
    heapq.heapify(free)
    for rounds in queued:
        heapq.heapreplace(free, free[0] + rounds)
    return free[0]


class WaitRecord:
    """Holds estimated waits against those that came true, and corrects the next ones so that nine of ten are kept.

    >>> record = WaitRecord()
    >>> for true_s in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9): record.came_true(1.0, true_s)
    >>> record.correction
    1.9
    """

    WINDOW, KEPT = 64, 0.9
    LEAST_S = 0.1
    """Shorter waits say little: they are a step or two."""
    MOST = 2.0

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=self.WINDOW)
        self.correction = 1.0
        """What estimates are multiplied by."""

    def came_true(self, estimated_s: float, true_s: float) -> None:
        """A wait is over; `estimated_s` is what was estimated before correction."""
        if estimated_s < self.LEAST_S:
            return
        self._ratios.append(min(max(true_s / estimated_s, 1 / self.MOST), self.MOST))
        self.correction = sorted(self._ratios)[int(self.KEPT * len(self._ratios))]


class RetryTurns:
    """Tells the refused when to come back: one after another, as the pipeline will have room for them.

    >>> turns = RetryTurns()
    >>> [round(turns.after_s(now=100.0, room_in_s=0.5, work_s=0.2), 3) for _ in range(3)]
    [0.5, 0.7, 0.9]
    >>> round(turns.after_s(now=100.6, room_in_s=0.1, work_s=0.2), 3)  # it is behind the other three
    0.5
    """

    LEAST_S, MOST_S = 0.05, 30.0

    def __init__(self) -> None:
        self._next = 0.0

    def after_s(self, now: float, room_in_s: float, work_s: float) -> float:
        """Seconds to wait for one more, whose work takes the pipeline `work_s`; the queue has room in `room_in_s`."""
        turn = min(max(self._next, now + room_in_s), now + self.MOST_S)
        self._next = turn + work_s
        return max(turn - now, self.LEAST_S)


class Forecast:
    """Estimates for one pipeline, in seconds of a pipe that is kept full. They need measured costs."""

    def __init__(self, capacity: Capacity, stages: int, groups: int, windows: Items[int | None]) -> None:
        self.lengths = OutputLengths()
        self.record = WaitRecord()
        self._capacity = capacity
        self._stages = stages
        self._groups = groups
        self._windows = windows

    def wait_s(self, roster: Roster, quantile: float, *, kv_is_short: bool) -> float:
        """What a newcomer waits until its prefill begins: for a seat, or for the prompts before it.

        A seat comes after others' decode rounds, and their prompts take their time meanwhile. Where KV is short, no
        more run than do now. Prompts go beside decode only as quickly as steps may grow.
        """
        running, waiting = roster.running.values(), roster.waiting.values()
        rounds = [self.lengths.remaining(quantile, each.stopping.max_tokens, each.generated) for each in running]
        queued = [self.lengths.remaining(quantile, each.stopping.max_tokens, each.generated) for each in waiting]
        seats = 0 if kv_is_short else self._capacity.seats
        until_seat = rounds_until_seat(max(seats, len(rounds), 1), rounds, queued)
        before = [*roster.prefilling.values(), *waiting]
        seat_s = until_seat * self.round_s(running) + self.prefill_s(before)
        if not roster.decoding:
            return seat_s
        tokens = sum(each.uncomputed for each in before)
        return max(seat_s, tokens * self._capacity.prompt_row_beside_s(len(roster.decoding)))

    def round_s(self, sequences: Collection[Sequence]) -> float:
        """One token for each of these sequences: a step a group, but never less than one way through all stages.

        Where there are none, for one.
        """
        count = max(len(sequences), 1)
        return self._round_s(count, sum(len(sequence.tokens) for sequence in sequences) / count)

    def prefill_s(self, sequences: Iterable[Sequence]) -> float:
        """What is left to compute of these prompts, in steps that are made anyway."""
        pieces = [(each.computed, each.uncomputed, False) for each in sequences]
        return self._cost.seconds(StepLoad.of(pieces, self._windows)) - self._cost.base_s

    def work_s(self, sequence: Sequence) -> float:
        """By how much later a full pipeline is done for one more request, where all seats share each round."""
        seats = self._capacity.seats
        output = self.lengths.remaining(TYPICAL, sequence.stopping.max_tokens, 0)
        return self.prefill_s([sequence]) + output * self._round_s(seats, sequence.prompt_tokens) / seats

    def _round_s(self, count: int, tokens: float) -> float:
        steps = min(self._groups, count)
        rows = -(-count // steps)
        load = StepLoad(rows, 0, rows * keys_seen(tokens, self._windows))
        return max(steps, self._stages) * self._cost.seconds(load)

    @property
    def _cost(self) -> StepCost:
        assert self._capacity.cost is not None, "nothing was measured"
        return self._capacity.cost
