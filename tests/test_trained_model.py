"""The embedded model by two roads, on text that is longer than its window: its logits are larger and its routing more
decided than those of random weights.

The reference is `reference_model.forward`. In float32 logits agree within 1e-4 (measured: 1.8e-5, of logits up to 18).
"""

from __future__ import annotations

import pytest
import torch
from driving import Drive, load_stages, make_layout
from kernel_sets import KERNELS
from models import load_tensors
from reference_model import forward, greedy

from tramontane.cluster.tokenizer import Tokenizer
from tramontane.deploy.demo import VERSE
from tramontane.stages.config import ModelConfig

LENGTH = 200


class Trained:
    """Loads each split once; every drive binds it anew."""

    def __init__(self, folder) -> None:
        self.folder, self.config, self.tensors = folder, ModelConfig.load(folder), load_tensors(folder)
        self.prompt = Tokenizer.load(folder, self.config).encode(VERSE * 3, add_bos=True)[:LENGTH]
        assert len(self.prompt) == LENGTH > self.config.smallest_window
        self.expected = self.logits(self.prompt)
        self._stages = {}

    def logits(self, tokens):
        return forward(self.tensors, self.config, tokens)

    def drive(self, *, split=(8,), kernels="cpu", chunk=64, block=16):
        key = tuple(split), kernels
        if key not in self._stages:
            self._stages[key] = load_stages(self.folder, self.config, split, kernels=kernels)
        stages = self._stages[key]
        layout = make_layout(self.config, chunk=chunk, block=block, sequences=4)
        return Drive(stages, layout, epoch=stages[0].epoch + 1, poison=True)


@pytest.fixture(scope="module")
def model(embedded_dir):
    return Trained(embedded_dir)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("chunk", "block"), [(7, 5), (32, 16), (128, 32), (LENGTH, 16)])
def test_chunked_equals_whole(model, kernels, chunk, block):
    close(model.drive(kernels=kernels, chunk=chunk, block=block).whole(model.prompt), model.expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_token_by_token_equals_one_pass(model, kernels):
    drive = model.drive(kernels=kernels, chunk=LENGTH)
    one_pass = drive.whole(model.prompt)
    close(drive.whole(model.prompt, chunk=1), one_pass)


@pytest.mark.parametrize("kernels", KERNELS)
def test_packed_equals_alone(model, kernels):
    """Long and short ones, chunks and decode tokens in one microbatch, each of them at another place."""
    prompts = [model.prompt, model.prompt[90:], model.prompt[40:45], model.prompt[::-1]]
    drive = model.drive(kernels=kernels)
    for prompt, logits in zip(prompts, drive.packed(prompts, sizes=[64, 1, 33, 20]), strict=True):
        close(logits, model.logits(prompt))


@pytest.mark.parametrize("split", [[4, 4], [2, 2, 2, 2], [1] * 8], ids=lambda split: f"{len(split)} stages")
@pytest.mark.parametrize("kernels", KERNELS)
def test_many_stages_give_the_bits_of_one(model, kernels, split):
    one, many = model.drive(kernels=kernels), model.drive(kernels=kernels, split=split)
    assert torch.equal(many.whole(model.prompt), one.whole(model.prompt))


@pytest.mark.parametrize("kernels", KERNELS)
def test_greedy_ids(model, kernels):
    prompt = model.prompt[:150]
    assert model.drive(kernels=kernels).greedy(prompt, 8) == greedy(model.tensors, model.config, prompt, 8)
