"""The scheduler with a pipeline that one can compute by hand: one request exactly, and many sharing the pipe."""

from __future__ import annotations

import numpy as np
import pytest
from fake_stages import POISON, FakePipeline, expect_scores, layout_of, prompt_of

from tramontane.cluster.messages import EndReason, Sampling, Stopping, Submit
from tramontane.cluster.sequence import Sequence
from tramontane.stages.microbatch import StepResult

# One request


def test_one_sequence_microbatch_by_microbatch():
    """Window 8, chunk 4, block 4: a prompt of 6 in two chunks that are in flight together, then one decode token."""
    pipeline = FakePipeline(layout_of((8,)))
    stream = pipeline.add(5, [10, 11, 12, 13, 14, 15], max_tokens=2, seed=3)
    first, second = pipeline.schedule(), pipeline.schedule()
    assert pipeline.schedule() is None
    assert (first.tokens.tolist(), first.first.tolist(), first.length.tolist()) == ([10, 11, 12, 13], [0], [4])
    assert (first.tables[0].held.tolist(), len(first.tables[0].fresh), len(first.sampled.row)) == ([1], 1, 0)
    assert (second.tokens.tolist(), second.first.tolist(), second.length.tolist()) == ([14, 15], [4], [2])
    assert second.tables[0].blocks.tolist() == [first.tables[0].blocks[0], second.tables[0].fresh[0]]
    assert (second.sampled.row.tolist(), second.sampled.seed.tolist()) == ([1], [3])
    assert [pipeline.deliver(), pipeline.schedule()] == [[], None]
    (emitted,) = pipeline.deliver()
    assert (emitted.sequence, emitted.token, emitted.offset, emitted.end) == (5, stream.expected[0][0], 0, None)
    third = pipeline.schedule()
    assert (third.tokens.tolist(), third.first.tolist()) == ([emitted.token], [6])
    assert third.tables[0].fresh.tolist() == []
    (emitted,) = pipeline.deliver()
    assert (emitted.offset, emitted.end) == (1, EndReason.LENGTH)
    pipeline.run(deliveries=1)
    scheduler = pipeline.scheduler
    assert (scheduler.microbatches, scheduler.tokens) == (3, 7)
    assert (scheduler.prompt_tokens, scheduler.completion_tokens, scheduler.preemptions) == (6, 2, 0)


def test_sampled_rows_carry_what_was_asked():
    pipeline = FakePipeline(layout_of((None,)))
    submit = Submit(
        request=1,
        request_id="r",
        tokens=np.array([1, 2, 3], np.int32),
        sampling=Sampling(temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=2**64 - 1),
        stopping=Stopping(max_tokens=4, min_tokens=2, token_ids=(4, 9)),
        remaining_ms=None,
    )
    pipeline.scheduler.add(Sequence.from_submit(3, submit, now=0.0), now=0.0)
    sampled = pipeline.scheduler.schedule(1, 0, now=0.0).sampled
    asked = sampled.row, sampled.temperature, sampled.top_k, sampled.top_p, sampled.min_p, sampled.seed
    assert [column.tolist() for column in asked] == [[2], [0.5], [7], [0.75], [0.25], [2**64 - 1]]
    assert (sampled.banned.tolist(), sampled.banned_count.tolist()) == ([4, 9], [2])


def test_stop_ids_end_it_from_min_tokens_on():
    everything = tuple(range(15))
    for min_tokens in range(5):
        pipeline = FakePipeline(layout_of((8,)))
        stream = pipeline.add(0, prompt_of(5), max_tokens=30, min_tokens=min_tokens, token_ids=everything)
        pipeline.run()
        assert stream.end is EndReason.STOP_TOKEN
        assert stream.tokens[-1] in everything
        assert len(stream.tokens) > min_tokens
        assert not set(stream.tokens[:-1]) & set(everything)


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_request_that_turns_to_nan_ends_alone(place):
    pipeline = FakePipeline(layout_of((None,)))
    prompt = prompt_of(12)
    prompt[place] = POISON
    streams = [pipeline.add(0, prompt_of(9)), pipeline.add(1, prompt), pipeline.add(2, prompt_of(7))]
    pipeline.run()
    assert [(stream.end, len(stream.tokens)) for stream in streams] == [
        (EndReason.LENGTH, 8),
        (EndReason.NOT_FINITE, 0),
        (EndReason.LENGTH, 8),
    ]


def test_a_score_that_is_nan_ends_it_before_its_first_token():
    """The poison is out of the window when the first token is sampled; the scores have seen it."""
    pipeline = FakePipeline(layout_of((2,)))
    stream = pipeline.add(0, [POISON, *prompt_of(11)], score=True)
    stream.expected = [], EndReason.NOT_FINITE
    other = pipeline.add(1, prompt_of(11), score=True)
    pipeline.run()
    assert other.sequence.scores == expect_scores(prompt_of(11), (2,))


def test_every_prompt_token_is_scored_once_and_in_order():
    for chunk in (1, 3, 4, 20):
        pipeline = FakePipeline(layout_of((5, None), chunk=chunk))
        streams = [pipeline.add(index, prompt_of(length), 1, score=True) for index, length in enumerate((1, 9))]
        pipeline.run()
        assert [len(stream.sequence.scores) for stream in streams] == [0, 8]


# Many requests


def test_consecutive_chunks_fill_the_pipe():
    pipeline = FakePipeline(layout_of((8,)), stages=3)
    pipeline.add(0, prompt_of(40))
    pipeline.fill()
    assert [m.tokens.tolist() for m, _ in pipeline.pipe] == [prompt_of(40)[at : at + 4] for at in (0, 4, 8, 12)]


def test_prompts_that_have_the_pipe_for_themselves_are_shared_out_over_the_stages():
    pipeline = FakePipeline(layout_of((None,), chunk=256, context=512), stages=2, max_batch_tokens=1024, context=512)
    for index in range(4):
        pipeline.add(index, prompt_of(150))
    pipeline.fill()
    assert [len(m.tokens) for m, _ in pipeline.pipe] == [300, 300]


def test_prefill_is_spread_thinner_where_others_decode():
    pipeline = FakePipeline(layout_of((None,), chunk=256, context=512), stages=2, max_batch_tokens=1024, context=512)
    pipeline.add(0, [1], max_tokens=40)
    pipeline.fill()
    pipeline.deliver()
    for index in range(4):
        pipeline.add(1 + index, prompt_of(150))
    pipeline.fill()
    assert [len(m.tokens) for m, _ in pipeline.pipe] == [1 + 150, 150, 150]


def test_a_huge_prompt_neither_starves_decode_nor_is_starved():
    context = 2048
    layout = layout_of((16,), chunk=8, context=context, pool=40)
    pipeline = FakePipeline(layout, stages=2, max_batch_tokens=8, context=context)
    decoders = [pipeline.add(index, [index], max_tokens=400) for index in range(14)]
    for _ in range(40):
        pipeline.fill()
        pipeline.deliver()
    huge = pipeline.add(99, prompt_of(600))
    before = [len(stream.tokens) for stream in decoders]
    rounds = 0
    while not huge.tokens:
        pipeline.fill()
        pipeline.deliver()
        rounds += 1
    gained = [len(stream.tokens) - count for stream, count in zip(decoders, before, strict=True)]
    assert rounds < 3 * 150  # a round of three microbatches has at least one row free in each group, and one for itself
    assert min(gained) > rounds // 4
    assert max(gained) - min(gained) <= 1
    pipeline.run()


@pytest.mark.parametrize(("stages", "groups"), [(1, 1), (2, 2), (3, 3), (4, 4), (1, 2), (2, 4), (3, 2)])
@pytest.mark.parametrize("burst", [1, 3, 10, 23])
def test_decode_groups_are_even_two_rounds_after_a_burst(stages, groups, burst):
    pipeline = FakePipeline(layout_of((8,), pool=30), stages=stages, max_batch_tokens=64, decode_groups=groups)
    for index in range(burst):
        pipeline.add(index, prompt_of(1 + index % 5), max_tokens=40)
    while any(not stream.tokens for stream in pipeline.streams):
        pipeline.fill()
        pipeline.deliver()
    settled = len(pipeline.groups) + 2 * groups
    while len(pipeline.groups) < settled + 4 * groups:
        pipeline.fill()
        pipeline.deliver()
    rows = pipeline.groups[settled:]
    assert max(rows) - min(rows) <= 1
    for at in range(len(rows) - groups):
        assert sum(rows[at : at + groups]) == max(burst, groups if burst >= groups else sum(rows[:groups]))


@pytest.mark.parametrize(("stages", "groups", "count"), [(2, 1, 8), (4, 3, 16), (4, 1, 16), (1, 3, 20)])
def test_a_crowd_never_overfills_a_group(stages, groups, count):
    pipeline = FakePipeline(layout_of((8,), pool=80), stages=stages, max_batch_tokens=4, decode_groups=groups)
    for index in range(count):
        pipeline.add(index, [index], max_tokens=10)
    pipeline.run()


def test_a_burst_joins_the_groups_that_are_there():
    pipeline = FakePipeline(layout_of((8,), pool=40), stages=4, max_batch_tokens=64)
    for index in range(12):
        pipeline.add(index, [index], max_tokens=40)
    for _ in range(20):
        pipeline.fill()
        pipeline.deliver()
    assert set(pipeline.groups[-4:]) == {3}
    for index in range(20, 33):
        pipeline.add(index, [1], max_tokens=40)
    while any(not stream.tokens for stream in pipeline.streams):
        pipeline.fill()
        pipeline.deliver()
    for _ in range(16):
        pipeline.fill()
        pipeline.deliver()
    assert sorted(pipeline.groups[-4:]) == [6, 6, 6, 7]


def test_a_token_is_sent_only_when_the_one_before_is_back():
    pipeline = FakePipeline(layout_of((8,)), stages=3)
    stream = pipeline.add(0, [1, 2], max_tokens=5)
    pipeline.fill()
    assert len(pipeline.pipe) == 1
    pipeline.deliver()
    pipeline.fill()
    assert len(pipeline.pipe) == 1
    assert len(stream.tokens) == 1


def test_no_more_than_stages_plus_one_microbatches():
    for stages in (1, 2, 4):
        pipeline = FakePipeline(layout_of((8,)), stages=stages)
        pipeline.add(0, prompt_of(50))
        while pipeline.schedule() is not None:
            pass
        assert pipeline.scheduler.in_flight == stages + 1
        pipeline.run()


def test_results_must_come_in_order():
    pipeline = FakePipeline(layout_of((8,)))
    empty = np.empty(0, np.float32)
    result = StepResult(
        epoch=1,
        step=1,
        token=np.empty(0, np.int32),
        log_probability=empty,
        finite=np.empty(0, np.bool_),
        score=empty,
    )
    with pytest.raises(AssertionError, match="nothing is in flight"):
        pipeline.scheduler.update(result, now=0.0)
    pipeline.add(0, prompt_of(20))
    pipeline.fill()
    with pytest.raises(AssertionError, match="due is 1, 0"):
        pipeline.scheduler.update(result, now=0.0)
