"""Kernel sets agree block by block with the reference set, and keep the promises that the stages do not show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from driving import Drive, load_stages, make_layout
from kernel_sets import KERNELS, NATIVE, NEEDS_GPU
from models import random_tensors, save_tensors

from tramontane.stages.config import EXAMPLE
from tramontane.stages.kernels import choose_kernels, products
from tramontane.stages.kernels.cuda import CudaKernels
from tramontane.stages.kernels.pairs import Pairs
from tramontane.stages.kernels.places import Places
from tramontane.stages.kernels.products import Product
from tramontane.stages.kernels.reference import ReferenceKernels
from tramontane.stages.kv_layout import KVLayout, blocks_held
from tramontane.stages.microbatch import BlockTable, Microbatch, no_sampled_rows, no_scored_rows
from tramontane.stages.weights import TORCH_DTYPES, LayerWeights

SHAPES = {
    "sparse": EXAMPLE,
    "dense": replace(EXAMPLE, experts=0, heads=6, kv_heads=3, head_dim=16, windows=(5,)),
    "top-3, one KV head": replace(EXAMPLE, experts=6, experts_per_token=3, kv_heads=1, windows=(None,)),
    "all KV heads": replace(EXAMPLE, experts_per_token=1, kv_heads=4, dim=40, windows=(11,)),
}
# Three pieces: a chunk in the middle of a prompt, a decode token, a chunk from the start.
FIRST, LENGTH = [9, 20, 0], [8, 1, 3]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.06}


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def random_layer(config, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) * 1.3 / shape[-1] ** 0.5).to(TORCH_DTYPES[dtype])

    queries, keys, experts = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.experts or 1
    return LayerWeights(
        attention_norm_D=1 + matrix(config.dim),
        q=matrix(queries, config.dim),
        k=matrix(keys, config.dim),
        v=matrix(keys, config.dim),
        o=matrix(config.dim, queries),
        ffn_norm_D=1 + matrix(config.dim),
        gate=2 * matrix(config.experts, config.dim) if config.experts else None,
        w1=[matrix(config.ffn_dim, config.dim) for _ in range(experts)],
        w2=[matrix(config.dim, config.ffn_dim) for _ in range(experts)],
        w3=[matrix(config.ffn_dim, config.dim) for _ in range(experts)],
    )


def microbatch(layout, first=FIRST, length=LENGTH, seed=0):
    """Pieces with rings of random blocks."""
    ends = [begin + count for begin, count in zip(first, length, strict=True)]
    held = [blocks_held(end, layout.block, layout.rings[0]) for end in ends]
    blocks = np.random.default_rng(seed).permutation(layout.pool_blocks[0])[: sum(held)]
    empty = np.empty(0, np.int32)
    return Microbatch(
        epoch=1,
        step=0,
        tokens=np.zeros(sum(length), np.int32),
        first=np.array(first, np.int32),
        length=np.array(length, np.int32),
        sequence=np.arange(len(first)),
        tables=(BlockTable(blocks=blocks.astype(np.int32), held=np.array(held, np.int32), fresh=empty),),
        sampled=no_sampled_rows(),
        scored=no_scored_rows(),
    )


@torch.inference_mode()
def attention(kernels, layer, rows, config, first=FIRST, length=LENGTH):
    """Positions 0 .. first as rows of another microbatch, then the pieces: their rows after attention."""
    layout = make_layout(replace(config, windows=config.windows[:1]), chunk=24, block=4, sequences=4)
    storage, packed = kernels.allocate(layout.pool_blocks[0], 4, 1), kernels.pack_layer(layer)
    before = [(begin, piece) for piece, begin in enumerate(first) if begin]
    whole = microbatch(layout, first, length)
    history = torch.randn(sum(begin for begin, _ in before), config.dim, generator=torch.Generator().manual_seed(7))
    earlier = replace(
        whole,
        tokens=np.zeros(len(history), np.int32),
        first=np.array([0 for begin in first if begin], np.int32),
        length=np.array([begin for begin in first if begin], np.int32),
        tables=(held_by(whole, [piece for _, piece in before]),),
    )
    for step, entering in ((earlier, history), (whole, rows)):
        plan = kernels.plan(step, layout, [0])[0]
        after = kernels.attention(packed, kernels.enter(entering.to(rows.dtype)), plan, storage, 0)
    return kernels.leave(after)


def held_by(whole, pieces):
    """The rings of some pieces of a microbatch."""
    table, starts = whole.tables[0], np.cumsum(whole.tables[0].held) - whole.tables[0].held
    blocks = [table.blocks[starts[piece] : starts[piece] + table.held[piece]] for piece in pieces]
    return replace(table, blocks=np.concatenate(blocks), held=table.held[pieces])


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k=None
):
    """`varlen_attn` in plain words: packed pieces, window and causality aligned at each piece's last key."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        group = query.shape[1] // key.shape[1]
        keys, values = (each[k0:k1].repeat_interleave(group, 1).transpose(0, 1) for each in (key, value))
        scores = query[q0:q1].transpose(0, 1) @ keys.mT * scale
        ahead = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - (k1 - k0 - (q1 - q0))
        hidden = ahead > right
        if left >= 0:
            hidden |= ahead < -left
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def kernel_set(name, config, dtype):
    if name == "cuda":
        return CudaKernels(config, dtype, "cpu", attend=plain_varlen)
    return choose_kernels(config, dtype=dtype, device="cpu", name=name)


@pytest.fixture(params=SHAPES)
def config(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [NATIVE, "cpu", "cuda"])
def test_attention_agrees_with_the_reference(config, name, dtype):
    layer, rows = random_layer(config, dtype), torch.randn(12, config.dim).to(TORCH_DTYPES[dtype])
    found = attention(kernel_set(name, config, dtype), layer, rows, config)
    expected = attention(ReferenceKernels(config, dtype, "cpu"), layer, rows, config)
    assert expected.dtype == TORCH_DTYPES[dtype]
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("name", [NATIVE, "cpu", "cuda"])
def test_experts_agree_with_the_reference(config, name, tokens, dtype):
    layer, rows = random_layer(config, dtype), torch.randn(tokens, config.dim).to(TORCH_DTYPES[dtype])
    after = []
    for kernels in (kernel_set(name, config, dtype), ReferenceKernels(config, dtype, "cpu")):
        with torch.inference_mode():
            after.append(kernels.leave(kernels.experts(kernels.pack_layer(layer), kernels.enter(rows.clone()))))
    difference = (after[0] - after[1]).float().abs()
    # In bfloat16 a token whose gate is nearly a tie may turn to another expert. Half a step of it is 0.008 from 2 on,
    # and native kernels do not round what they return.
    assert difference.median() <= TOLERANCE[dtype] / 5
    assert dtype == "bfloat16" or difference.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("name", [*KERNELS, "cuda"])
def test_equal_gates_go_to_the_lower_experts(name):
    """Experts 1 to 3 have the same gate; which of them works shows in what they compute."""
    config = replace(EXAMPLE, experts=4, experts_per_token=2)
    layer = random_layer(config)
    layer.gate[:] = layer.gate[1]
    layer.gate[0] *= -1
    kernels = kernel_set(name, config, "float32")
    rows = torch.randn(64, config.dim)
    with torch.inference_mode():
        found = kernels.experts(kernels.pack_layer(layer), rows.clone())
        normed = torch.nn.functional.rms_norm(rows, (config.dim,), layer.ffn_norm_D, config.norm_eps)
        chosen = normed @ layer.gate[1] > 0

        def ffn(expert):
            hidden = torch.nn.functional.silu(normed @ layer.w1[expert].T) * (normed @ layer.w3[expert].T)
            return hidden @ layer.w2[expert].T

        expected = rows + (ffn(1) + ffn(2)) / 2
    torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-4, atol=1e-5)


def test_pairs_are_sorted_by_expert():
    pairs = Pairs.by_expert(np.array([[2, 0], [0, 3]]), experts=4)
    assert (pairs.experts, pairs.sizes) == ([0, 2, 3], [2, 1, 1])
    assert pairs.token.tolist() == [0, 1, 0, 1]
    assert pairs.back.tolist() == [2, 0, 1, 3]
    alone = Pairs.by_expert(np.array([[2, 0]]), experts=4)
    assert (alone.experts, alone.sizes, alone.back) == ([2, 0], [1, 1], None)


def test_places_of_a_ring_that_rolled_over():
    layout = KVLayout(block=4, chunk=4, windows=(6,), rings=(3,), pool_blocks=(8,))
    table = BlockTable(blocks=np.array([7, 2, 5], np.int32), held=np.array([3], np.int32), fresh=np.empty(0, np.int32))
    places = Places(replace(microbatch(layout, [13], [2]), tables=(table,)), layout, 0)
    assert places.written.tolist() == [29, 30]
    assert places.first_visible(np.array([3, 13])).tolist() == [0, 8]
    assert places.of(np.zeros(6, np.int64), np.arange(8, 14)).tolist() == [20, 21, 22, 23, 28, 29]
    short = replace(table, blocks=table.blocks[:2], held=np.array([2], np.int32))
    beyond = replace(microbatch(layout, [8], [1]), tables=(short,))
    with pytest.raises(AssertionError, match="places 2 of rings that hold 2 blocks"):
        Places(beyond, layout, 0)


@pytest.mark.skipif(products.PACKED is None, reason="this torch has no operators for packed weights")
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 40), (40, 5), (56, 16), (256, 384)])
def test_a_row_of_a_packed_product_has_the_same_bits_in_any_company(inputs, outputs):
    weight, rows = torch.randn(outputs, inputs), torch.randn(70, inputs)
    with torch.inference_mode():
        product = Product(weight)
        whole = product(rows)
        torch.testing.assert_close(whole, rows @ weight.T, rtol=1e-4, atol=1e-4)
        for count in (1, 2, 3, 4, 7, 16, 33):
            assert torch.equal(product(rows[:count]), whole[:count]), f"{count} rows"


def test_one_row_is_computed_as_two_where_it_differs(monkeypatch):
    """On CPUs whose packed product gives a single row other bits; here one that says so."""
    seen = []

    def product(rows, weight, *_):
        seen.append(len(rows))
        return rows @ weight.T + (1.0 if len(rows) == 1 else 0.0)

    monkeypatch.setattr(products, "PACKED", (lambda weight, _: weight, product))
    weight, rows = torch.randn(5, 8), torch.randn(3, 8)
    packed = Product(weight)
    assert torch.equal(packed(rows[:1]), (rows[:1].repeat(2, 1) @ weight.T)[:1])
    assert seen[-1] == 2
    packed(rows)
    assert seen[-1] == 3


def test_without_packed_operators_products_are_plain(monkeypatch, tmp_path):
    folder = save_tensors(tmp_path, random_tensors(EXAMPLE))
    tokens = list(range(3, 33))
    layout = make_layout(EXAMPLE, chunk=8, block=4)
    packed = load_stages(folder, EXAMPLE, kernels="cpu")
    monkeypatch.setattr(products, "PACKED", None)
    plain = load_stages(folder, EXAMPLE, kernels="cpu")
    assert "cpu-plain-float32" in plain[0].numerics
    torch.testing.assert_close(
        Drive(plain, layout).whole(tokens), Drive(packed, layout).whole(tokens), rtol=0, atol=1e-4
    )


def test_the_kernel_set_is_chosen_by_device_or_name():
    assert choose_kernels(EXAMPLE, dtype="float32", device="cpu", name="cpu").name.startswith("cpu-")
    assert choose_kernels(EXAMPLE, dtype="bfloat16", device="cpu", name="reference").name == "reference-bfloat16"
    with pytest.raises(ValueError, match="kernels is 'fast'; supported: native, cpu, cuda, reference"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu", name="fast")
    with pytest.raises(ValueError, match="device is 'cpu'; these kernels run on 'cuda' only"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu", name="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(ValueError, match="device is 'cuda', and this process sees no CUDA device"):
        choose_kernels(EXAMPLE, dtype="float32", device="cuda")


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=NEEDS_GPU) for dtype in ("float32", "bfloat16")])
def test_cuda_agrees_with_the_reference(config, dtype):
    layer, rows = random_layer(config, dtype), torch.randn(12, config.dim).to(TORCH_DTYPES[dtype])
    found = attention(CudaKernels(config, dtype, "cuda"), layer, rows, config)
    expected = attention(ReferenceKernels(config, dtype, "cpu"), layer, rows, config)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if dtype == "bfloat16" else 1e-3)


def test_sizes_that_grouped_products_do_not_take_are_named():
    with pytest.raises(ValueError, match="intermediate_size is 28; on CUDA, experts in bfloat16 take multiples of 8"):
        CudaKernels(replace(EXAMPLE, ffn_dim=28), "bfloat16", "cpu", attend=plain_varlen)
