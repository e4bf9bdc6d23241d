"""The native kernels: a row's bits in any company, sizes that fit no panel, places that nobody wrote, int8, threads."""

import shutil
import time
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from driving import Drive, load_stages, make_layout
from kernel_sets import FACTS, choices, native, needs_native
from models import random_tensors, save_tensors
from test_kernels import attention, microbatch, random_layer

from tramontane.stages.config import EXAMPLE
from tramontane.stages.kernels import choose_kernels, one_by_one
from tramontane.stages.kernels.native import NativeKernels, _frequency, build
from tramontane.stages.kernels.reference import ReferenceKernels
from tramontane.stages.variants import KernelChoice, Variants, numbers_of
from tramontane.stages.weights import TORCH_DTYPES

pytestmark = needs_native

PROMPT = torch.randint(3, 64, (150,), generator=torch.Generator().manual_seed(5)).tolist()
# More positions than a tile of attention has; windows that begin within one; more rows than a tile of a product.
CONFIG = replace(EXAMPLE, windows=(5, None, 70, 5), experts=5, experts_per_token=3, context=200)
NUMBERS = [("float32", None), ("bfloat16", None), ("float32", "int8"), ("bfloat16", "int8")]


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Model:
    def __init__(self, folder, dtype, quantize, kernels="native"):
        self.folder, self.options = folder, {"dtype": dtype, "quantize": quantize, "kernels": kernels}
        self.alone = self.drive(chunk=len(PROMPT)).whole(PROMPT)

    def alone_in(self, block):
        """Blocks of an odd size pair other positions in a word of bfloat16 values, which may be another rounding."""
        paired = block % 2 and self.options["dtype"] == "bfloat16"
        return self.drive(chunk=len(PROMPT), block=block).whole(PROMPT) if paired else self.alone

    def drive(self, *, split=(), chunk=64, block=16, **options):
        stages = load_stages(self.folder, CONFIG, split, **self.options)
        assert all(stage.row_invariant for stage in stages)
        return Drive(stages, make_layout(CONFIG, chunk=chunk, block=block, sequences=4), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tensors(tmp_path_factory.mktemp("model"), random_tensors(CONFIG))


@pytest.fixture(scope="module", params=NUMBERS, ids=lambda numbers: "-".join(filter(None, numbers)))
def model(folder, request):
    """The logits of the prompt in one pass, alone, on one stage and one thread: what every other road must give."""
    return Model(folder, *request.param)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 149])
def test_no_bit_depends_on_the_cut_of_the_prompt(model, chunk):
    """With chunks of one token, decode is compared with recomputation as one prefill."""
    assert torch.equal(model.drive(chunk=chunk).whole(PROMPT), model.alone)


@pytest.mark.parametrize("block", [1, 5, 8, 32, 200])
@pytest.mark.parametrize("seed", [1, 2])
def test_no_bit_depends_on_the_blocks(model, block, seed):
    """Neither on which blocks of the pool a sequence holds nor, but for odd ones in bfloat16, on their size."""
    assert torch.equal(model.drive(block=block, seed=seed).whole(PROMPT), model.alone_in(block))


@pytest.mark.parametrize("sizes", [[64, 1, 33, 20], [1, 1, 1, 1], [3, 2, 1, 5], [10, 64, 64, 64]])
def test_no_bit_depends_on_the_company(model, sizes):
    drive = model.drive()
    others = [PROMPT[:70], PROMPT[20:23], PROMPT[60:]]
    assert torch.equal(drive.packed([PROMPT, *others], sizes=sizes)[0], model.alone)


@pytest.mark.parametrize("threads", [2, 3])
def test_no_bit_depends_on_the_threads(model, threads, monkeypatch):
    monkeypatch.setattr("tramontane.stages.kernels.native.engine._threads", lambda: threads)
    drive = model.drive(chunk=100)
    assert torch.equal(drive.whole(PROMPT), model.alone)
    assert torch.equal(drive.whole(PROMPT, chunk=1), model.alone)


@pytest.mark.parametrize("split", [[2, 2], [1, 1, 1, 1]])
def test_no_bit_depends_on_the_stages(model, split):
    assert torch.equal(model.drive(split=split).whole(PROMPT), model.alone)


def test_no_bit_depends_on_places_that_nobody_sees(model):
    """Every block that nobody holds, and every one newly taken, is full of NaN before each microbatch."""
    drive = model.drive(chunk=9, block=5, poison=True)
    assert torch.equal(torch.cat([drive.whole(PROMPT[:30]), drive.whole(PROMPT)])[30:], model.alone_in(5))


def test_nan_reaches_those_that_see_it_and_no_others(model):
    drive = model.drive(chunk=50, block=16)
    broken, sound = drive.sequence(PROMPT), drive.sequence(PROMPT)
    drive.logits((broken, 50), (sound, 50))
    full = CONFIG.window_classes.index(None)
    drive.stages[0].pools[full].fill(np.array(broken.rings[full][:1], np.int32), float("nan"))
    lost, kept = drive.logits((broken, 9), (sound, 9))
    assert lost.isnan().all()
    assert torch.equal(kept, model.alone[50:59])


@torch.inference_mode()
def test_no_bit_depends_on_the_cut_among_millions():
    """Rows differ by one rounding in a million where the two products of a word of values are not added together."""
    config = replace(EXAMPLE, dim=64, heads=8, kv_heads=4, head_dim=256, windows=(None,), context=4096)
    kernels = native(config, "bfloat16")
    layer = kernels.pack_layer(random_layer(config, "bfloat16"))
    rows = kernels.enter(torch.randn(3000, config.dim, generator=torch.Generator().manual_seed(3)).bfloat16())
    layout = make_layout(config, chunk=len(rows), block=32)

    def after_attention(chunk):
        storage, found = kernels.allocate(layout.pool_blocks[0], layout.block, 1), []
        for first in range(0, len(rows), chunk):
            some = rows[first : first + chunk]
            plan = kernels.plan(microbatch(layout, [first], [len(some)]), layout, [0])[0]
            found.append(kernels.attention(layer, some, plan, storage, 0))
        return torch.cat(found)

    assert torch.equal(after_attention(101), after_attention(len(rows)))


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize("broken", [8, 9])
def test_nan_of_a_row_reaches_those_that_see_it_and_no_others(numbers, broken):
    """Within one chunk, where rows that see it and rows that do not are computed in one tile, and share a word."""
    dtype, quantize = numbers
    config = replace(EXAMPLE, windows=(5,))
    layer, rows = random_layer(config, dtype), torch.randn(20, config.dim, generator=torch.Generator().manual_seed(3))
    kernels, rows = native(config, dtype, quantize), rows.to(TORCH_DTYPES[dtype])
    sound = attention(kernels, layer, rows, config, [1], [20])
    rows[broken] = float("nan")
    found = attention(kernels, layer, rows, config, [1], [20])
    assert found.isnan().all(-1).nonzero().flatten().tolist() == list(range(broken, broken + 5))
    assert torch.equal(found[:broken], sound[:broken])
    assert torch.equal(found[broken + 5 :], sound[broken + 5 :])


def test_one_call_for_all_blocks_gives_the_bits_of_one_a_half(model, monkeypatch):
    monkeypatch.setattr(NativeKernels, "blocks", one_by_one)
    assert torch.equal(model.drive().whole(PROMPT), model.alone)


# dim, heads, KV heads, head_dim, ffn_dim: none fits a panel, a word or a vector but by chance.
SHAPES = [
    (33, 1, 1, 32, 17),
    (50, 2, 1, 34, 65),
    (16, 3, 1, 80, 1),
    (64, 8, 2, 48, 32),
    (7, 5, 1, 66, 31),
    (130, 6, 3, 96, 129),
    (96, 7, 1, 128, 100),
    (40, 8, 1, 256, 250),
    (1, 2, 2, 2, 3),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_any_shape_agrees_with_the_reference(sizes, dtype):
    names = ("dim", "heads", "kv_heads", "head_dim", "ffn_dim")
    config = replace(EXAMPLE, **dict(zip(names, sizes, strict=True)), windows=(9,), experts=0)
    layer = random_layer(config, dtype)
    rows = torch.randn(12, config.dim, generator=torch.Generator().manual_seed(3)).to(TORCH_DTYPES[dtype])
    kernels, reference = native(config, dtype), ReferenceKernels(config, dtype, "cpu")
    tolerance = {"float32": 2e-5, "bfloat16": 0.06}[dtype]
    found, expected = (attention(each, layer, rows, config) for each in (kernels, reference))
    torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)
    found, expected = (experts(each, layer, rows) for each in (kernels, reference))
    torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def experts(kernels, layer, rows):
    return kernels.leave(kernels.experts(kernels.pack_layer(layer), kernels.enter(rows)))


@pytest.mark.parametrize(("count", "chosen"), [(1, 1), (2, 1), (3, 3), (8, 2), (16, 4), (40, 5)])
@pytest.mark.parametrize("tokens", [1, 5, 300, 384])
def test_any_number_of_experts_agrees_with_the_reference(count, chosen, tokens):
    config = replace(EXAMPLE, experts=count, experts_per_token=chosen)
    layer, rows = random_layer(config), torch.randn(tokens, config.dim, generator=torch.Generator().manual_seed(3))
    found = experts(native(config, "float32"), layer, rows)
    torch.testing.assert_close(
        found, experts(ReferenceKernels(config, "float32", "cpu"), layer, rows), atol=1e-5, rtol=1e-5
    )


# What else than the best can be chosen here: for CPUs that do less, and for whoever asks for it.
OTHERS = [(of, variants) for of in NUMBERS for variants in choices(numbers_of(*of))[1:]]


@pytest.mark.parametrize(("numbers", "variants"), [each for each in OTHERS if each[0][1] is None], ids=str)
def test_other_variants_agree_with_the_reference(numbers, variants):
    """Also with as many rows as two full units of a product take."""
    dtype, _ = numbers
    config = replace(EXAMPLE, windows=(9,), experts=0)
    layer = random_layer(config, dtype)
    rows = torch.randn(384, config.dim, generator=torch.Generator().manual_seed(3)).to(TORCH_DTYPES[dtype])
    kernels, reference = NativeKernels(config, dtype, None, variants), ReferenceKernels(config, dtype, "cpu")
    tolerance = {"float32": 2e-5, "bfloat16": 0.06}[dtype]
    for found, expected in (
        [attention(each, layer, rows[:12], config) for each in (kernels, reference)],
        [experts(each, layer, rows) for each in (kernels, reference)],
    ):
        torch.testing.assert_close(found, expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("numbers", "variants"), OTHERS, ids=str)
def test_no_bit_depends_on_cut_or_company_in_other_variants(numbers, variants, folder):
    model = Model(folder, *numbers, kernels=KernelChoice(kernels="native", variants=variants))
    assert f"native-{variants}-{numbers_of(*numbers)}@" in model.drive().stages[0].numerics
    assert torch.equal(model.drive(chunk=1).whole(PROMPT), model.alone)
    assert torch.equal(model.drive(chunk=7, block=5).whole(PROMPT), model.alone_in(5))
    assert torch.equal(model.drive(chunk=64).packed([PROMPT[:40], PROMPT], sizes=(3, 33))[1], model.alone)
    assert torch.equal(model.drive(split=[1, 3]).whole(PROMPT), model.alone)


@torch.inference_mode()
def test_what_the_numerics_id_tells_apart_rounds_otherwise():
    """And what it does not tell apart computes the same bits: instructions for bfloat16 change nothing in float32.

    A million numbers, since most differences vanish where they are rounded to bfloat16.
    """
    config = replace(EXAMPLE, dim=1024, vocab=4096)
    generator = torch.Generator().manual_seed(3)
    norm, head = torch.ones(1024), torch.randn(4096, 1024, generator=generator)
    rows = torch.randn(256, 1024, generator=generator)

    def logits(dtype, name):
        kernels = NativeKernels(config, dtype, None, Variants.alike(name))
        there = TORCH_DTYPES[dtype]
        return kernels.head(kernels.pack_head(norm, head.to(there)), kernels.enter(rows.to(there)))

    names = FACTS.variants("bfloat16")
    narrow = {name: logits("bfloat16", name) for name in names}
    wide = {name: logits("float32", name) for name in names}
    for one, other in combinations(names, 2):
        assert not torch.equal(narrow[one], narrow[other]), (one, other)
        assert torch.equal(wide[one], wide[other]) == (other != "avx2"), (one, other)


def test_frequencies_are_those_of_torch_without_its_code():
    config = replace(EXAMPLE, head_dim=128, rope_theta=1e6)
    exponent = torch.arange(0, 128, 2, dtype=torch.float32) / 128
    torch.testing.assert_close(torch.from_numpy(_frequency(config)), 1 / 1e6**exponent, rtol=2.4e-7, atol=0)


@pytest.mark.skipif(len(choices("float32")) < 2, reason="one variant only runs here")
def test_matrices_of_different_variants_work_together(folder):
    """As they may be chosen for a CPU that is faster at one thing than at another."""
    best, other = (choices("float32")[number].experts for number in (0, -1))
    mixed = Variants(attention=best, experts=other, head=best)
    model = Model(folder, "float32", None, kernels=KernelChoice(kernels="native", variants=mixed))
    assert f"attention.{best}-experts.{other}" in model.drive().stages[0].numerics
    assert torch.equal(model.drive(chunk=1).whole(PROMPT), model.alone)
    torch.testing.assert_close(model.alone, Model(folder, "float32", None).alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 101])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 193])
def test_any_head_agrees_with_the_reference(vocab, rows):
    config = replace(EXAMPLE, vocab=vocab, dim=300)
    generator = torch.Generator().manual_seed(3)
    norm, head = 1 + torch.randn(300, generator=generator) / 9, torch.randn(vocab, 300, generator=generator)
    hidden = torch.randn(rows, 300, generator=generator)
    found, expected = (
        kernels.head(kernels.pack_head(norm, head), hidden)
        for kernels in (native(config, "float32"), ReferenceKernels(config, "float32", "cpu"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_int8_is_close_to_full_precision(folder):
    expected = Model(folder, "float32", None).alone
    found = Model(folder, "float32", "int8").alone
    assert 0 < (found - expected).abs().median() < 0.05 * expected.std()


def test_the_name_tells_what_decides_the_rounding():
    names = [native(EXAMPLE, dtype, quantize).name for dtype, quantize in NUMBERS]
    assert len(set(names)) == 4
    for name, numbers in zip(names, NUMBERS, strict=True):
        of = numbers_of(*numbers)
        assert name.startswith(f"native-{choices(of)[0]}-{of}@{build.source_digest()[:8]} ")
        assert name.endswith(build.find_compiler()[1])


def test_the_name_tells_which_sources_were_compiled(tmp_path, monkeypatch):
    """Another release may round otherwise: its version is another, and no sequence goes on there."""
    name = native(EXAMPLE, "float32").name
    assert name == native(EXAMPLE, "float32").name
    changed = shutil.copytree(build.SOURCES, tmp_path / "native")
    (changed / "attend.hpp").write_text((changed / "attend.hpp").read_text() + "// another\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert native(EXAMPLE, "float32").name != name


def test_int8_is_for_native_kernels():
    kernels = choose_kernels(EXAMPLE, dtype="float32", device="cpu", quantize="int8")
    assert "-float32-int8@" in kernels.name
    with pytest.raises(ValueError, match="quantize is 'int8', and kernels is 'cpu'; only 'native' quantizes"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu", name="cpu", quantize="int8")
    with pytest.raises(ValueError, match="quantize is 'int4'; supported: int8"):
        choose_kernels(EXAMPLE, dtype="float32", device="cpu", quantize="int4")


def test_threads_sleep_when_there_is_no_step(model, monkeypatch):
    monkeypatch.setattr("tramontane.stages.kernels.native.engine._threads", lambda: 3)
    drive = model.drive()
    drive.whole(PROMPT)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.2, "two threads that spin would have taken 0.8 s"
    assert drive.running == []


def test_threads_end_with_their_kernels(folder, monkeypatch):
    monkeypatch.setattr("tramontane.stages.kernels.native.engine._threads", lambda: 4)

    def count():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("Threads"))

    Model(folder, "float32", None)
    before = count()
    for _ in range(3):
        Model(folder, "float32", None)
    assert count() <= before


def test_rings_that_are_too_short_are_refused():
    kernels, layout = native(EXAMPLE, "float32"), make_layout(EXAMPLE, chunk=8, block=4)
    whole = microbatch(make_layout(replace(EXAMPLE, windows=EXAMPLE.windows[:1]), chunk=8, block=4), [9], [4])
    table = whole.tables[0]
    length = np.array([1], np.int32)
    for broken, message in (
        ({"tables": (replace(table, held=table.held - 1, blocks=table.blocks[:-1]),)}, "are needed"),
        ({"tables": (replace(table, held=table.held[:0]),)}, "0 rings of 1 pieces"),
        ({"tables": (replace(table, blocks=table.blocks[:-1]),)}, "blocks in rings of"),
        ({"tables": (replace(table, blocks=table.blocks + 10_000),)}, "blocks of a pool"),
        ({"tables": (replace(table, blocks=table.blocks - 10_000),)}, "blocks of a pool"),
        ({"length": length * 3}, "pieces of other rows"),
        ({"length": length * 5}, "pieces of other rows"),
        ({"length": length * -4}, "a piece without a place"),
        ({"first": whole.first - 10}, "a piece without a place"),
    ):
        with pytest.raises(AssertionError, match=message):
            kernels.plan(replace(whole, **broken), layout, [0])


def test_rows_of_different_length_share_a_call_with_long_ones(folder):
    """Units of attention of every size in one microbatch, in the middle of everything else."""
    model = Model(folder, "float32", None)
    drive = model.drive(chunk=100)
    sequences = [drive.sequence(PROMPT) for _ in range(4)]
    found = [[] for _ in sequences]
    for cut, after in pairwise([0, 1, 60, 61, 150]):
        for rows, logits in zip(found, drive.logits(*[(each, after - cut) for each in sequences]), strict=True):
            rows.append(logits)
    for rows in found:
        assert torch.equal(torch.cat(rows), model.alone)
