"""The scheduler under any order of events: streams exact, nothing leaked, nobody starved, every budget kept."""

from __future__ import annotations

from fake_stages import POISON, VOCAB, FakePipeline
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tramontane.cluster.scheduler import QueueFull
from tramontane.stages.kv_layout import KVLayout, ring_blocks

MAX_WAITING = 5


class Pipeline(RuleBasedStateMachine):
    """Requests come and go, microbatches leave and come back, in any order that the pipe allows."""

    @initialize(
        windows=st.sampled_from([(None,), (1,), (3,), (5, None), (2, 7), (4, None, 9)]),
        stages=st.integers(1, 4),
        chunk=st.integers(1, 6),
        block=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        extra=st.integers(0, 12),
    )
    def bind(self, windows, stages, chunk, block, max_batch_tokens, extra):
        rings = tuple(ring_blocks(window, chunk, block, 32) for window in windows)
        pools = tuple(ring + extra for ring in rings)
        layout = KVLayout(block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=pools)
        self.pipeline = FakePipeline(
            layout, stages=stages, max_batch_tokens=max_batch_tokens, max_waiting=MAX_WAITING, context=32
        )
        self.next_id = 0

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 2), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 6),
        stop_ids=st.lists(st.integers(0, VOCAB - 2), max_size=8),
        seed=st.integers(0, 2**64 - 1),
        score=st.booleans(),
        poison=st.sampled_from([False] * 9 + [True]),
        old_id=st.booleans(),
    )
    def add(self, prompt, max_tokens, min_tokens, stop_ids, seed, score, poison, old_id):
        gone = [s.sequence.id for s in self.pipeline.streams if s.sequence.id not in self.pipeline.live]
        sequence_id = gone[-1] if old_id and gone else self.next_id
        self.next_id += 1
        options = {"min_tokens": min_tokens, "stop_ids": stop_ids, "seed": seed, "score_prompt": score}
        newcomers = sum(s.sequence.incarnation == s.sequence.computed == 0 for s in self.pipeline.live.values())
        try:
            self.pipeline.add(sequence_id, [*prompt[:-1], POISON] if poison else prompt, max_tokens, **options)
        except QueueFull:
            assert newcomers >= MAX_WAITING

    @precondition(lambda self: self.pipeline.live)
    @rule(data=st.data())
    def cancel(self, data):
        self.pipeline.cancel(data.draw(st.sampled_from(sorted(self.pipeline.live))))
        self.pipeline.check()

    @rule()
    def schedule(self):
        self.pipeline.schedule()
        self.pipeline.check()

    @rule()
    def fill(self):
        self.pipeline.fill()

    @precondition(lambda self: self.pipeline.pipe)
    @rule()
    def deliver(self):
        self.pipeline.deliver()
        self.pipeline.check()

    @rule(rounds=st.integers(1, 8))
    def turn(self, rounds):
        for _ in range(rounds):
            self.pipeline.fill()
            if self.pipeline.pipe:
                self.pipeline.deliver()

    @precondition(lambda self: self.pipeline.streams)
    @rule(dice=st.integers(0, 4))
    def restart(self, dice):
        if dice == 0:
            self.pipeline.restart()
            self.pipeline.check()

    def teardown(self):
        if hasattr(self, "pipeline"):
            longest = max(
                (len(s.sequence.tokens) + s.sequence.remaining for s in self.pipeline.live.values()), default=0
            )
            # Even if each had the pipe for itself, one token a microbatch.
            self.pipeline.run(deliveries=10 + 2 * longest * len(self.pipeline.live))


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
