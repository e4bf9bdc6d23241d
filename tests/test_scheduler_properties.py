"""The scheduler under any order of events: streams exact, nothing leaked, nobody starved, every budget kept."""

from __future__ import annotations

import random

import pytest
from fake_stages import POISON, VOCAB, FakePipeline
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tramontane.cluster.admission import Refused
from tramontane.cluster.step_cost import StepCost
from tramontane.stages.kv_layout import KVLayout, ring_blocks

CONTEXT = 32
MAX_WAITING = 5


SECONDS = st.floats(0, 10, allow_subnormal=False)
COSTS = st.builds(StepCost, base_s=SECONDS, decode_row_s=SECONDS, prompt_row_s=SECONDS, key_s=SECONDS)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_queue_wait_s": st.sampled_from([0.0, 0.001, 5.0]),
        "max_running": st.integers(1, 9),
        "max_step_s": st.floats(1e-6, 5),
    },
)
"""Whatever steps are believed to cost, and whatever an operator asks for, nobody who was admitted waits for ever."""


class Pipeline(RuleBasedStateMachine):
    """Requests come and go, microbatches leave and come back, in any order that the pipe allows."""

    @initialize(
        windows=st.sampled_from([(None,), (None,), (1,), (3,), (5, None), (2, 7), (4, None, 9)]),
        stages=st.integers(1, 4),
        chunk=st.integers(1, 6),
        block=st.integers(1, 4),
        max_batch_tokens=st.integers(1, 12),
        extra=st.integers(0, 4),
        careless=st.booleans(),
        decode_groups=st.none() | st.integers(1, 6),
        cost=st.none() | COSTS,
        limits=LIMITS,
    )
    def bind(self, windows, stages, chunk, block, max_batch_tokens, extra, careless, decode_groups, cost, limits):
        rings = tuple(ring_blocks(window, chunk, block, CONTEXT) for window in windows)
        pools = tuple(ring + extra for ring in rings)
        layout = KVLayout(block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=pools)
        self.pipeline = FakePipeline(
            layout,
            stages=stages,
            max_batch_tokens=max_batch_tokens,
            max_waiting=MAX_WAITING,
            context=CONTEXT,
            decode_groups=decode_groups,
            cost=cost,
            **limits,
        )
        self.pipeline.careless = careless
        self.next_id = 0

    @rule(
        requests=st.lists(
            st.fixed_dictionaries(
                {
                    "length": st.integers(1, 12),
                    "max_tokens": st.sampled_from([1, 2, 5, 12, 20, 20]),
                    "min_tokens": st.sampled_from([0, 3, 20]),
                    "token_ids": st.lists(st.integers(0, VOCAB - 2), max_size=2).map(tuple),
                    "seed": st.integers(0, 2**64 - 1),
                    "score": st.booleans(),
                }
            ),
            min_size=1,
            max_size=5,
        ),
        poison=st.integers(0, 9),
        old_id=st.booleans(),
    )
    def add(self, requests, poison, old_id):
        for index, request in enumerate(requests):
            self._add(poison=index == poison, old_id=old_id, **request)

    def _add(self, length, poison, old_id, seed, **options):
        gone = [s.sequence.id for s in self.pipeline.streams if s.sequence.id not in self.pipeline.live]
        sequence_id = gone[-1] if old_id and gone else self.next_id
        self.next_id += 1
        prompt = [(seed + index) % POISON for index in range(length - 1)] + [POISON if poison else seed % POISON]
        newcomers = sum(s.sequence.incarnation == s.sequence.computed == 0 for s in self.pipeline.live.values())
        try:
            self.pipeline.add(sequence_id, prompt, seed=seed, **options)
        except Refused:
            assert newcomers >= MAX_WAITING

    @precondition(lambda self: len(self.pipeline.live) > 2)
    @rule(data=st.data())
    def cancel(self, data):
        self.pipeline.cancel(data.draw(st.sampled_from(sorted(self.pipeline.live))))
        self.pipeline.check()

    @rule()
    def schedule(self):
        self.pipeline.schedule()
        self.pipeline.check()

    @precondition(lambda self: self.pipeline.pipe)
    @rule()
    def deliver(self):
        self.pipeline.deliver()
        self.pipeline.check()

    @precondition(lambda self: self.pipeline.live)
    @rule(rounds=st.integers(1, 12))
    def turn(self, rounds):
        for _ in range(rounds):
            self.pipeline.fill()
            if self.pipeline.pipe:
                self.pipeline.deliver()
                self.pipeline.check()

    @precondition(lambda self: self.pipeline.live)
    @rule(dice=st.integers(0, 4))
    def restart(self, dice):
        if dice == 4:
            self.pipeline.restart()
            self.pipeline.check()

    def teardown(self):
        if hasattr(self, "pipeline"):
            # As if each had the pipe for itself, with one token a microbatch.
            self.pipeline.run(deliveries=10 + CONTEXT * len(self.pipeline.live))


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_heavy_traffic_in_pools_that_are_much_too_small(stages):
    """Rarer meetings of events than hypothesis finds: thirty requests at a time, preempted again and again."""
    preemptions = 0
    for seed in range(4):
        dice = random.Random(seed)
        windows = dice.choice([(None,), (5, None), (9,), (None, 3)])
        chunk, block = dice.randint(1, 6), dice.randint(1, 4)
        rings = tuple(ring_blocks(window, chunk, block, CONTEXT) for window in windows)
        pools = tuple(ring + dice.randint(0, ring) for ring in rings)
        layout = KVLayout(block=block, chunk=chunk, windows=windows, rings=rings, pool_blocks=pools)
        pipeline = FakePipeline(
            layout, stages=stages, max_batch_tokens=dice.randint(2, 16), max_waiting=99, context=CONTEXT
        )
        pipeline.careless = dice.random() < 0.8
        for index in range(30):
            prompt = [dice.randrange(POISON) for _ in range(dice.randint(1, 12))]
            pipeline.add(index, prompt, dice.choice([1, 5, 20]), seed=seed, score=dice.random() < 0.3)
        while pipeline.live:
            for _ in range(dice.randint(0, stages + 1)):
                pipeline.schedule()
                pipeline.check()
            if pipeline.pipe:
                pipeline.deliver()
                pipeline.check()
            if dice.random() < 0.05:
                pipeline.cancel(dice.choice(sorted(pipeline.live)))
            gone = [s.sequence.id for s in pipeline.streams if s.sequence.id not in pipeline.live]
            if gone and dice.random() < 0.1 and len(pipeline.streams) < 60:
                pipeline.add(gone[-1], [dice.randrange(POISON)] * 3, 20)
            if dice.random() < 0.02:
                pipeline.restart()
        pipeline.run()
        preemptions += pipeline.scheduler.preemptions
    assert preemptions > 25, "this traffic would show little"
