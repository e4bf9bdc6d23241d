"""A checkpoint folder is accounted for tensor by tensor, and each stage reads exactly what is its own."""

import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from models import cached_checkpoint, load_tensors, make_checkpoint, random_tensors, save_tensors
from safetensors.torch import save_file

from tramontane.stages.checkpoint import Checkpoint, check_tokenizer_size
from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.split import split_as
from tramontane.stages.weights import WeightReader

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q1 = "model.layers.1.self_attn.q_proj.weight"


def opened(folder):
    return Checkpoint.open(folder, ModelConfig.load(folder))


def read_all(reader, span, config):
    """What a stage reads, by our own names."""
    read = {}
    if span.start == 0:
        read["embedding"] = reader.embedding()
    for index in span:
        layer = reader.layer(index)
        names = ("attention_norm_D", "q", "k", "v", "o", "ffn_norm_D", "gate")
        read |= {f"{index}.{name}": getattr(layer, name) for name in names if getattr(layer, name) is not None}
        for name in ("w1", "w2", "w3"):
            read |= {f"{index}.{name}.{expert}": matrix for expert, matrix in enumerate(getattr(layer, name))}
    if span.stop == config.layers:
        read |= {"norm": reader.norm(), "head": reader.head()}
    return read


def expected(tensors, config):
    """The same from the Hugging Face names, written out a second time."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    names = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": head}
    ours_to_theirs = {
        "attention_norm_D": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "ffn_norm_D": "post_attention_layernorm",
    }
    if config.experts:
        ours_to_theirs["gate"] = "block_sparse_moe.gate"
        for expert, name in itertools.product(range(config.experts), ("w1", "w2", "w3")):
            ours_to_theirs[f"{name}.{expert}"] = f"block_sparse_moe.experts.{expert}.{name}"
    else:
        ours_to_theirs |= {"w1.0": "mlp.gate_proj", "w2.0": "mlp.down_proj", "w3.0": "mlp.up_proj"}
    for layer, (ours, theirs) in itertools.product(range(config.layers), ours_to_theirs.items()):
        names[f"{layer}.{ours}"] = f"model.layers.{layer}.{theirs}.weight"
    return {ours: tensors[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", [None, "20KB"])
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "MixtralForCausalLM"])
def test_stages_together_read_every_tensor_once(architecture, shard_size, tied, dtype):
    folder = cached_checkpoint(architecture, dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied)
    assert (folder / INDEX).exists() == (shard_size is not None)
    config, checkpoint = ModelConfig.load(folder), opened(folder)
    theirs = expected(load_tensors(folder), config)
    for counts in ([3], [1, 2], [1, 1, 1]):
        spans = split_as(config, counts)
        owners, read = checkpoint.owners(spans), {}
        for stage, span in enumerate(spans):
            progress: list[float] = []
            reader = WeightReader(checkpoint, span, "float32", progress.append)
            assert set(reader.unread) == {name for name, stages in owners.items() if stage in stages}
            mine = read_all(reader, span, config)
            assert reader.unread == ()
            assert progress == sorted(progress)
            assert progress[-1] == 1.0
            assert not (read.keys() & mine.keys())
            read |= mine
        assert read.keys() == theirs.keys()
        assert all(torch.equal(read[name], theirs[name]) and read[name].dtype == torch.float32 for name in read)


def test_the_dtype_asked_for_is_the_dtype_read():
    folder = cached_checkpoint("MixtralForCausalLM")
    reader = WeightReader(opened(folder), range(3), "bfloat16")
    tensors = load_tensors(folder)
    assert torch.equal(reader.layer(1).q, tensors[Q1].bfloat16())
    assert reader.embedding().dtype == reader.norm().dtype == reader.head().dtype == torch.bfloat16


def test_a_digest_is_taken_when_its_tensor_is_read(tmp_path):
    """It is the root over the tensor's pieces, here written out a second time, and needs the disk no more."""
    config = dataclasses.replace(EXAMPLE, vocab=20_000)
    tensors = random_tensors(config)
    folder = save_tensors(tmp_path, tensors)
    reader = WeightReader(Checkpoint.open(folder, config), range(4), "bfloat16")
    assert reader.digests() == {}
    reader.embedding()
    assert reader.digests().keys() == {"model.embed_tokens.weight"}
    read_all(reader, range(4), config)
    (folder / SINGLE).unlink()
    found = reader.digests()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        content, about = tensor.numpy().tobytes(), f"{name}\nfloat32\n{list(tensor.shape)}\n"
        pieces = [content[start : start + 2**20] for start in range(0, len(content), 2**20)]
        assert len(pieces) == (2 if tensor.shape == (20_000, 16) else 1)
        leaves = b"".join(hashlib.sha256(b"leaf\0" + piece).digest() for piece in pieces)
        root = hashlib.sha256(b"root\0" + hashlib.sha256(about.encode()).digest() + leaves).digest()
        assert found[name] == root, name


def test_a_stage_needs_no_shard_but_its_own(tmp_path):
    """One shard a layer: a stage reads its layers from a folder that has lost the data of all others."""
    config = EXAMPLE
    tensors = random_tensors(config)
    weight_map = {}
    for name in tensors:
        layer = name.split(".")[2] if ".layers." in name else "0" if "embed" in name else "3"
        weight_map[name] = f"layer-{layer}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(tmp_path, config)
    for layer in (0, 3):
        (tmp_path / f"layer-{layer}.safetensors").unlink()
    reader = WeightReader(checkpoint, range(1, 3), "float32")
    read = read_all(reader, range(1, 3), config)
    assert reader.unread == ()
    assert all(torch.equal(tensor, expected(tensors, config)[name]) for name, tensor in read.items())
    assert len(reader.digests()) == len(read)
    with pytest.raises(FileNotFoundError):
        WeightReader(checkpoint, range(1), "float32").embedding()


def test_every_cut_has_one_owner_a_tensor():
    for tied in (False, True):
        folder = cached_checkpoint("MixtralForCausalLM", tie_word_embeddings=tied)
        config, checkpoint = ModelConfig.load(folder), opened(folder)
        for counts in ([3], [1, 2], [2, 1], [1, 1, 1]):
            owners = checkpoint.owners(split_as(config, counts))
            assert owners.keys() == load_tensors(folder).keys()
            embedding = owners.pop("model.embed_tokens.weight")
            assert embedding == ((0, len(counts) - 1) if tied and len(counts) > 1 else (0,))
            assert all(len(stages) == 1 for stages in owners.values())


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([range(1), range(2, 3)], "tensor model.layers.1.input_layernorm.weight belongs to no stage"),
        ([range(2), range(1, 3)], "tensor model.layers.1.input_layernorm.weight belongs to stages 0, 1"),
        ([range(2)], "tensor model.layers.2.input_layernorm.weight belongs to no stage; the stages' layers are 0-1"),
        ([range(1, 3)], "tensor model.embed_tokens.weight belongs to no stage"),
    ],
)
def test_a_tensor_without_one_owner_is_named(spans, said):
    with pytest.raises(ValueError, match=said):
        opened(cached_checkpoint("MixtralForCausalLM")).owners(spans)


# Refusals: each damages a good folder and says what must be named.


def test_other_formats_beside_complete_safetensors_are_left_alone(tmp_path):
    """Official folders carry Mistral's own copy of the weights too."""
    folder = make_checkpoint(tmp_path / "model", "MistralForCausalLM")
    for name in ("params.json", "consolidated.safetensors", "pytorch_model.bin", "tokenizer.json", "README.md"):
        (folder / name).write_bytes(b"something else")
    assert len(opened(folder).tensors) == 3 * 9 + 3


def test_an_index_may_name_one_file_only(tmp_path):
    folder = make_checkpoint(tmp_path, "MistralForCausalLM")
    weight_map = dict.fromkeys(load_tensors(folder), SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert opened(folder).tensors.keys() == weight_map.keys()


def test_a_tied_model_may_store_an_equal_head(tmp_path):
    config = ModelConfig.load(cached_checkpoint("MistralForCausalLM", tie_word_embeddings=True))
    tensors = random_tensors(config)
    embedding = tensors["model.embed_tokens.weight"]
    save_tensors(tmp_path, tensors | {"lm_head.weight": embedding.clone()})
    checkpoint = Checkpoint.open(tmp_path, config)
    owners = checkpoint.owners([range(1), range(1, 3)])
    assert owners["lm_head.weight"] == (1,)
    assert owners["model.embed_tokens.weight"] == (0, 1)
    assert torch.equal(WeightReader(checkpoint, range(1, 3), "float32").head(), embedding)

    save_tensors(tmp_path, tensors | {"lm_head.weight": embedding + 1})
    reader = WeightReader(Checkpoint.open(tmp_path, config), range(1, 3), "float32")
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, and tensor lm_head\.weight differs"):
        reader.head()


def test_a_tokenizer_must_not_outgrow_the_embedding(tmp_path):
    check_tokenizer_size(64, EXAMPLE, tmp_path / "tokenizer.model")
    check_tokenizer_size(60, EXAMPLE, tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model: has 65 ids, .* 64 rows \(tensor model\.embed_tokens"):
        check_tokenizer_size(65, EXAMPLE, tmp_path / "tokenizer.model")


def test_the_inventory_needs_no_torch():
    modules = [
        "checkpoint",
        "config",
        "kv_layout",
        "layouts",
        "microbatch",
        "noise",
        "safetensors_header",
        "split",
        "tensor_digest",
        "version",
    ]
    program = "import sys\n" + "".join(f"import tramontane.stages.{name}\n" for name in modules)
    program += "assert not {'torch', 'ray', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("said", [None, "float16"])
def test_the_dtype_is_that_of_the_tensors(tmp_path, dtype, said):
    """Whatever config.json says, and where it says nothing."""
    folder = make_checkpoint(tmp_path, "MistralForCausalLM", dtype=dtype)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"dtype": said, "torch_dtype": None}))
    assert opened(folder).dtype == dtype


def test_sizes_on_disk_are_what_the_header_says():
    for tensor in opened(cached_checkpoint("MixtralForCausalLM", dtype="bfloat16")).tensors.values():
        assert tensor.size == 2 * math.prod(tensor.shape)
        assert tensor.dtype == "bfloat16"
