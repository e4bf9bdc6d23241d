"""The model's shape, read from a Hugging Face `config.json` and checked once.

Absent keys take the defaults of the class that the checkpoint names (`transformers` 5: `MistralConfig`,
`MixtralConfig`), since that is what the weights were trained with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ArchitectureDefaults:
    """What an absent key of `config.json` means for one architecture."""

    sliding_window: int | None
    rms_norm_eps: float
    rope_theta: float
    sparse: bool


ARCHITECTURES = {
    "MistralForCausalLM": ArchitectureDefaults(4096, 1e-6, 10_000.0, sparse=False),
    "MixtralForCausalLM": ArchitectureDefaults(None, 1e-5, 1_000_000.0, sparse=True),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Mistral (dense) or Mixtral (sparse) decoder.

    `windows[i]` is layer i's sliding window in positions, oneself included; None is full causal attention.
    `experts` is 0 for a dense model.
    """

    architecture: str
    vocab: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    experts: int
    experts_per_token: int
    windows: tuple[int | None, ...]
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool
    dtype: str
    bos_id: int | None
    eos_ids: tuple[int, ...]

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.windows)

    @property
    def window_classes(self) -> tuple[int | None, ...]:
        """The different windows, in order of their first layer. Layers of one class share block pool and tables.

        >>> replace(EXAMPLE, windows=(None, 8, 8, None)).window_classes
        (None, 8)
        """
        return tuple(dict.fromkeys(self.windows))

    @property
    def smallest_window(self) -> int | None:
        """The smallest finite window of any layer, or None where every layer sees the whole context."""
        return min((window for window in self.windows if window is not None), default=None)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the keys of a `config.json`.

        Raises:
            ValueError: names the key, its value and what is supported.
        """
        return _from_hf(values)

    @classmethod
    def load(cls, model_dir: Path) -> ModelConfig:
        """Read `config.json` and, for the EOS ids, `generation_config.json` of a checkpoint folder.

        Raises:
            ValueError: the folder holds no readable `config.json`, or it describes a model that is not supported.
        """
        config = cls.from_hf(_read_json(model_dir / "config.json"))
        generation = model_dir / "generation_config.json"
        if generation.exists():
            eos_ids = _ids(_read_json(generation).get("eos_token_id"), "generation_config.json: eos_token_id")
            if eos_ids:
                config = replace(config, eos_ids=eos_ids)
        for eos_id in config.eos_ids:
            if eos_id >= config.vocab:
                raise ValueError(f"eos_token_id is {eos_id}, and the vocabulary has {config.vocab} ids")
        return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint is a Hugging Face folder with config.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not an object")
    return values


def _from_hf(values: Mapping[str, Any]) -> ModelConfig:
    architecture = _architecture(values)
    defaults = ARCHITECTURES[architecture]
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act is {activation!r}; supported: 'silu'")
    if values.get("quantization_config") is not None:
        raise ValueError("quantization_config is set; supported: float32 and bfloat16 checkpoints")

    layers = _positive(values, "num_hidden_layers", 32)
    dim = _positive(values, "hidden_size", 4096)
    heads = _positive(values, "num_attention_heads", 32)
    kv_heads = _positive(values, "num_key_value_heads", 8, null=heads)
    head_dim = _positive(values, "head_dim", None, null=dim // heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary positions need an even one")
    experts = _positive(values, "num_local_experts", 8) if defaults.sparse else 0
    experts_per_token = _positive(values, "num_experts_per_tok", 2) if defaults.sparse else 0
    if experts_per_token > experts:
        raise ValueError(f"num_experts_per_tok is {experts_per_token}, more than num_local_experts {experts}")
    window = values.get("sliding_window", defaults.sliding_window)
    if window is not None:
        window = _positive(values, "sliding_window", defaults.sliding_window)
    vocab = _positive(values, "vocab_size", 32_000)
    return ModelConfig(
        architecture=architecture,
        vocab=vocab,
        dim=dim,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=_positive(values, "intermediate_size", 14_336),
        experts=experts,
        experts_per_token=experts_per_token,
        windows=(window,) * layers,
        context=_positive(values, "max_position_embeddings", 131_072),
        rope_theta=_rope_theta(values, defaults.rope_theta),
        norm_eps=float(values.get("rms_norm_eps", defaults.rms_norm_eps)),
        tied=bool(values.get("tie_word_embeddings", False)),
        dtype=_dtype(values),
        bos_id=next(iter(_ids(values.get("bos_token_id", 1), "bos_token_id")), None),
        eos_ids=_ids(values.get("eos_token_id", 2), "eos_token_id"),
    )


def _architecture(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ValueError(f"architectures is {names!r}; supported: {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _positive(values: Mapping[str, Any], key: str, default: int | None, null: int | None = None) -> int:
    """A whole number above 0; an absent key gives `default`, and a null, absent or not, gives `null`."""
    value = values.get(key, default)
    if value is None and null is not None:
        value = null
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number above 0")
    return value


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """`rope_parameters` (transformers 5), else `rope_theta` beside `rope_scaling`; only the default type is known."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ValueError(f"RoPE scaling of type {kind!r} is not supported; supported: 'default'")
    theta = parameters.get("rope_theta", values.get("rope_theta", default))
    if not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta is {theta!r}; it must be a number above 0")
    return float(theta)


def _dtype(values: Mapping[str, Any]) -> str:
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name == "float16":
        raise ValueError("dtype is 'float16'; supported: float32 and bfloat16 checkpoints")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype is {name!r}; supported: {', '.join(DTYPE_BYTES)}")
    return str(name)


def _ids(value: Any, key: str) -> tuple[int, ...]:
    """None, one id or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{key} is {value!r}; it must be an id, a list of ids or null")
    return tuple(ids)


# The numbers that docstrings and first tests use: 4 layers, 4 heads over 2 KV heads.
EXAMPLE = ModelConfig(
    architecture="MixtralForCausalLM",
    vocab=64,
    dim=16,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_dim=24,
    experts=4,
    experts_per_token=2,
    windows=(8, 8, 8, 8),
    context=64,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tied=False,
    dtype="float32",
    bos_id=1,
    eos_ids=(2,),
)
