"""Native products in 8 bits: what is rounded, in groups of 32, and that no variant rounds otherwise."""

from dataclasses import replace

import pytest
import torch
from kernel_sets import FACTS, native, needs_native
from test_kernels import random_layer

from tramontane.stages.config import EXAMPLE
from tramontane.stages.kernels.native import NativeKernels
from tramontane.stages.variants import Variants

pytestmark = needs_native


def in_groups(values, *, float16_scales):
    """Whole numbers of -127 .. 127 for each 32 values of a row, and a scale. [rows, groups, 32], [rows, groups, 1]"""
    groups = torch.nn.functional.pad(values, (0, -values.shape[1] % 32)).unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    if float16_scales:  # of an output's largest, and never below the true one
        unit = torch.exp2(torch.floor(torch.log2(scale.amax(1, keepdim=True))))
        half = (scale / unit).half()
        less = half.float() < scale / unit
        scale = torch.where(less, torch.nextafter(half, torch.tensor(9, dtype=torch.half)), half).float() * unit
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (groups * inverse).round(), scale


@pytest.mark.parametrize("inputs", [1, 3, 32, 64, 301])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_int8_is_the_product_of_the_rounded_numbers(inputs, rows):
    """Both sides are quantised in groups, sums in a group are exact, and sums over groups go in order."""
    config = replace(EXAMPLE, vocab=70, dim=inputs)
    generator = torch.Generator().manual_seed(3)
    norm, head = torch.ones(inputs), torch.randn(70, inputs, generator=generator)
    head[0] = head[0].abs().amax()  # all at the limit, where pairs of products are largest
    head[1:40] *= 10.0 ** torch.arange(-19, 20)[:, None]  # outputs of any size, whose scales are float16
    head[40, ::2] *= 1e-6
    hidden = torch.randn(rows, inputs, generator=generator)
    hidden[0] = hidden[0].abs().amax()
    kernels = native(config, "float32", "int8")
    found = kernels.head(kernels.pack_head(norm, head), hidden)
    normed = torch.nn.functional.rms_norm(hidden, (inputs,), norm, config.norm_eps)
    (row_numbers, row_scale), (numbers, scale) = (
        in_groups(values, float16_scales=is_weight) for values, is_weight in ((normed, False), (head, True))
    )
    sums = torch.einsum("rgi,ogi->rog", row_numbers.double(), numbers.double())
    expected = (sums * row_scale.double().mT * scale.double()[..., 0]).sum(-1)
    # A row's own number may turn at a tie: one step of one input.
    step = (row_scale.double() * head.abs().double().max(1).values).amax(1)
    assert ((found.double() - expected).abs() <= 1e-5 * expected.abs() + 1.01 * step).all()
    exact = torch.isclose(found.double(), expected, rtol=2e-5, atol=0)
    assert exact.float().mean() > 0.9


@pytest.mark.parametrize("rows", [1, 20])
def test_products_in_8_bits_have_the_same_bits_in_every_variant(rows):
    """Sums in a group are exact, sums over groups go in order; and so is the norm of rows of 1 and -1."""
    config = replace(EXAMPLE, vocab=100, dim=500)
    generator = torch.Generator().manual_seed(3)
    norm, head = torch.randn(500, generator=generator), torch.randn(100, 500, generator=generator)
    hidden = torch.randint(2, (rows, 500), generator=generator).float() * 2 - 1
    found = []
    for name in FACTS.variants("bfloat16"):
        kernels = NativeKernels(config, "float32", "int8", Variants.alike(name))
        found.append(kernels.head(kernels.pack_head(norm, head), hidden))
    assert all(torch.equal(each, found[0]) for each in found)


def test_int8_halves_the_weights():
    config = replace(EXAMPLE, dim=256, ffn_dim=256)

    def size(quantize):
        _, *matrices = native(config, "bfloat16", quantize).pack_layer(random_layer(config, "bfloat16")).kept
        qkv, o, _, gate_up, down = matrices
        return sum(each.memory.nbytes for each in (qkv, o, *gate_up, *down))

    assert size("int8") < 0.54 * size(None)
