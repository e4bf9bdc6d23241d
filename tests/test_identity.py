"""The version names everything that decides a token, and nothing else: no path, no time, no number of stages."""

import dataclasses
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from models import cached_checkpoint, make_checkpoint, random_tensors, save_tensors
from service import eventually

from tramontane.stages import tensor_digest
from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.identity import numerics_id
from tramontane.stages.safetensors_header import TensorInfo
from tramontane.stages.split import split_as
from tramontane.stages.stage import Stage
from tramontane.stages.version import combine_version


def opened(folder):
    return Checkpoint.open(folder, ModelConfig.load(folder))


def flip(folder, name, byte):
    """Change one byte of a tensor in place."""
    info = opened(folder).tensors[name]
    content = bytearray(info.file.read_bytes())
    content[info.start + byte] ^= 1
    info.file.write_bytes(content)


def digests(folder):
    return digests_of(folder, ModelConfig.load(folder))


def digests_of(folder, config):
    return Stage.load(config, folder, range(config.layers), dtype="float32", device="cpu", kernels="reference").digests


def test_digests_cover_every_byte_of_every_tensor(tmp_path):
    """Both ends, 4 KiB from them, and the middle."""
    folder = make_checkpoint(tmp_path / "a", "MistralForCausalLM", vocab_size=14_000)
    before = digests(folder)
    assert digests(shutil.copytree(folder, tmp_path / "b")) == before
    name, size = "model.embed_tokens.weight", 14_000 * 40 * 4
    for byte in (0, 4096, size // 2, size - 4097, size - 1):
        flip(folder, name, byte)
        assert {other for other, digest in digests(folder).items() if digest != before[other]} == {name}, byte
        flip(folder, name, byte)
    assert digests(folder) == before
    flip(folder, "model.norm.weight", 17)
    assert digests(folder)["model.norm.weight"] != before["model.norm.weight"]


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("shard_size", [None, "200KB"])
def test_digests_depend_neither_on_files_nor_on_stages(shard_size, stages):
    folder = cached_checkpoint("MixtralForCausalLM", shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_size is None else 3)
    config, found = ModelConfig.load(folder), {}
    for span in split_as(config, [3] if stages == 1 else [1, 1, 1]):
        stage = Stage.load(config, folder, span, dtype="float32", device="cpu", kernels="reference")
        found |= stage.digests
    assert found == digests(cached_checkpoint("MixtralForCausalLM"))


TENSOR = TensorInfo("t", Path("model.safetensors"), "float32", (2, 3), start=8, size=24)


@pytest.mark.parametrize("change", [{"name": "u"}, {"dtype": "bfloat16"}, {"shape": (3, 2)}])
def test_name_dtype_and_shape_count(change):
    content = memoryview(bytes(24))
    other = dataclasses.replace(TENSOR, **change)
    assert tensor_digest.digest(other, content) != tensor_digest.digest(TENSOR, content)


def test_a_reader_waits_for_hashing_that_is_far_behind(monkeypatch):
    """Each tensor that waits stays in memory."""
    awaited = []

    class Threads:
        def __init__(self, *_):
            self.taken = 0

        def submit(self, job, *_):
            future = Future()
            number, self.taken = self.taken, self.taken + 1
            future.result = lambda: awaited.append(number)
            return future

    monkeypatch.setattr(tensor_digest, "ThreadPoolExecutor", Threads)
    hashing = tensor_digest.Hashing()
    for _ in range(tensor_digest.MOST_WAITING):
        hashing.digest(TENSOR, memoryview(bytes(24)))
    assert awaited == []
    for _ in range(3):
        hashing.digest(TENSOR, memoryview(bytes(24)))
    assert awaited == [0, 1, 2]


def test_the_thread_that_hashes_ends_with_loading():
    digests(cached_checkpoint("MixtralForCausalLM"))
    eventually(lambda: not any("hashing" in thread.name for thread in threading.enumerate()))


def test_digests_tell_name_and_shape_apart(tmp_path):
    zeros = torch.zeros(16, 16)
    config = EXAMPLE
    tensors = random_tensors(config)
    for name in ("k", "v"):
        tensors[f"model.layers.0.self_attn.{name}_proj.weight"] = zeros.clone()
    found = digests_of(save_tensors(tmp_path, tensors), config)
    assert len(set(found.values())) == len(tensors)


def version(**changes):
    known = {
        "files": {"config.json": b"{}", "tokenizer.model": b"pieces"},
        "dtype": "float32",
        "digests": [{"a": b"1", "b": b"2"}, {"b": b"2", "c": b"3"}],
        "numerics": ["x", "x"],
    }
    return combine_version(**(known | changes))


def test_the_version_does_not_depend_on_the_split():
    assert version() == version(digests=[{"c": b"3", "b": b"2", "a": b"1"}], numerics=["x"])
    assert len(version()) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"config.json": b"{ }", "tokenizer.model": b"pieces"}},
        {"files": {"config.json": b"{}", "tokenizer.model": b"pieceS"}},
        {"files": {"config.json": b"{}", "generation_config.json": b"", "tokenizer.model": b"pieces"}},
        {"files": {"config.json": b"{}", "generation_config.json": b"pieces"}},
        {"files": {"config.json": b"{}pieces", "tokenizer.model": b""}},
        {"files": {"config.json": b"{}"}},
        {"dtype": "bfloat16"},
        {"digests": [{"a": b"1", "b": b"2"}, {"b": b"2", "c": b"4"}]},
        {"digests": [{"a": b"1", "b": b"2"}]},
        {"digests": [{"a": b"1", "d": b"2", "c": b"3"}]},
        {"numerics": ["y", "y"]},
        {"numerics": ["x", "y"]},
    ],
    ids=str,
)
def test_the_version_changes_with_all_that_decides_a_token(changes):
    assert version(**changes) != version()


def test_stages_that_read_different_bytes_make_no_version():
    assert version(numerics=["x", "y"]) != version(numerics=["y", "x"])
    with pytest.raises(ValueError, match="tensor b: stage 1 has read other bytes"):
        version(digests=[{"a": b"1", "b": b"2"}, {"b": b"9"}])


def test_the_numerics_id_names_torch_the_device_and_the_kernels():
    assert numerics_id("cpu", "reference") == numerics_id("cpu", "reference")
    assert numerics_id("cpu", "reference") != numerics_id("cpu", "packed")
    for part in (f"torch {torch.__version__}", "cpu", torch.backends.cpu.get_cpu_capability(), "packed"):
        assert part in numerics_id("cpu", "packed")
