"""Damaged checkpoints are refused, by file and tensor."""

import json
import shutil

import pytest
import torch
from models import make_checkpoint
from safetensors.torch import load_file, save_file

from tramontane.stages.checkpoint import Checkpoint
from tramontane.stages.config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q1 = "model.layers.1.self_attn.q_proj.weight"


def opened(folder):
    return Checkpoint.open(folder, ModelConfig.load(folder))


def edit(folder, change):
    """Rewrite model.safetensors after `change` has edited its tensors."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def raw(folder, change_header=None, cut=0, extra=b""):
    """Rewrite model.safetensors after `change_header` has edited its JSON, `cut` bytes shorter or `extra` longer."""
    content = (folder / SINGLE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if change_header:
        change_header(header)
    text = json.dumps(header).encode()
    data = data[: len(data) - cut] + extra
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"], folder)
    (folder / INDEX).write_text(json.dumps(index))


def one_dtype_off(tensors):
    tensors[Q1] = tensors[Q1].bfloat16()


def half(tensors):
    tensors[Q1] = tensors[Q1].half()


def widen(tensors):
    tensors[Q1] = torch.zeros(48, 41)


def transpose(tensors):
    tensors[Q1] = tensors[Q1].T.contiguous()


SINGLE_FILE_DAMAGE = {
    "missing": (lambda f: edit(f, lambda t: t.pop(Q1)), SINGLE, f"tensor {Q1} is missing"),
    "missing-norm": (lambda f: edit(f, lambda t: t.pop("model.norm.weight")), SINGLE, "tensor model.norm.weight is m"),
    "missing-head": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), SINGLE, "tensor lm_head.weight is missing"),
    "missing-many": (lambda f: edit(f, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]), SINGLE, "21 more)"),
    "extra": (
        lambda f: edit(f, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(48)})),
        SINGLE,
        "tensor model.layers.1.self_attn.q_proj.bias is no part of a MixtralForCausalLM of 3 layers",
    ),
    "extra-layer": (
        lambda f: edit(f, lambda t: t.update({Q1.replace("1", "3", 1): torch.zeros(48, 40)})),
        SINGLE,
        "tensor model.layers.3.self_attn.q_proj.weight is no part",
    ),
    "fused-experts": (
        lambda f: edit(f, lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(5, 40, 56)})),
        SINGLE,
        "tensor model.layers.0.mlp.experts.down_proj holds all experts of a layer (fused), which is not supported; "
        "supported: a tensor for each, model.layers.0.block_sparse_moe.experts.0.w1.weight and so on",
    ),
    "wide": (lambda f: edit(f, widen), SINGLE, f"tensor {Q1} has shape (48, 41); config.json says (48, 40)"),
    "transposed": (lambda f: edit(f, transpose), SINGLE, f"tensor {Q1} has shape (40, 48); config.json says (48, 40)"),
    "dtype-mix": (lambda f: edit(f, one_dtype_off), SINGLE, f"tensor {Q1} is bfloat16, the embedding float32"),
    "float16": (lambda f: edit(f, half), SINGLE, f"tensor {Q1} has dtype F16; supported: F32, BF16"),
    "truncated": (lambda f: raw(f, cut=1), SINGLE, "truncated: tensor model.norm.weight ends at byte"),
    "half-gone": (lambda f: raw(f, cut=40_000), SINGLE, "truncated: tensor "),
    "trailing": (lambda f: raw(f, extra=b"abc"), SINGLE, "3 bytes after the last tensor belong to none"),
    "overlap": (
        lambda f: raw(f, lambda h: h[Q1].update(data_offsets=h["lm_head.weight"]["data_offsets"], shape=[99, 40])),
        SINGLE,
        f"tensor {Q1} starts at byte",
    ),
    "odd-name": (
        lambda f: raw(f, lambda h: h.update({"a\nb": h.pop(Q1)})), SINGLE, "a tensor is called 'a\\nb'"
    ),
    "odd-dtype": (lambda f: raw(f, lambda h: h[Q1].update(dtype=["F32"])), SINGLE, f"{Q1} has dtype ['F32']; "),
    "many-dimensions": (lambda f: raw(f, lambda h: h[Q1].update(shape=[2] * 99)), SINGLE, f"{Q1} has shape [2, 2, "),
    "bytes-for-shape": (lambda f: raw(f, lambda h: h[Q1].update(shape=[48, 39])), SINGLE, f"{Q1} has 7680 bytes"),
    "negative-shape": (lambda f: raw(f, lambda h: h[Q1].update(shape=[-48, -40])), SINGLE, f"{Q1} has shape [-48"),
    "no-offsets": (lambda f: raw(f, lambda h: h[Q1].pop("data_offsets")), SINGLE, f"{Q1} has no dtype, shape and"),
    "odd-entry": (lambda f: raw(f, lambda h: h.update({Q1: 7})), SINGLE, f"{Q1} has no dtype, shape and"),
    "empty-file": (lambda f: (f / SINGLE).write_bytes(b""), SINGLE, "truncated, or not a safetensors file: 0 bytes"),
    "no-header": (lambda f: (f / SINGLE).write_bytes(b"\0" * 8), SINGLE, "its header is not JSON"),
    "giant-header": (lambda f: (f / SINGLE).write_bytes(b"\xff" * 64), SINGLE, "not a safetensors file"),
    "git-lfs-pointer": (
        lambda f: (f / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        SINGLE,
        f"{SINGLE}: a Git LFS pointer lies there; `git lfs pull` fetches the file itself",
    ),
    "no-weights": (lambda f: (f / SINGLE).unlink(), "", "holds neither model.safetensors nor model.safetensors.index"),
    "pickled-only": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        "",
        "pytorch_model.bin (pickled weights, not supported)",
    ),
    "mistral-layout": (
        lambda f: [(f / SINGLE).rename(f / "consolidated.safetensors"), (f / "params.json").touch()],
        "",
        "consolidated.safetensors (Mistral's own layout, not supported), params.json (Mistral's own layout",
    ),
    "gguf": (lambda f: (f / SINGLE).rename(f / "m.Q8_0.gguf"), "", "m.Q8_0.gguf (GGUF, not supported)"),
    "both": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"x": "model-1.safetensors"}}'),
        "",
        "holds both model.safetensors and model.safetensors.index",
    ),
    "stray-shard": (
        lambda f: shutil.copy(f / SINGLE, f / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors",
        "no part of the checkpoint, which is model.safetensors",
    ),
    "adapter": (
        lambda f: shutil.copy(f / SINGLE, f / "adapter_model.safetensors"),
        "adapter_model.safetensors",
        "no part of the checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", SINGLE_FILE_DAMAGE)
def test_a_damaged_file_is_refused_by_file_and_tensor(tmp_path, damage):
    spoil, file, said = SINGLE_FILE_DAMAGE[damage]
    folder = make_checkpoint(tmp_path / "model", "MixtralForCausalLM")
    opened(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as refusal:
        opened(folder)
    assert said in str(refusal.value)
    assert str(folder / file) in str(refusal.value)


def test_a_repeated_name_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "MistralForCausalLM")
    text = b'{"x":{},"x":{}}'
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=r"model\.safetensors: the header names x twice"):
        opened(folder)


def move_entry(weight_map, folder):
    other = next(file for file in sorted(set(weight_map.values())) if file != weight_map[Q1])
    weight_map[Q1] = other


def lose_file(weight_map, folder):
    (folder / weight_map[Q1]).unlink()


SHARD_DAMAGE = {
    "entry-gone": (lambda m, f: m.pop(Q1), f"holds tensor {Q1}, which {INDEX} says lies nowhere"),
    "entry-elsewhere": (move_entry, f"tensor {Q1}, which {INDEX} says lies"),
    "entry-too-many": (lambda m, f: m.update(ghost=m[Q1]), f"lacks tensor ghost, which {INDEX} says lies there"),
    "shard-gone": (lose_file, f"no such file, and {INDEX} names it"),
    "outside": (lambda m, f: m.update({Q1: "../model.safetensors"}), f"{INDEX}: tensor {Q1} lies in '../model.safete"),
    "pickled": (lambda m, f: m.update({Q1: "pytorch_model.bin"}), f"tensor {Q1} lies in 'pytorch_model.bin'"),
    "no-name": (lambda m, f: m.update({Q1: None}), f"tensor {Q1} lies in None"),
    "empty": (lambda m, f: m.clear(), f"{INDEX}: weight_map names no tensors"),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_index_and_shards_agree_both_ways(tmp_path, damage):
    spoil, said = SHARD_DAMAGE[damage]
    folder = make_checkpoint(tmp_path / "model", "MixtralForCausalLM", shard_size="40KB")
    opened(folder)
    edit_index(folder, spoil)
    with pytest.raises(ValueError, match=r".") as refusal:
        opened(folder)
    assert said in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{"])
def test_an_index_of_another_form_is_named(tmp_path, content):
    folder = make_checkpoint(tmp_path / "model", "MistralForCausalLM", shard_size="20KB")
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        opened(folder)
