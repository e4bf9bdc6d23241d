"""The CUDA kernel set on a GPU, through whole stages, beside the dumb reference; on the CPU see `test_kernels.py`."""

from dataclasses import replace

import pytest
import torch
from driving import Drive, load_stages, make_layout
from kernel_sets import NEEDS_GPU
from models import random_tensors, save_tensors
from reference_model import forward, greedy

from tramontane.stages.config import EXAMPLE

pytestmark = NEEDS_GPU
SHAPES = {
    "sparse": EXAMPLE,
    "windows by layer": replace(EXAMPLE, windows=(8, None, 5, 8)),
    "dense": replace(EXAMPLE, experts=0, heads=6, kv_heads=3, head_dim=16, windows=(5,) * EXAMPLE.layers),
    "top-3, one KV head": replace(
        EXAMPLE, experts=6, experts_per_token=3, kv_heads=1, windows=(None,) * EXAMPLE.layers
    ),
}
PROMPTS = [list(range(3, 43)), [7], list(range(50, 30, -1))]


@pytest.fixture(params=SHAPES)
def model(request, tmp_path):
    config = SHAPES[request.param]
    tensors = random_tensors(config)
    return config, tensors, save_tensors(tmp_path, tensors)


def drive(model, dtype, split=(), chunk=8):
    config, _, folder = model
    stages = load_stages(folder, config, split, dtype=dtype, device="cuda")
    return Drive(stages, make_layout(config, chunk=chunk, block=4, sequences=4), poison=True)


@pytest.mark.parametrize("split", [(), (1, 3)])
def test_float32_logits_are_the_dumb_references(model, split):
    config, tensors, _ = model
    on_gpu = drive(model, "float32", split)
    for prompt, found in zip(PROMPTS, on_gpu.packed(PROMPTS, sizes=(8, 1, 5)), strict=True):
        torch.testing.assert_close(found.cpu(), forward(tensors, config, prompt), rtol=0, atol=1e-3)
    assert on_gpu.greedy(PROMPTS[2], 8) == greedy(tensors, config, PROMPTS[2], 8)


@pytest.mark.parametrize("split", [(), (1, 3)])
def test_bfloat16_logits_are_near_the_dumb_references(model, split):
    """As near as bfloat16 on the CPU; a token whose gate is nearly a tie may turn to another expert."""
    config, tensors, folder = model
    on_cpu = Drive(
        load_stages(folder, config, dtype="bfloat16", kernels="reference"),
        make_layout(config, chunk=8, block=4, sequences=3),
    )
    on_gpu = drive(model, "bfloat16", split).packed(PROMPTS, sizes=(8, 1, 5))
    for prompt, found, other in zip(PROMPTS, on_gpu, on_cpu.packed(PROMPTS, sizes=(8, 1, 5)), strict=True):
        exact = forward(tensors, config, prompt)
        error, others = (found.cpu() - exact).abs().median(), (other - exact).abs().median()
        assert error < 2 * others + 0.01, f"{error} beside {others} of the reference set"


def test_chunks_and_company_change_bfloat16_by_rounding_only(model):
    on_gpu = drive(model, "bfloat16", chunk=16)
    whole = on_gpu.whole(PROMPTS[0], chunk=16)
    for found in (on_gpu.whole(PROMPTS[0], chunk=5), on_gpu.packed(PROMPTS, sizes=(3, 1, 16))[0]):
        assert (found - whole).abs().median() < 0.02 * whole.std()
