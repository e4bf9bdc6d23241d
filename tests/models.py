"""Small random checkpoints for tests: written by transformers, so that its own layout on disk is what we read.

Weights are scaled so that nothing is flat: unit-scale activations and logits, peaked attention, decided routing.
"""

import functools
import io
import json
import tempfile
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tramontane.stages.config import ModelConfig

# Fewer KV heads than heads, heads x head_dim (48) other than dim (40), no size a multiple of another by accident.
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
SPARSE_SHAPE = SHAPE | {"num_local_experts": 5, "num_experts_per_tok": 2}
CLASSES = {
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM, SHAPE),
    "MixtralForCausalLM": (MixtralConfig, MixtralForCausalLM, SPARSE_SHAPE),
    "MinistralForCausalLM": (MinistralConfig, MinistralForCausalLM, SHAPE),
}
TOKENIZER_VOCAB = 320
TEXT = (
    "the wind comes over the mountains in spring and the snow on the ridge begins to melt while below in the valley "
    "people open their windows look up at a clear blue sky and say that it will last three days or six or nine as "
    "their parents said before them nobody knows why it should be so but nobody has ever counted it otherwise"
)

_cache_folder = tempfile.TemporaryDirectory(prefix="tramontane-checkpoints-")


def make_checkpoint(
    path: Path,
    architecture: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str | None = None,
    tokenizer: bool = False,
    **overrides,
) -> Path:
    """Write a random model of `architecture` into the folder `path`; `overrides` are keys of its config.json."""
    config_class, model_class, shape = CLASSES[architecture]
    if tokenizer:
        overrides = {"vocab_size": TOKENIZER_VOCAB} | overrides
    overrides = {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**(shape | overrides))).to(getattr(torch, dtype))
        for name, parameter in model.named_parameters():
            parameter.data = _random(name, parameter.shape, model.config.tie_word_embeddings).to(parameter.dtype)
    model.save_pretrained(path, **({"max_shard_size": shard_size} if shard_size else {}))
    if tokenizer:
        (path / "tokenizer.model").write_bytes(tiny_tokenizer())
    return path


@functools.cache
def cached_checkpoint(architecture: str, **options) -> Path:
    """The same folder for the same arguments, for tests that only read it."""
    return make_checkpoint(Path(tempfile.mkdtemp(dir=_cache_folder.name)), architecture, **options)


def hf_model(path: Path) -> PreTrainedModel:
    """The checkpoint in transformers, float32, with masks written out (`eager`)."""
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model_class = CLASSES[architecture][1]
    if "layer_types" in json.loads((path / "config.json").read_text()):
        model_class = AutoModelForCausalLM  # which alone looks at them, and takes such a model for a Ministral
    return model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return tensors


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Float32 tensors for any shape, also those that no config.json can express (windows that differ by layer)."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab, config.dim)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (config.dim,),
            prefix + "self_attn.q_proj.weight": (queries, config.dim),
            prefix + "self_attn.k_proj.weight": (keys, config.dim),
            prefix + "self_attn.v_proj.weight": (keys, config.dim),
            prefix + "self_attn.o_proj.weight": (config.dim, queries),
            prefix + "post_attention_layernorm.weight": (config.dim,),
        }
        if config.experts:
            shapes[prefix + "block_sparse_moe.gate.weight"] = (config.experts, config.dim)
            for expert in range(config.experts):
                name = f"{prefix}block_sparse_moe.experts.{expert}."
                shapes[name + "w1.weight"] = shapes[name + "w3.weight"] = (config.ffn_dim, config.dim)
                shapes[name + "w2.weight"] = (config.dim, config.ffn_dim)
        else:
            shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (
                config.ffn_dim,
                config.dim,
            )
            shapes[prefix + "mlp.down_proj.weight"] = (config.dim, config.ffn_dim)
    shapes["model.norm.weight"] = (config.dim,)
    if not config.tied:
        shapes["lm_head.weight"] = (config.vocab, config.dim)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return {name: _random(name, shape, config.tied) for name, shape in shapes.items()}


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The weights of a checkpoint folder, without a config.json."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@functools.cache
def tiny_tokenizer() -> bytes:
    """A trained SentencePiece model of about `TOKENIZER_VOCAB` pieces, with byte fallback: any text has ids."""
    words = TEXT.split()
    sentences = [" ".join(words[start : start + 7]) for start in range(len(words) - 7)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=TOKENIZER_VOCAB,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def _random(name: str, shape: tuple[int, ...], tied: bool) -> torch.Tensor:
    if len(shape) == 1:
        return 1 + 0.2 * torch.randn(shape)
    gain = 1.0
    if "q_proj" in name or "k_proj" in name:
        gain = 1.5
    elif name.endswith("gate.weight"):
        gain = 2.0
    elif "embed_tokens" in name and not tied:
        gain = shape[-1] ** 0.5
    return gain * torch.randn(shape) / shape[-1] ** 0.5
