"""What a stage promises to its worker: order of steps, epochs, buffers, which rows are sampled, who turns to NaN."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import Drive, greedy_rows, load_stages, make_layout
from models import cached_checkpoint, load_tensors, random_tensors, save_tensors
from reference_model import forward

from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.kv_pool import KVPool, OutOfOrder, StaleEpoch
from tramontane.stages.microbatch import ScoredRows, StepResult
from tramontane.stages.stage import Stage

PROMPT = torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(2)).tolist()
BROKEN_ID = 63
"""In `broken_folder` this token's embedding is NaN."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tensors(tmp_path_factory.mktemp("model"), random_tensors(EXAMPLE))


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    tensors = random_tensors(EXAMPLE)
    tensors["model.embed_tokens.weight"][BROKEN_ID] = float("nan")
    return save_tensors(tmp_path_factory.mktemp("broken"), tensors)


def drive(folder, split=(4,), **options):
    return Drive(load_stages(folder, EXAMPLE, split), make_layout(EXAMPLE, chunk=8, block=4, sequences=4), **options)


def test_a_result_has_one_entry_a_wanted_row(folder):
    driven = drive(folder, [2, 2])
    first, second = driven.sequence(PROMPT), driven.sequence(PROMPT[7:])
    scored = ScoredRows(row=np.array([0, 1, 4], np.int32), target=np.array(PROMPT[1:3] + PROMPT[5:6], np.int32))
    result = driven.step(driven.microbatch((first, 8), (second, 3), sampled=greedy_rows([10, 7]), scored=scored))
    logits = torch.cat(
        [forward(random_tensors(EXAMPLE), EXAMPLE, each)[:n] for each, n in ((PROMPT, 8), (PROMPT[7:], 3))]
    )
    expected = logits.log_softmax(-1)
    assert (result.epoch, result.step) == (1, 0)
    assert result.token.tolist() == [int(logits[10].argmax()), int(logits[7].argmax())]
    np.testing.assert_allclose(result.log_probability, expected[[10, 7]].amax(-1).numpy(), atol=1e-4)
    np.testing.assert_allclose(result.score, expected[scored.row.tolist(), scored.target.tolist()].numpy(), atol=1e-4)
    assert result.finite.all()


def test_nothing_wanted_nothing_answered(folder):
    driven = drive(folder)
    result = driven.step(driven.microbatch((driven.sequence(PROMPT), 8)))
    assert [len(each) for each in (result.token, result.log_probability, result.finite, result.score)] == [0] * 4


def test_ids_that_no_file_names_are_never_sampled_and_keep_their_probability(folder):
    logits = forward(random_tensors(EXAMPLE), EXAMPLE, PROMPT[:8])[-1]
    first, second, third = logits.argsort(descending=True)[:3].tolist()
    for sampleable, unnamed, expected in (
        (first, [], int(logits[:first].argmax())),
        (EXAMPLE.vocab, [first], second),
        (EXAMPLE.vocab, [first, second], third),
    ):
        stage = Stage.load(
            EXAMPLE,
            folder,
            range(4),
            dtype="float32",
            device="cpu",
            sampleable_ids=sampleable,
            unnamed_ids=unnamed,
        )
        driven = Drive([stage], make_layout(EXAMPLE, chunk=8, block=4))
        result = driven.step(driven.microbatch((driven.sequence(PROMPT), 8), sampled=greedy_rows([7])))
        assert result.token.tolist() == [expected]
        assert result.log_probability[0] == pytest.approx(float(logits.log_softmax(-1)[expected]), abs=1e-4)


def test_a_stage_reads_only_its_own_tensors(folder):
    first, last = load_stages(folder, EXAMPLE, [3, 1])
    assert (first.is_first, first.is_last, last.is_first, last.is_last) == (True, False, False, True)
    assert not first.digests.keys() & last.digests.keys()
    assert first.digests.keys() | last.digests.keys() == random_tensors(EXAMPLE).keys()
    assert "model.embed_tokens.weight" in first.digests
    assert {"model.norm.weight", "lm_head.weight"} < last.digests.keys()
    assert first.numerics == last.numerics


def test_a_repeated_or_skipped_step_is_refused_and_touches_nothing(folder):
    undisturbed = drive(folder).whole(PROMPT)
    driven = drive(folder)
    stage, sequence = driven.stages[0], driven.sequence(PROMPT)
    found = [driven.logits((sequence, 8))[0]]
    other = driven.sequence(PROMPT[::-1])
    other.rings = sequence.rings
    foreign = driven.microbatch((other, 8))
    for step in (0, 2, -1):
        with pytest.raises(OutOfOrder, match=f"step {step}; the next is 1"):
            stage.step(replace(foreign, step=step))
    driven.next_step = 1
    found += [driven.logits((sequence, 8))[0] for _ in range(4)]
    assert torch.equal(torch.cat(found), undisturbed)
    assert stage.epoch == 1


def test_a_stale_epoch_is_refused_and_touches_nothing(folder):
    stages = load_stages(folder, EXAMPLE)
    with pytest.raises(StaleEpoch, match="bound to no router"):
        stages[0].step(drive(folder).microbatch())
    layout = make_layout(EXAMPLE, chunk=8, block=4)
    old = Drive(stages, layout, epoch=3)
    late = old.microbatch((old.sequence(PROMPT[::-1]), 8))
    new = Drive(stages, layout, epoch=4)
    sequence = new.sequence(PROMPT)
    found = [new.logits((sequence, 8))[0]]
    with pytest.raises(StaleEpoch, match="epoch 3; the stage is bound at 4"):
        stages[0].step(replace(late, step=1))
    found += [new.logits((sequence, 8))[0] for _ in range(4)]
    assert torch.equal(torch.cat(found), drive(folder).whole(PROMPT))
    for epoch in (3, 4):
        with pytest.raises(ValueError, match=f"epoch is {epoch}; the stage was bound at 4"):
            stages[0].bind(epoch, layout, context=64, max_tokens=8)
    assert stages[0].epoch == 4


def test_a_microbatch_beyond_what_was_agreed_is_refused(folder):
    stages, layout = load_stages(folder, EXAMPLE), make_layout(EXAMPLE, chunk=8, block=4)
    driven = Drive(stages, layout)
    microbatch = driven.microbatch((driven.sequence(PROMPT), 8))
    stages[0].bind(2, layout, context=64, max_tokens=7)
    with pytest.raises(ValueError, match="8 tokens; the stage takes 1 to 7"):
        stages[0].step(replace(microbatch, epoch=2))
    stages[0].bind(3, layout, context=7, max_tokens=8)
    with pytest.raises(ValueError, match="position 7; the context is 7"):
        stages[0].step(replace(microbatch, epoch=3))


def test_rows_may_arrive_before_their_step(folder):
    """Three buffers are out at once, and rows sent stay valid while later steps run."""
    driven = drive(folder, [1, 3])
    first, last = driven.stages
    sequence = driven.sequence(PROMPT)
    microbatches = [driven.microbatch((sequence, size)) for size in (8, 3, 8)]
    sent = [first.step(microbatch) for microbatch in microbatches]
    for microbatch, rows in zip(microbatches, sent, strict=True):
        assert rows.nbytes == len(microbatch.tokens) * EXAMPLE.dim * 4
        last.inbox(len(microbatch.tokens))[:] = rows
    found = torch.cat([last.logits(last.forward(microbatch)) for microbatch in microbatches])
    expected = forward(random_tensors(EXAMPLE), EXAMPLE, PROMPT[:19])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lengths", [[1, 1], [4, 4], [9, -2], [7, 0]])
def test_pieces_that_are_not_the_rows_are_refused_before_anything_is_computed(folder, lengths):
    driven = drive(folder)
    whole = driven.microbatch((driven.sequence(PROMPT), 4), (driven.sequence(PROMPT), 3))
    with pytest.raises(ValueError, match=r"pieces of \[.*\] rows, and 7 tokens"):
        driven.stages[0].step(replace(whole, length=np.array(lengths, np.int32)))


def test_a_refused_step_lets_its_rows_go(folder):
    driven = drive(folder, [1, 3])
    first, last = driven.stages
    sequence = driven.sequence(PROMPT)
    found = []
    for _ in range(2):
        microbatch = driven.microbatch((sequence, 8))
        rows = first.step(microbatch)
        last.inbox(8)[:] = bytes(len(rows))
        with pytest.raises(StaleEpoch):
            last.step(replace(microbatch, epoch=9))
        last.inbox(8)[:] = rows
        found.append(last.logits(last.forward(microbatch)))
    assert torch.equal(torch.cat(found), drive(folder).whole(PROMPT[:16]))


def test_counters(folder):
    driven = drive(folder, [2, 2])
    sequence = driven.sequence(PROMPT)
    for size in (8, 1):
        driven.step(driven.microbatch((sequence, size), sampled=greedy_rows([0])))
    for stage in driven.stages:
        assert (stage.stats.steps, stage.stats.tokens) == (2, 9)
        assert stage.stats.busy_ns > 0


def test_a_request_that_turns_to_nan_ends_alone(broken_folder):
    """Its rows are reported, and its neighbours' bits are those of the same microbatches with a sound token."""

    def answers(token):
        driven = drive(broken_folder, poison=True)
        broken = driven.sequence([*PROMPT[:10], token, *PROMPT[11:30]])
        left, right = driven.sequence(PROMPT), driven.sequence(PROMPT[5:])
        prefill = driven.logits((left, 8), (broken, 8), (right, 3))
        for _ in range(2):
            prefill += driven.logits((left, 1), (broken, 6), (right, 1))
        decode = driven.logits((left, 1), (broken, 1), (right, 1))
        result = driven.step(driven.microbatch((left, 1), (broken, 1), (right, 1), sampled=greedy_rows([0, 1, 2])))
        return prefill + decode, result

    (sound, sound_result), (found, result) = answers(5), answers(BROKEN_ID)
    assert isinstance(result, StepResult)
    assert result.finite.tolist() == [True, False, True]
    assert sound_result.finite.all()
    for index, (each, expected) in enumerate(zip(found, sound, strict=True)):
        if index % 3 != 1:
            assert torch.equal(each, expected)
    assert result.token[[0, 2]].tolist() == sound_result.token[[0, 2]].tolist()
    assert found[-2].isnan().all()


def test_every_stage_clears_the_blocks_newly_taken(folder, monkeypatch):
    """No kernel set that reads exactly what was written would show it; one that reads whole blocks relies on it."""
    filled, fill = [], KVPool.fill

    def record(self, blocks, value=0.0):
        if len(blocks):
            filled.append((blocks.tolist(), value))
        fill(self, blocks, value)

    monkeypatch.setattr(KVPool, "fill", record)
    driven = drive(folder, [2, 2])
    sequence = driven.sequence(PROMPT)
    for size, blocks in ((8, 2), (1, 1), (1, 0)):
        filled.clear()
        microbatch = driven.microbatch((sequence, size))
        driven.step(microbatch)
        fresh = microbatch.tables[0].fresh.tolist()
        assert len(fresh) == blocks
        assert filled == ([(fresh, 0.0)] * 2 if fresh else [])


def test_blocks_of_a_broken_request_are_clean_for_the_next(broken_folder):
    driven = drive(broken_folder)
    broken = driven.sequence([BROKEN_ID] * 40)
    while broken.cached < 40:
        assert driven.logits((broken, 8))[0].isnan().all()
    driven.release(broken)
    found = [driven.whole(PROMPT) for _ in range(3)]
    assert all(torch.equal(each, drive(broken_folder).whole(PROMPT)) for each in found)


def test_perplexity_of_a_long_text():
    """Scored through the serving path, packed with another text, it is that of one plain forward pass."""
    path = cached_checkpoint("MixtralForCausalLM", sliding_window=9)
    config = ModelConfig.load(path)
    text = torch.randint(3, 99, (200,), generator=torch.Generator().manual_seed(8)).tolist()
    driven = Drive(load_stages(path, config, [1, 2]), make_layout(config, chunk=16, block=8, sequences=2), poison=True)
    sequence, other = driven.sequence(text), driven.sequence(text[::-1])
    scores = []
    while sequence.cached < len(text) - 1:
        size = min(16, len(text) - 1 - sequence.cached)
        target = text[sequence.cached + 1 : sequence.cached + 1 + size]
        scored = ScoredRows(row=np.arange(2, 2 + size, dtype=np.int32), target=np.array(target, np.int32))
        scores.append(driven.step(driven.microbatch((other, 2), (sequence, size), scored=scored)).score)
    log_softmax = forward(load_tensors(path), config, text).log_softmax(-1)
    expected = log_softmax[torch.arange(199), torch.tensor(text[1:])]
    np.testing.assert_allclose(np.concatenate(scores), expected.numpy(), atol=1e-4)
