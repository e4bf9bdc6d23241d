"""Who may come in: how long a request would wait, whether it can end in time, and what KV is kept back for it.

Pure: measured costs and the time come in as numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

from tramontane.cluster.blocks import BlockAllocator
from tramontane.cluster.capacity import Capacity
from tramontane.cluster.forecast import LOW, TYPICAL, Forecast, RetryTurns
from tramontane.cluster.roster import Roster
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Sequence

MAY_ALWAYS_WAIT = 8
"""So few newcomers may wait, whatever the estimate says."""
OUTLOOK_S, OUTLOOK_OF_EACH_S = 0.02, 5e-5
"""An outlook is good for so long, and so much longer for each sequence that it looks at: it takes 3 us for each."""


class RefusalReason(StrEnum):
    """Why a request was not taken."""

    QUEUE_FULL = "queue_full"
    """`max_waiting` requests wait."""
    QUEUE_WAIT = "queue_wait"
    """It would wait longer than `max_queue_wait_s`."""
    DEADLINE = "deadline"
    """It cannot end before its deadline."""


class Refused(Exception):  # noqa: N818  (what became of the request, not a mistake)
    """The request was not taken; no stage has worked for it."""

    def __init__(self, reason: RefusalReason, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
        """When there will be room, by estimate; None where nothing is known."""


class Outlook(NamedTuple):
    """What a newcomer may expect, in seconds."""

    made_s: float
    """When, by the caller's clock."""
    wait_s: float
    """Until its prefill begins, before correction by waits that came true."""
    least_wait_s: float
    """The same if completions become as short as some do."""
    round_s: float
    """A token of each that runs."""


class Admission:
    """Refuses whoever would wait too long or end too late, by measured costs; without these, only a full queue."""

    def __init__(self, options: SchedulerOptions, capacity: Capacity, forecast: Forecast, roster: Roster) -> None:
        self._options = options
        self._capacity = capacity
        self._forecast = forecast
        self._roster = roster
        self._turns = RetryTurns()
        self._outlook: Outlook | None = None
        self.kv_is_short = False
        """Somebody waits though a seat is free."""

    def entered(self, sequence: Sequence) -> None:
        """It waits now: whoever comes next waits for its prompt, too, and for all of its work where no seat is free."""
        if self._outlook is None:
            return
        full = len(self._roster.running) + len(self._roster.waiting) >= self._capacity.seats
        more_s = self._forecast.work_s(sequence) if full else self._forecast.prefill_s([sequence])
        wait_s, least_wait_s = self._outlook.wait_s + more_s, self._outlook.least_wait_s + more_s
        self._outlook = self._outlook._replace(wait_s=wait_s, least_wait_s=least_wait_s)

    def forget(self) -> None:
        """What was expected is another thing now."""
        self._outlook = None

    def estimated_wait_s(self, now: float) -> float | None:
        """What a request that came now would wait until its prefill begins; None while nothing was measured."""
        if self._capacity.cost is None:
            return None
        return self._look(now).wait_s * self._forecast.record.correction

    def check(self, sequence: Sequence, now: float) -> None:
        """Whether a request that comes now may wait for its turn.

        Raises:
            Refused: it may not, and the refusal says why and when to come back.
        """
        waiting, limit, limit_s = self._roster.newcomers, self._options.max_waiting, self._options.max_queue_wait_s
        wait_s = self.estimated_wait_s(now)
        if waiting >= limit:
            message = f"{waiting} requests wait, and the limit (max-waiting) is {limit}"
            raise self._refused(sequence, RefusalReason.QUEUE_FULL, message, now, wait_s or 0.0)
        if wait_s is None:
            return
        if limit_s and wait_s > limit_s and waiting >= MAY_ALWAYS_WAIT:
            message = f"a request would wait {wait_s:.1f} s, and the limit (max-queue-wait) is {limit_s:g} s"
            raise self._refused(sequence, RefusalReason.QUEUE_WAIT, message, now, wait_s - limit_s)
        least_s = self._look(now).least_wait_s * min(self._forecast.record.correction, 1.0)
        if (refusal := self.too_late(sequence, now, least_s)) is not None:
            raise refusal
        sequence.estimated_wait_s = self._look(now).wait_s

    def too_late(self, sequence: Sequence, now: float, wait_s: float = 0.0) -> Refused | None:
        """The refusal of a request that would miss its deadline even if its completion became as short as some do."""
        if sequence.deadline_s is None or self._capacity.cost is None:
            return None
        tokens = self._forecast.lengths.remaining(LOW, sequence.stopping.max_tokens, sequence.generated)
        needed_s = wait_s + self._forecast.prefill_s([sequence]) + tokens * self._look(now).round_s
        left_s = sequence.deadline_s - now
        if needed_s <= left_s:
            return None
        message = f"the request would end in {needed_s:.1f} s at best, and its deadline is in {max(left_s, 0):.1f} s"
        return self._refused(sequence, RefusalReason.DEADLINE, message, now, needed_s - left_s)

    def started(self, sequence: Sequence, now: float) -> None:
        """Its first microbatch leaves: its wait is over."""
        if sequence.estimated_wait_s is not None:
            self._forecast.record.came_true(sequence.estimated_wait_s, now - sequence.arrived_s)

    def _look(self, now: float) -> Outlook:
        roster = self._roster
        good_s = OUTLOOK_S + OUTLOOK_OF_EACH_S * len(roster.sequences)
        if self._outlook is None or now - self._outlook.made_s > good_s:
            forecast = self._forecast
            likely_s, least_s = (
                forecast.wait_s(roster, quantile, kv_is_short=self.kv_is_short) for quantile in (TYPICAL, LOW)
            )
            self._outlook = Outlook(now, likely_s, least_s, forecast.round_s(roster.running.values()))
        return self._outlook

    def _refused(
        self, sequence: Sequence, reason: RefusalReason, message: str, now: float, room_in_s: float
    ) -> Refused:
        if self._capacity.cost is None:
            return Refused(reason, message, None)
        return Refused(reason, message, self._turns.after_s(now, room_in_s, self._forecast.work_s(sequence)))


class OutputReserve:
    """Keeps blocks back for the running: all that their known tokens need, and a share of their possible output.

    The share rises after each preemption and decays with each microbatch. A full ring needs nothing more.
    """

    START, LEAST, DECAY = 0.5, 0.1, 0.998

    def __init__(self) -> None:
        self.share = self.START

    def rise(self) -> None:
        """Half of the way to reserving everything."""
        self.share += (1.0 - self.share) / 2

    def decay(self) -> None:
        """From everything to half in some 350 microbatches."""
        self.share = max(self.LEAST, self.share * self.DECAY)

    def affordable(
        self, blocks: BlockAllocator, waiting: Iterable[Sequence], running: Iterable[Sequence], seats: int
    ) -> list[Sequence]:
        """Those at the head of the queue that fit beside the running; nobody overtakes. At most `seats`."""
        chosen: list[Sequence] = []
        spare: list[int] | None = None
        for sequence in islice(waiting, max(seats, 0)):
            if not _covers(blocks.free, blocks.needed(len(sequence.tokens))):
                break
            if spare is None:  # not before someone may fit: it looks at all the running
                spare = self._spare(blocks, running)
            needed = self._needed(blocks, sequence)
            if not _covers(spare, needed):
                break
            spare = [left - need for left, need in zip(spare, needed, strict=True)]
            chosen.append(sequence)
        return chosen

    def _spare(self, blocks: BlockAllocator, running: Iterable[Sequence]) -> list[int]:
        """Free blocks less those that the running are expected to take."""
        spare = [*blocks.free]
        for sequence in running:
            assert sequence.rings is not None
            for index, (need, held) in enumerate(
                zip(self._needed(blocks, sequence), sequence.rings.blocks, strict=True)
            ):
                spare[index] -= need - len(held)
        return spare

    def _needed(self, blocks: BlockAllocator, sequence: Sequence) -> list[int]:
        return blocks.needed(len(sequence.tokens) + int(self.share * sequence.remaining))


def _covers(blocks: Iterable[int], needed: Iterable[int]) -> bool:
    return all(need <= count for need, count in zip(needed, blocks, strict=True))
