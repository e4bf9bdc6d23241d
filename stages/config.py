"""The model's shape, read from a Hugging Face `config.json` and checked once.

Absent keys take the defaults of the class that the checkpoint names (`transformers` 5: `MistralConfig`,
`MixtralConfig`), since that is what the weights were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tramontane.stages.folder import CONFIG, GENERATION, SmallFiles

LARGEST = {"max_position_embeddings": 1 << 24, "num_hidden_layers": 512, "num_local_experts": 512}
"""The most that these keys may say: several times what any model has. What is planned from them takes no time."""
LARGEST_NUMBER = 2**31 - 1
"""Of the other keys: positions, ids and shapes travel as int32."""
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
    """Positions that the model was made for, prompt and completion together (`max_position_embeddings`)."""
    rope_theta: float
    norm_eps: float
    tied: bool
    dtype: str
    """What `config.json` says, float32 where it is silent. What the tensors really are is `Checkpoint.dtype`."""
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
        """`read` of a checkpoint folder."""
        return cls.read(SmallFiles.read(model_dir, [CONFIG, GENERATION]))

    @classmethod
    def read(cls, files: SmallFiles) -> ModelConfig:
        """What `config.json` and, for the EOS ids, `generation_config.json` say.

        Raises:
            ValueError: the folder holds no readable `config.json`, or it describes a model that is not supported.
        """
        values = files.json(CONFIG)
        try:
            config = cls.from_hf(values)
        except ValueError as error:
            raise ValueError(f"{files.folder / CONFIG}: {error}") from None
        if files.contents[GENERATION] is not None:
            generation = files.json(GENERATION)
            try:
                eos_ids = _ids(generation.get("eos_token_id"), "eos_token_id", config.vocab)
            except ValueError as error:
                raise ValueError(f"{files.folder / GENERATION}: {error}") from None
            config = replace(config, eos_ids=eos_ids or config.eos_ids)
        return config


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
        norm_eps=_positive_number("rms_norm_eps", values.get("rms_norm_eps", defaults.rms_norm_eps)),
        tied=_tied(values),
        dtype=_dtype(values),
        bos_id=next(iter(_ids(values.get("bos_token_id", 1), "bos_token_id", vocab)), None),
        eos_ids=_ids(values.get("eos_token_id", 2), "eos_token_id", vocab),
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
    if value > (most := LARGEST.get(key, LARGEST_NUMBER)):
        raise ValueError(f"{key} is {value}; it may be {most} at most")
    return value


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """`rope_parameters` (transformers 5), else `rope_theta` beside `rope_scaling`; only the default type is known."""
    theta = values.get("rope_theta", default)
    given = [key for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    if len(given) == 2:
        raise ValueError("rope_scaling and rope_parameters are both set; transformers 5 writes the latter only")
    for key in given:
        parameters = values[key]
        if not isinstance(parameters, dict):
            raise ValueError(f"{key} is {parameters!r}; it must be an object or null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{key}: RoPE scaling of type {kind!r} is not supported; supported: 'default'")
        theta = parameters.get("rope_theta", theta)
        for option, value in parameters.items():
            if option not in ("rope_type", "type", "rope_theta") and (option, value) != ("partial_rotary_factor", 1):
                raise ValueError(f"{key}: {option} is {value!r}, which RoPE of the default type does not know")
    return _positive_number("rope_theta", theta)


def _positive_number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}; it must be a number above 0")
    return float(value)


def _tied(values: Mapping[str, Any]) -> bool:
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r}; it must be true or false")
    return tied


def _dtype(values: Mapping[str, Any]) -> str:
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name == "float16":
        raise ValueError("dtype is 'float16'; supported: float32 and bfloat16 checkpoints")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype is {name!r}; supported: {', '.join(DTYPE_BYTES)}")
    return str(name)


def _ids(value: Any, key: str, vocab: int) -> tuple[int, ...]:
    """None, one id or a list of ids."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab:
            raise ValueError(
                f"{key} is {value!r}; it must be an id below vocab_size {vocab}, a list of such ids or null"
            )
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
