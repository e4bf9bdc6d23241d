"""A pipeline that one can compute by hand, and that distrusts whoever fills its microbatches.

It reads nothing but the Microbatch. It keeps every KV row as (sequence, life, position, token), a life being what
starts with a piece at position 0; a query looks up every position that it may see, and must find its own sequence's
rows of this life there. The next token is a checksum over the tokens found, so that a wrong row would also show in
the stream. `expect` computes the same from the tokens alone, with no blocks, chunks or microbatches.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tramontane.cluster.messages import EndReason, Sampling, Stopping
from tramontane.cluster.scheduler import Emitted, Scheduler
from tramontane.cluster.scheduler_options import SchedulerOptions
from tramontane.cluster.sequence import Phase, Sequence
from tramontane.cluster.step_cost import StepCost
from tramontane.stages.kv_layout import KVLayout, blocks_held, ring_blocks
from tramontane.stages.microbatch import Microbatch, StepResult

VOCAB = 31
POISON = VOCAB - 1
"""Rows that see this token are not finite; it is never chosen."""

Seen = list[list[int]]
"""Of each window class, the tokens that a row sees, itself last."""


def layout_of(
    windows: tuple[int | None, ...], *, chunk: int = 4, block: int = 4, context: int = 64, pool: float = 4
) -> KVLayout:
    """A layout whose pools hold `pool` full rings of each class."""
    rings = tuple(ring_blocks(window, chunk, block, context) for window in windows)
    return KVLayout(
        block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=tuple(int(ring * pool) for ring in rings)
    )


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + index * 7) % POISON for index in range(length)]


def see(tokens: list[int], windows: tuple[int | None, ...]) -> Seen:
    """What the last of these tokens sees."""
    return [tokens if window is None else tokens[-window:] for window in windows]


def checksum(seen: Seen, salt: int) -> int:
    return zlib.crc32(repr((seen, salt)).encode())


def next_token(seen: Seen, seed: int, position: int, banned: list[int]) -> int:
    token = checksum(seen, seed ^ position) % POISON
    while token in banned:
        token = (token + 1) % POISON
    return token


def score_of(seen: Seen, target: int) -> float:
    return float("nan") if POISON in seen[0] else -float(checksum(seen, target) % 1000)


def expect(sequence: Sequence, windows: tuple[int | None, ...]) -> tuple[list[int], EndReason]:
    """The completion of a new sequence, and how it ends."""
    tokens, completion, stopping = sequence.tokens.tolist(), [], sequence.stopping
    while True:
        seen = see(tokens, windows)
        if any(POISON in part for part in seen):
            return completion, EndReason.NOT_FINITE
        banned = list(stopping.token_ids) if len(completion) < stopping.min_tokens else []
        token = next_token(seen, sequence.sampling.seed, len(tokens), banned)
        tokens.append(token)
        completion.append(token)
        if token in stopping.token_ids:
            return completion, EndReason.STOP_TOKEN
        if len(completion) == stopping.max_tokens:
            return completion, EndReason.LENGTH


def expect_scores(prompt: list[int], windows: tuple[int | None, ...]) -> list[float]:
    return [score_of(see(prompt[:end], windows), prompt[end]) for end in range(1, len(prompt))]


class FakeStages:
    """All stages of one binding at once: each of them would keep the same rows."""

    def __init__(self, layout: KVLayout, epoch: int) -> None:
        self.layout = layout
        self.epoch = epoch
        self.step_due = 0
        self.rows: dict[tuple[int, int, int], tuple[int, int, int, int]] = {}
        self.owner: dict[tuple[int, int], tuple[int, int] | None] = {}  # absent: bytes of anyone
        self.life: dict[int, int] = {}
        self.progress: dict[int, int] = {}

    def step(self, microbatch: Microbatch) -> StepResult:
        assert (microbatch.epoch, microbatch.step) == (self.epoch, self.step_due), "out of order"
        self.step_due += 1
        assert len(microbatch.tokens) == microbatch.length.sum() > 0
        assert len(set(microbatch.sequence.tolist())) == len(microbatch.sequence), "two pieces of one sequence"
        self._zero(microbatch)
        tables = [self._rings(microbatch, index) for index in range(len(self.layout.windows))]
        seen: list[Seen] = []
        for piece, (start, first, length, sequence) in enumerate(
            zip(
                microbatch.start.tolist(),
                microbatch.first.tolist(),
                microbatch.length.tolist(),
                microbatch.sequence.tolist(),
                strict=True,
            )
        ):
            tokens = microbatch.tokens[start : start + length].tolist()
            seen += self._attend(sequence, first, tokens, [rings[piece] for rings in tables])
        return self._result(microbatch, seen)

    def _zero(self, microbatch: Microbatch) -> None:
        for index, table in enumerate(microbatch.tables):
            fresh = table.fresh.tolist()
            assert len(set(fresh)) == len(fresh), f"zeroed twice: {fresh}"
            for block in fresh:
                assert 0 <= block < self.layout.pool_blocks[index], f"block {block} of class {index}"
                self.owner[index, block] = None
                for row in range(self.layout.block):
                    self.rows.pop((index, block, row), None)

    def _rings(self, microbatch: Microbatch, index: int) -> list[list[int]]:
        """The pieces' rings of one class: as long as they must be, and of blocks that nobody else has."""
        table = microbatch.tables[index]
        assert len(set(table.blocks.tolist())) == len(table.blocks) == table.held.sum(), "a block in two places"
        used = (microbatch.first + microbatch.length).tolist()
        assert table.held.tolist() == [blocks_held(n, self.layout.block, self.layout.rings[index]) for n in used]
        return [part.tolist() for part in np.split(table.blocks, np.cumsum(table.held)[:-1])]

    def _attend(self, sequence: int, first: int, tokens: list[int], rings: list[list[int]]) -> list[Seen]:
        """Write all rows, then look up what each of them sees."""
        assert len(tokens) <= self.layout.chunk
        if first == 0:
            self.life[sequence] = self.life.get(sequence, 0) + 1
            self.progress[sequence] = 0
        assert self.progress.get(sequence) == first, f"sequence {sequence} is at {self.progress.get(sequence)}"
        self.progress[sequence] += len(tokens)
        me = sequence, self.life[sequence]
        for index, ring in enumerate(rings):
            for block in ring:
                assert (index, block) in self.owner, f"block {block} was never zeroed"
                owner = self.owner[index, block] or me
                assert owner == me, f"block {block} of {me} was zeroed for {owner} last"
                self.owner[index, block] = me
            for offset, token in enumerate(tokens):
                self.rows[self._place(index, ring, first + offset)] = (*me, first + offset, token)
        return [
            [self._look(index, ring, me, position) for index, ring in enumerate(rings)]
            for position in range(first, first + len(tokens))
        ]

    def _look(self, index: int, ring: list[int], me: tuple[int, int], position: int) -> list[int]:
        window = self.layout.windows[index]
        found = []
        for key in range(0 if window is None else max(0, position - window + 1), position + 1):
            row = self.rows.get(self._place(index, ring, key))
            assert row is not None, f"{me} at {position} finds nothing of {key}"
            assert row[:3] == (*me, key), f"{me} at {position} finds {row[:3]}, not {key}"
            found.append(row[3])
        return found

    def _place(self, index: int, ring: list[int], position: int) -> tuple[int, int, int]:
        logical = position // self.layout.block
        return index, ring[logical % self.layout.rings[index]], position % self.layout.block

    def _result(self, microbatch: Microbatch, seen: list[Seen]) -> StepResult:
        sampled, scored = microbatch.sampled, microbatch.scored
        chosen, finite, start = [], [], 0
        for row, seed, count in zip(
            sampled.row.tolist(), sampled.seed.tolist(), sampled.banned_count.tolist(), strict=True
        ):
            banned = sampled.banned[start : start + count].tolist()
            start += count
            chosen.append(next_token(seen[row], seed, int(microbatch.position[row]) + 1, banned))
            finite.append(not any(POISON in part for part in seen[row]))
        assert start == len(sampled.banned)
        scores = [score_of(seen[r], t) for r, t in zip(scored.row.tolist(), scored.target.tolist(), strict=True)]
        return StepResult(
            epoch=microbatch.epoch,
            step=microbatch.step,
            token=np.array(chosen, np.int32),
            log_probability=-np.array(chosen, np.float32),
            finite=np.array(finite, np.bool_),
            score=np.array(scores, np.float32),
        )


@dataclass(eq=False)
class Stream:
    """What one request has received."""

    sequence: Sequence
    expected: tuple[list[int], EndReason]
    tokens: list[int] = field(default_factory=list)
    end: EndReason | None = None
    cancelled: bool = False
    arrival: int = 0
    decodes: bool = False
    """Its last piece was sampled, so its next one in this life is a decode row."""


class FakePipeline:
    """Scheduler and fake stages, with microbatches in flight between them; checks all that must hold at every step.

    A microbatch is computed only when it is delivered, long after the scheduler has gone on.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        stages: int = 2,
        max_batch_tokens: int = 32,
        max_waiting: int = 64,
        context: int = 64,
        decode_groups: int | None = None,
        cost: StepCost | None = None,
        **limits: object,
    ) -> None:
        """`cost` is what the scheduler believes; its clock stands still."""
        self.layout = layout
        self.stages = stages
        self.decode_groups = decode_groups or stages
        self.max_batch_tokens = max_batch_tokens
        options = SchedulerOptions(
            layout=layout,
            context=context,
            max_batch_tokens=max_batch_tokens,
            max_waiting=max_waiting,
            decode_groups=decode_groups,
            **limits,
        )
        self.scheduler = Scheduler(options, stages=stages)
        self.scheduler.capacity.costs.cost = cost
        self.fake = FakeStages(layout, epoch=1)
        self.step = 0
        self.pipe: deque[tuple[Microbatch, bool]] = deque()
        self.groups: list[int] = []
        """Decode rows of every microbatch that had some."""
        self.live: dict[int, Stream] = {}
        self.streams: list[Stream] = []
        self.careless = False
        """Let admission keep nothing back for output, so that preemptions are many."""
        self._last_started = -1

    def add(
        self,
        sequence_id: int,
        prompt: list[int],
        max_tokens: int = 8,
        *,
        seed: int = 0,
        score: bool = False,
        **stopping: object,
    ) -> Stream:
        """`stopping`: the other fields of `Stopping`."""
        sequence = Sequence(
            id=sequence_id,
            prompt=prompt,
            sampling=Sampling(seed=seed),
            stopping=Stopping(max_tokens=max_tokens, **stopping),
            score_prompt=score,
        )
        self.scheduler.add(sequence, now=0.0)
        stream = Stream(sequence, expect(sequence, self.layout.windows), arrival=len(self.streams))
        self.streams.append(stream)
        self.live[sequence_id] = stream
        return stream

    def cancel(self, sequence_id: int) -> None:
        stream = self.live.pop(sequence_id)
        stream.cancelled = True
        assert self.scheduler.cancel(sequence_id)
        assert not self.scheduler.cancel(sequence_id)

    def schedule(self) -> Microbatch | None:
        """One microbatch enters the pipe, if there is one."""
        running = [s for s in self.live.values() if s.sequence.phase in (Phase.PREFILL, Phase.DECODE)]
        oldest = min(running, key=lambda stream: stream.arrival, default=None)
        incarnation = oldest.sequence.incarnation if oldest else 0
        if self.careless:
            self.scheduler._reserve.share = 0.0
        microbatch = self.scheduler.schedule(self.fake.epoch, self.step, now=0.0)
        if oldest:
            assert oldest.sequence.incarnation == incarnation, "the oldest was preempted"
        if microbatch is None:
            return None
        self.step += 1
        rows = self._decode_rows(microbatch)
        if rows:
            self.groups.append(rows)
        self.pipe.append((microbatch, rows > 0))
        assert len(microbatch.tokens) <= self.max_batch_tokens
        assert len(self.pipe) <= max(self.stages + 1, self.decode_groups)
        assert sum(decodes for _, decodes in self.pipe) <= self.decode_groups
        return microbatch

    def _decode_rows(self, microbatch: Microbatch) -> int:
        decoding = sum(bool(stream.tokens) for stream in self.live.values())
        sampled = set(microbatch.piece[microbatch.sampled.row].tolist())
        rows = 0
        for piece, sequence_id in enumerate(microbatch.sequence.tolist()):
            stream, first = self.live[sequence_id], int(microbatch.first[piece])
            if first == 0 and not stream.tokens and stream.arrival > self._last_started:
                waiting = [s.arrival for s in self.live.values() if s.sequence.phase is Phase.WAITING]
                assert stream.arrival < min(waiting, default=stream.arrival + 1), "overtaken"
                self._last_started = stream.arrival
            rows += stream.decodes and first > 0
            stream.decodes = piece in sampled
        assert rows <= max(1, -(-decoding // self.decode_groups)), f"{rows} decode rows of {decoding} in one group"
        return rows

    def deliver(self) -> list[Emitted]:
        """The oldest microbatch goes through the stages and comes back."""
        microbatch, _ = self.pipe.popleft()
        emitted = self.scheduler.update(self.fake.step(microbatch), now=0.0)
        for item in emitted:
            stream = self.live[item.sequence]
            assert item.offset == len(stream.tokens)
            if item.token is not None:
                assert item.log_probability == -item.token
                stream.tokens.append(item.token)
            if item.end is not None:
                stream.end = item.end
                del self.live[item.sequence]
        return emitted

    def restart(self) -> None:
        self.pipe.clear()
        self.scheduler.restart()
        self.fake = FakeStages(self.layout, self.fake.epoch + 1)
        self.step = 0

    def fill(self) -> None:
        while self.schedule() is not None:
            self.check()

    def run(self, deliveries: int = 100_000) -> int:
        """Until nothing is left; at most so many deliveries. Says how many."""
        for count in range(deliveries):
            self.fill()
            if not self.pipe:
                assert not self.live, f"nothing in flight, and {list(self.live)} are not done"
                self.check_done()
                return count
            self.deliver()
            self.check()
        raise AssertionError(f"{list(self.live)} are not done after {deliveries} deliveries")

    def check(self) -> None:
        """Account for blocks, queues and tokens."""
        scheduler = self.scheduler
        sequences = [stream.sequence for stream in self.live.values()]
        assert scheduler.in_flight == len(self.pipe)
        assert scheduler.waiting + scheduler.running == len(sequences)
        assert scheduler.outstanding_tokens == sum(s.uncomputed + s.remaining for s in sequences)
        for index, (used, total) in enumerate(zip(scheduler.used_blocks, scheduler.total_blocks, strict=True)):
            held = [block for s in sequences if s.rings for block in s.rings.blocks[index]]
            assert len(set(held)) == len(held) == used <= total

    def check_done(self) -> None:
        """Everyone got what was due, once, and nothing is left."""
        assert not any(self.scheduler.used_blocks)
        assert self.scheduler.outstanding_tokens == 0
        for stream in self.streams:
            tokens, end = stream.expected
            if stream.cancelled:
                assert stream.end is None
                assert stream.tokens == tokens[: len(stream.tokens)]
                continue
            assert (stream.tokens, stream.end) == (tokens, end)
            assert stream.sequence.completion == tokens
            if stream.sequence.score_prompt and end is not EndReason.NOT_FINITE:
                prompt = stream.sequence.tokens[: stream.sequence.prompt_tokens].tolist()
                assert stream.sequence.scores == expect_scores(prompt, self.layout.windows)
