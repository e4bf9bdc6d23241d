"""The same logits by two roads: packed and alone, chunked and whole, one stage and many, rolling ring and full cache.

The full-cache reference is `reference_model.forward`: one whole sequence, dense masks, no cache. In float32 logits of
unit scale agree within 1e-4 (measured: 6e-6), and greedy ids are equal.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import Drive, load_stages, make_layout
from kernel_sets import KERNELS, NATIVE
from models import cached_checkpoint, load_tensors, random_tensors, save_tensors
from reference_model import forward, greedy

from tramontane.stages.config import EXAMPLE, ModelConfig

PROMPT = torch.randint(3, 64, (90,), generator=torch.Generator().manual_seed(5)).tolist()
# Windows: none; shorter than a block, no multiple of chunk or block; equal; different per layer, none among them.
MODELS = {
    "full": replace(EXAMPLE, windows=(None,) * 3, context=128),
    "dense": replace(EXAMPLE, windows=(7,) * 3, experts=0, context=128, kv_heads=1),
    "tied": replace(EXAMPLE, windows=(13,) * 3, experts=3, experts_per_token=1, context=128, kv_heads=4, tied=True),
    "mixed": replace(EXAMPLE, windows=(5, None, 11, 5), experts=5, experts_per_token=3, context=128),
    "deep": replace(EXAMPLE, windows=(9,) * 8, context=128),
}


class Model:
    def __init__(self, config, folder, tensors):
        self.config, self.folder, self.tensors = config, folder, tensors

    def drive(self, *, split=(), kernels=None, chunk=8, block=4, dtype="float32", sequences=4, poison=True):
        stages = load_stages(self.folder, self.config, split, dtype=dtype, kernels=kernels)
        return Drive(stages, make_layout(self.config, chunk=chunk, block=block, sequences=sequences), poison=poison)

    def expected(self, tokens):
        return forward(self.tensors, self.config, tokens)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}
    for name, config in MODELS.items():
        tensors = random_tensors(config)
        made[name] = Model(config, save_tensors(tmp_path_factory.mktemp(name), tensors), tensors)
    for architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        folder = cached_checkpoint(architecture, sliding_window=10)
        made[architecture] = Model(ModelConfig.load(folder), folder, load_tensors(folder))
    return made


@pytest.fixture(params=[*MODELS, "MistralForCausalLM", "MixtralForCausalLM"])
def model(models, request):
    return models[request.param]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_rolling_ring_equals_a_full_cache(model, kernels):
    """A prompt many times longer than the windows, in chunks that fit neither window nor block."""
    expected = model.expected(PROMPT)
    assert 0.3 < expected.std() < 3
    close(model.drive(kernels=kernels).whole(PROMPT), expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("chunk", "block"), [(1, 3), (2, 1), (5, 3), (16, 16), (33, 8), (90, 5)])
def test_any_chunk_and_block_equal_the_whole(models, kernels, chunk, block):
    model = models["mixed"]
    close(model.drive(kernels=kernels, chunk=chunk, block=block).whole(PROMPT), model.expected(PROMPT))


@pytest.mark.parametrize("kernels", KERNELS)
def test_token_by_token_equals_one_pass(model, kernels):
    drive = model.drive(kernels=kernels, chunk=len(PROMPT))
    close(drive.whole(PROMPT, chunk=1), drive.whole(PROMPT))


@pytest.mark.parametrize("kernels", [NATIVE, "cpu"])
@pytest.mark.parametrize("window", range(1, 8))
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_small_rings(tmp_path, kernels, window, block):
    config = replace(EXAMPLE, windows=(window,) * 2, experts=0, context=48)
    tensors = random_tensors(config)
    stages = load_stages(save_tensors(tmp_path, tensors), config, kernels=kernels)
    expected = forward(tensors, config, PROMPT[:40])
    for epoch, chunk in enumerate(range(1, 8), start=1):
        drive = Drive(stages, make_layout(config, chunk=chunk, block=block), epoch=epoch, poison=True)
        close(drive.whole(PROMPT[:40]), expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_equals_alone(model, kernels):
    """Four sequences of different lengths and phases, chunks and decode tokens in one microbatch."""
    prompts = [PROMPT[:70], PROMPT[20:23], PROMPT[5:40], PROMPT[60:90]]
    drive = model.drive(kernels=kernels)
    for prompt, logits in zip(prompts, drive.packed(prompts, sizes=[8, 1, 5, 3]), strict=True):
        close(logits, model.expected(prompt))


@pytest.mark.parametrize("kernels", KERNELS)
def test_decode_of_long_and_short_sequences_together(tmp_path, kernels):
    """Full attention over more places than one decode job has, beside a sequence of a few tokens."""
    config = replace(EXAMPLE, windows=(None, 300), experts=0, context=700)
    tensors = random_tensors(config)
    folder = save_tensors(tmp_path, tensors)
    stages = load_stages(folder, config, kernels=kernels)
    drive = Drive(stages, make_layout(config, chunk=256, block=16, sequences=3), poison=True)
    prompts = [(PROMPT * 8)[:600], PROMPT[:4], (PROMPT[::-1] * 4)[:258]]
    sequences = [drive.sequence(prompt) for prompt in prompts]
    for sequence in sequences:
        while sequence.cached < len(sequence.tokens) - 2:
            drive.logits((sequence, min(256, len(sequence.tokens) - 2 - sequence.cached)))
    for behind in (2, 1):
        for prompt, logits in zip(prompts, drive.logits(*[(each, 1) for each in sequences]), strict=True):
            close(logits[0], forward(tensors, config, prompt)[-behind])


@pytest.mark.parametrize("split", [[4, 4], [3, 1, 2, 2], [1] * 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_many_stages_give_the_bits_of_one(models, kernels, split, dtype):
    def whole(split):
        return models["deep"].drive(split=split, dtype=dtype, kernels=kernels).whole(PROMPT)

    assert torch.equal(whole(split), whole([8]))


@pytest.mark.parametrize("kernels", KERNELS)
def test_stages_of_different_windows(models, kernels):
    """Stages that have no layer of some window class."""
    model = models["mixed"]
    one, many = model.drive(kernels=kernels), model.drive(kernels=kernels, split=[1, 1, 2])
    assert torch.equal(many.whole(PROMPT), one.whole(PROMPT))


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_ids(model, kernels):
    prompt = PROMPT[:30]
    assert model.drive(kernels=kernels).greedy(prompt, 12) == greedy(model.tensors, model.config, prompt, 12)


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_is_close_to_float32(model, kernels):
    """8 bits of mantissa through some layers, and a token whose routing turns: so on the average, not at the worst."""
    expected = model.expected(PROMPT)
    difference = (model.drive(kernels=kernels, dtype="bfloat16").whole(PROMPT) - expected).abs()
    assert difference.median() < 0.03 * expected.std()


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_packed_equals_alone(models, kernels):
    """Both roads round at the same places; what is left is the order of sums before a rounding."""
    model = models["dense"]
    drive = model.drive(dtype="bfloat16", kernels=kernels)
    alone = drive.whole(PROMPT[:24])
    first, second = drive.sequence(PROMPT[:24]), drive.sequence(PROMPT[40:64])
    packed = torch.cat([drive.logits((second, 8), (first, 8))[1] for _ in range(3)])
    assert (packed - alone).abs().median() < 0.01


@pytest.mark.parametrize("kernels", KERNELS)
def test_freed_and_foreign_blocks_change_no_bit(models, kernels):
    """Every block that nobody holds, and every one newly taken, is full of NaN before each microbatch."""

    def logits(poison):
        drive = models["mixed"].drive(kernels=kernels, poison=poison, sequences=2)
        first = drive.whole(PROMPT[:50])
        return torch.cat([first, drive.whole(PROMPT[30:]), drive.whole(PROMPT, chunk=1)])

    clean = logits(poison=False)
    assert clean.isfinite().all()
    assert torch.equal(logits(poison=True), clean)


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_poison_is_real(models, kernels):
    """NaN in a place that is read does come through; so what the tests above do not see was not read."""
    drive = models["full"].drive(kernels=kernels)
    sequence = drive.sequence(PROMPT)
    drive.logits((sequence, 5))
    held = np.array(sequence.rings[0][:1], np.int32)
    drive.stages[0].pools[0].fill(held, float("nan"))
    assert drive.logits((sequence, 1))[0].isnan().all()
