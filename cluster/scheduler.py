"""What goes into the next microbatch: waiting + running + token budget + free KV blocks -> Microbatch.

Pure: no torch, no ray, no asyncio, no clock: the time comes in as a number, in seconds. `schedule` decides, `update`
takes the results in, in step order.

    sequence   WAITING --admit--> PREFILL --last chunk sampled--> DECODE --stop, length--> ENDED
                  ^------------------ preempt, restart -------------'
    in flight  at most stages + 1 microbatches (or the decode groups, if those are more), each group's rows in one
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import isnan
from typing import NamedTuple

from tramontane.cluster.admission import Admission, OutputReserve, Refused
from tramontane.cluster.capacity import Capacity
from tramontane.cluster.forecast import Forecast
from tramontane.cluster.messages import EndReason
from tramontane.cluster.pacing import Pace
from tramontane.cluster.packing import InFlight, Piece, pack
from tramontane.cluster.roster import Roster
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Phase, Sequence
from tramontane.cluster.step_cost import StepCosts, StepLoad
from tramontane.stages.microbatch import Microbatch, StepResult


class Emitted(NamedTuple):
    """One step's news of one sequence: its next token, and its end if this was it."""

    sequence: int
    token: int | None
    """None where the end is NOT_FINITE."""
    offset: int
    """Place of the token in its completion."""
    log_probability: float
    end: EndReason | None


class Scheduler:
    """Decides for one pipeline, and owns the state of all its sequences.

    Counters count since construction: `tokens` are rows sent, `prompt_tokens` those of prompts whose first token is
    out. Decoding sequences go round in `decode_groups` microbatches, by default one a stage: each group reads all
    weights. `costs` learn from every step of a full pipe; what they know decides who may come in (`Admission`) and how
    much prefill goes beside decode.
    """

    def __init__(self, options: SchedulerOptions, *, stages: int, costs: StepCosts | None = None) -> None:
        groups = options.decode_groups or stages
        self._options = options
        self._stages = stages
        self._groups = groups
        self._most_in_flight = max(stages + 1, groups)
        self._roster = Roster(options.layout)
        self._reserve = OutputReserve()
        self._pace = Pace(stages, groups)
        self.capacity = Capacity(options, groups, costs or StepCosts())
        self._forecast = Forecast(self.capacity, stages, groups, options.layout.windows)
        self._admission = Admission(options, self.capacity, self._forecast, self._roster)
        self._turned_away: list[tuple[int, Refused]] = []
        self._in_flight: deque[InFlight] = deque()
        self._last_result_s = 0.0
        self._pieces: dict[int, Piece] = {}  # of the microbatch in the making, by sequence
        self.microbatches = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Sequences that wait to be admitted, the preempted included."""
        return len(self._roster.waiting)

    @property
    def running(self) -> int:
        """Admitted sequences."""
        return len(self._roster.running)

    @property
    def in_flight(self) -> int:
        """Microbatches whose results are not back."""
        return len(self._in_flight)

    @property
    def in_flight_load(self) -> StepLoad:
        """What the oldest microbatch in flight holds."""
        return self._in_flight[0].load

    @property
    def waiting_since_s(self) -> float:
        """When the oldest microbatch in flight left, or the result before it came, if that was later."""
        return max(self._last_result_s, self._in_flight[0].sent_s if self._in_flight else 0.0)

    @property
    def outstanding_tokens(self) -> int:
        """Known tokens not yet sent down the pipe, and tokens that may still be generated, over all sequences."""
        return self._roster.outstanding_tokens

    def estimated_wait_s(self, now: float) -> float | None:
        """What a request that came now would wait until its prefill begins; None while nothing was measured."""
        return self._admission.estimated_wait_s(now)

    @property
    def used_blocks(self) -> tuple[int, ...]:
        """KV blocks held, one entry a window class."""
        return self._roster.blocks.used

    @property
    def total_blocks(self) -> tuple[int, ...]:
        """KV blocks in all, one entry a window class."""
        return self._roster.blocks.total

    def add(self, sequence: Sequence, now: float) -> None:
        """Let a new sequence wait for its turn.

        Raises:
            Refused: too many wait, it would wait too long, or it cannot end in time.
            ValueError: it could not run even alone.
        """
        assert sequence.id not in self._roster.sequences, f"sequence {sequence.id} is here already"
        max_tokens = sequence.stopping.max_tokens
        assert min(sequence.prompt_tokens, max_tokens) > 0, f"sequence {sequence.id} has nothing to do"
        layout, context = self._options.layout, self._options.context
        length = sequence.prompt_tokens + max_tokens
        asked = f"{sequence.prompt_tokens} prompt tokens + max_tokens {max_tokens} = {length}"
        if length > context:
            raise ValueError(f"{asked}, and the context is {context}")
        if not layout.fits(length):
            blocks = self._roster.blocks
            raise ValueError(f"{asked} need {blocks.needed(length)} KV blocks, and the pools hold {list(blocks.total)}")
        self._admit(now)  # so that only those count as waiting for whom there is no room
        self._admission.check(sequence, now)
        self._roster.enter(sequence)
        self._admission.entered(sequence)

    def cancel(self, sequence_id: int, *, completed: bool = False) -> bool:
        """Forget a sequence and free what it holds, at once, in flight or not; False if it is not here.

        `completed` where its text has come to its end, so that its length tells of others'.
        """
        sequence = self._roster.sequences.get(sequence_id)
        if sequence is not None:
            if completed:
                self._forecast.lengths.ended(max(sequence.generated, 1), sequence.stopping.max_tokens)
            self._roster.end(sequence)
        return sequence is not None

    def turned_away(self) -> list[tuple[int, Refused]]:
        """Those that waited and can no longer end in time, since the last call; they are gone."""
        refused, self._turned_away = self._turned_away, []
        return refused

    def schedule(self, epoch: int, step: int, now: float) -> Microbatch | None:
        """The microbatch that may leave now, to be sent as this step of this epoch; None when there is none."""
        if len(self._in_flight) >= self._most_in_flight:
            return None
        self._take_decode_rows()
        self._admit(now)
        self._take_chunks()
        return self._launch(epoch, step, now) if self._pieces else None

    def update(self, result: StepResult, now: float) -> list[Emitted]:
        """Take in the oldest microbatch's results. Those for ended or preempted incarnations are dropped."""
        assert self._in_flight, f"a result of epoch {result.epoch}, step {result.step}, and nothing is in flight"
        self._observe(self._in_flight[0], now)
        flight = self._in_flight.popleft()
        assert (result.epoch, result.step) == (flight.epoch, flight.step), (
            f"the result is of epoch {result.epoch}, step {result.step}; due is {flight.epoch}, {flight.step}"
        )
        emitted = []
        for sequence, scores in flight.scores_of(result):
            sequence.scores.extend(scores)
            if any(isnan(score) for score in scores):
                emitted.append(self._fail(sequence))
        for sequence, token, log_probability, finite in flight.samples_of(result):
            emitted.append(self._append(sequence, token, log_probability) if finite else self._fail(sequence))
        return emitted

    def restart(self) -> None:
        """For a new epoch: all blocks are free, nothing is in flight, and the running wait, to be computed again."""
        self._in_flight.clear()
        self._roster.restart()
        self._admission.forget()

    def _observe(self, flight: InFlight, now: float) -> None:
        """While the pipe is full, a step costs what has passed since the result before. One stage is full of one."""
        since_s, followed = self.waiting_since_s, flight.sent_s <= self._last_result_s
        self._last_result_s = now
        if len(self._in_flight) >= self._stages and (followed or self._stages == 1):
            self.capacity.costs.observe(flight.load, now - since_s)

    def _take_decode_rows(self) -> None:
        """An even share of the decoding sequences, those first that have waited longest."""
        roster = self._roster
        if not roster.ready or sum(flight.decodes for flight in self._in_flight) >= self._groups:
            return
        quota = self._pace.decode_rows(len(roster.decoding))
        for sequence in list(roster.ready.values()):
            if len(self._pieces) >= quota:
                break
            if sequence.phase is Phase.DECODE:  # else preempted for an older one
                self._take(sequence, 1)

    def _admit(self, now: float) -> None:
        """Let the waiting in, by age, while there are seats and KV holds them beside what the running will need."""
        roster = self._roster
        if not roster.waiting:
            self._admission.kv_is_short = False
            return
        self._turn_away(now)
        seats = self.capacity.seats - len(roster.running)
        admitted = self._reserve.affordable(roster.blocks, roster.waiting.values(), roster.running.values(), seats)
        for sequence in admitted:
            roster.admit(sequence)
        self._admission.kv_is_short = bool(roster.waiting) and len(admitted) < seats
        if admitted:
            uncomputed = sum(sequence.uncomputed for sequence in roster.prefilling.values())
            self._pace.set_prefill(uncomputed, decoding=bool(roster.decoding))

    def _turn_away(self, now: float) -> None:
        """Whoever is next, was never admitted and can no longer end in time goes before any stage works for it."""
        waiting = self._roster.waiting
        while waiting:
            head = next(iter(waiting.values()))
            refusal = None if head.incarnation else self._admission.too_late(head, now)
            if refusal is None:
                break
            self._roster.end(head)
            self._turned_away.append((head.id, refusal))

    def _take_chunks(self) -> None:
        """Chunks of known tokens, the oldest sequence's first, until the budget is spent."""
        roster = self._roster
        if not roster.prefilling:
            return
        budget = min(self._pace.prefill_tokens, self._options.max_batch_tokens - len(self._pieces))
        if roster.decoding:
            oldest = next(iter(roster.prefilling.values()))
            budget = min(budget, self.capacity.prompt_rows(self._load(self._pieces.values()), oldest.computed))
        for sequence in list(roster.prefilling.values()):
            if budget <= 0:
                break
            if sequence.phase is Phase.PREFILL:  # else preempted for an older one
                budget -= self._take(sequence, min(sequence.uncomputed, self._options.layout.chunk, budget))

    def _take(self, sequence: Sequence, length: int) -> int:
        """Put a sequence's next tokens into the microbatch in the making: `length`, or what there is room for."""
        if length := self._secure(sequence, length):
            self._pieces[sequence.id] = Piece.following(sequence, length)
            self._roster.advance(sequence, length)
        return length

    def _secure(self, sequence: Sequence, length: int) -> int:
        """Blocks for its next `length` tokens, or for as many as there is room for; 0 if it has to wait for room.

        Only younger sequences are preempted for it. So the oldest always goes on, and nobody loses work to itself.
        """
        blocks, rings, computed = self._roster.blocks, sequence.rings, sequence.computed
        assert rings is not None
        if computed + length <= rings.room:
            return length
        while (reach := blocks.reach(rings)) <= computed:
            youngest = next(reversed(self._roster.running.values()))
            if youngest is sequence:
                assert len(self._roster.running) > 1, f"sequence {sequence.id} is alone, and {blocks.free} are free"
                return 0
            self._preempt(youngest)
        length = min(length, reach - computed)
        grown = blocks.grow(rings, computed + length)
        assert grown, f"{blocks.free} blocks are free, and sequence {sequence.id} reaches {reach}"
        return length

    def _preempt(self, sequence: Sequence) -> None:
        """Make room: the sequence gives back its blocks and will be computed again, before all who wait."""
        if sequence.computed:  # else it loses no work
            self.preemptions += 1
            self._reserve.rise()
        self._pieces.pop(sequence.id, None)
        self._roster.take_back(sequence)

    def _launch(self, epoch: int, step: int, now: float) -> Microbatch:
        pieces = list(self._pieces.values())
        self._pieces.clear()
        microbatch = pack(epoch, step, pieces, self._roster.blocks.take_fresh())
        assert len(microbatch.tokens) <= self._options.max_batch_tokens, f"{len(microbatch.tokens)} rows"
        decode, prompts = self._load(p for p in pieces if p.decodes), self._load(p for p in pieces if not p.decodes)
        self.capacity.launched(decode)
        load = StepLoad(decode.decode_rows, prompts.prompt_rows, decode.keys + prompts.keys)
        self._in_flight.append(InFlight.of(epoch, step, pieces, load, now))
        for piece in pieces:
            if piece.first == piece.sequence.incarnation == 0:
                self._admission.started(piece.sequence, now)
        self._reserve.decay()
        self.microbatches += 1
        self.tokens += len(microbatch.tokens)
        return microbatch

    def _load(self, pieces: Iterable[Piece]) -> StepLoad:
        return StepLoad.of([(each.first, each.length, each.decodes) for each in pieces], self._options.layout.windows)

    def _append(self, sequence: Sequence, token: int, log_probability: float) -> Emitted:
        """A sampled token: the sequence ends with it, or is ready to send it."""
        offset = sequence.generated
        self._roster.append(sequence, token)
        self.completion_tokens += 1
        self.prompt_tokens += sequence.prompt_tokens if offset == 0 else 0
        end = EndReason.LENGTH if offset + 1 == sequence.stopping.max_tokens else None
        if token in sequence.stopping.token_ids and offset >= sequence.stopping.min_tokens:
            end = EndReason.STOP_TOKEN
        if end is not None:
            self._forecast.lengths.ended(sequence.generated, sequence.stopping.max_tokens)
            self._roster.end(sequence)
        return Emitted(sequence.id, token, offset, log_probability, end)

    def _fail(self, sequence: Sequence) -> Emitted:
        self._roster.end(sequence)
        return Emitted(sequence.id, None, sequence.generated, float("nan"), EndReason.NOT_FINITE)
