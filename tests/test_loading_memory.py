"""Start-up reads each byte of the checkpoint once, and leaves one copy of the weights in memory."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_sets import choices, needs_native
from models import cached_checkpoint, random_tensors, save_tensors

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.kernels.native import interface
from tramontane.stages.kernels.native.engine import Engine
from tramontane.stages.kv_layout import KVLayout
from tramontane.stages.layouts import Slot, slots, tensor_shape
from tramontane.stages.split import split_as
from tramontane.stages.stage import Stage
from tramontane.stages.stage_memory import stage_memory
from tramontane.stages.weights import WeightReader


def bytes_read():
    """What this thread has read by system calls, files of the kernel's among them; mapped pages do not count."""
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counts", [[3], [1, 2]])
def test_each_byte_is_read_once(counts, tied, dtype):
    folder = cached_checkpoint("MixtralForCausalLM", dtype=dtype, tie_word_embeddings=tied)
    config = ModelConfig.load(folder)
    checkpoint = Checkpoint.open(folder, config)
    before = bytes_read()
    asking = bytes_read() - before
    for span in split_as(config, counts):
        owned = sum(checkpoint.tensors[name].size for name in checkpoint.owned(span))
        reader = WeightReader(checkpoint, span, "bfloat16")
        before = bytes_read()
        kept = [reader.embedding()] if span.start == 0 else []
        kept += [reader.layer(index) for index in span]
        kept += [reader.norm(), reader.head()] if span.stop == config.layers else []
        # The number of digits that /proc writes may change meanwhile.
        assert bytes_read() - before == pytest.approx(owned + asking, abs=20)
        assert reader.unread == ()
        assert str(folder) not in Path("/proc/self/maps").read_text()


def test_a_file_that_shrinks_after_it_was_checked_is_refused(tmp_path):
    folder = save_tensors(tmp_path, random_tensors(EXAMPLE))
    reader = WeightReader(Checkpoint.open(folder, EXAMPLE), range(4), "float32")
    file = folder / "model.safetensors"
    size = file.stat().st_size - 10
    with file.open("r+b") as stream:
        stream.truncate(size)
    with pytest.raises(ValueError, match=rf"truncated: tensor \S+ ends at byte {size + 10}, the file at {size}"):
        [reader.embedding(), *map(reader.layer, range(4)), reader.norm(), reader.head()]


LOAD = """
import pathlib, sys, threading, torch
sys.path.insert(0, sys.argv[1])
from tramontane.stages.config import EXAMPLE
from tramontane.stages.stage import Stage
from test_loading_memory import WIDE

def load(config, folder):
    stages.append(Stage.load(config, folder, range(config.layers), dtype="bfloat16", device="cpu", kernels="native"))

def load_in_thread(*arguments):
    # As a worker does: what a thread frees between pieces that stay, the heap keeps.
    thread = threading.Thread(target=load, args=arguments)
    thread.start()
    thread.join()

def private_kib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

stages = []
load_in_thread(EXAMPLE, pathlib.Path(sys.argv[2]))
before = private_kib()
load_in_thread(WIDE, pathlib.Path(sys.argv[3]))
print(private_kib() - before)
"""
WIDE = dataclasses.replace(EXAMPLE, dim=512, ffn_dim=1024, experts=8)
"""Matrices of 1 MiB in bfloat16, as many as make 100 MiB."""


@pytest.mark.parametrize("kernels", ["reference", pytest.param("native", marks=needs_native)])
def test_a_pool_that_cannot_be_had_is_said_with_the_options_that_change_it(tmp_path, kernels):
    folder = save_tensors(tmp_path, random_tensors(EXAMPLE))
    stage = Stage.load(EXAMPLE, folder, range(4), dtype="float32", device="cpu", kernels=kernels)
    layout = KVLayout(block=4, chunk=4, windows=(8,), rings=(4,), pool_blocks=(2**38,))  # more than can be addressed
    with pytest.raises(ValueError, match=r"^there is no memory .* of layers 0 to 3, .*; --kv-memory and --max-context"):
        stage.bind(1, layout, 64, 16)
    stage.bind(2, dataclasses.replace(layout, pool_blocks=(8,)), 64, 16)


PLAIN = ("attention_norm", "ffn_norm", "norm", "gate")


@needs_native
def test_loading_leaves_the_packed_weights_and_little_else(tmp_path):
    small = save_tensors(tmp_path / "small", random_tensors(EXAMPLE))
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors(WIDE).items()}
    wide = save_tensors(tmp_path / "wide", tensors)
    weights_kib = sum(tensor.nbytes for tensor in tensors.values()) / 1024
    script = [sys.executable, "-c", LOAD, str(Path(__file__).parent), str(small), str(wide)]
    left_kib = int(subprocess.run(script, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert weights_kib < left_kib < 1.1 * weights_kib
    planned = stage_memory(WIDE, range(WIDE.layers), dtype="bfloat16", quantize=None, rows=1)
    assert planned.weights / 1024 == pytest.approx(weights_kib, rel=0.01)


@needs_native
def test_weights_of_8_bits_take_what_was_planned():
    # Matrices of whole panels, as those of real models are.
    config = dataclasses.replace(WIDE, heads=8, kv_heads=8)
    packed_bytes = Engine(choices("float32")[0].head).library.tramontane_packed_bytes
    held = {slot: tensor_shape(slot, config) for slot in slots(config)}
    sizes = {
        slot: packed_bytes(interface.WEIGHTS["int8"], *shape, 0) if slot.role not in PLAIN else 4 * math.prod(shape)
        for slot, shape in held.items()
    }
    sizes[Slot("embedding")] = 2 * config.vocab * config.dim
    planned = stage_memory(config, range(config.layers), dtype="bfloat16", quantize="int8", rows=1)
    assert planned.weights == sum(sizes.values())
