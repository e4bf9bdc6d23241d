"""The version names everything that decides a token, and nothing else: no path, no time, no number of stages."""

import shutil

import pytest
import torch
from models import make_checkpoint, random_tensors, save_tensors

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.identity import numerics_id
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


def test_digests_cover_the_edges_of_every_tensor(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 80}  # tensors beyond 2 x 4 KiB
    folder = make_checkpoint(tmp_path / "a", "MistralForCausalLM", **shape)
    before = digests(folder)
    assert digests(shutil.copytree(folder, tmp_path / "b")) == before
    name = "model.layers.2.mlp.down_proj.weight"
    size = 64 * 80 * 4
    for byte, seen in [
        (0, True),
        (4095, True),
        (4096, False),
        (size - 4097, False),
        (size - 4096, True),
        (size - 1, True),
    ]:
        flip(folder, name, byte)
        changed = {other for other, digest in digests(folder).items() if digest != before[other]}
        assert changed == ({name} if seen else set()), byte
        flip(folder, name, byte)
    assert digests(folder) == before
    flip(folder, "model.norm.weight", 17)
    assert digests(folder)["model.norm.weight"] != before["model.norm.weight"]


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
        "config_bytes": b"{}",
        "generation_bytes": None,
        "tokenizer_bytes": b"pieces",
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
        {"config_bytes": b"{ }"},
        {"generation_bytes": b""},
        {"tokenizer_bytes": None},
        {"tokenizer_bytes": b"pieceS"},
        {"dtype": "bfloat16"},
        {"digests": [{"a": b"1", "b": b"2"}, {"b": b"2", "c": b"4"}]},
        {"digests": [{"a": b"1", "b": b"2"}]},
        {"digests": [{"a": b"1", "d": b"2", "c": b"3"}]},
        {"numerics": ["y", "y"]},
        {"numerics": ["x", "y"]},
        {"config_bytes": b"{}pieces", "tokenizer_bytes": b""},
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
