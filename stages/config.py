"""The model's shape, read from a Hugging Face `config.json` and checked once.

Absent keys take the defaults of the class that the checkpoint names (`transformers` 5: `MistralConfig`,
`MinistralConfig`, `MixtralConfig`), since the weights were trained with those. A key that changes the computation in a
way that we do not compute is refused (`config_keys.py`), never ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tramontane.stages.config_keys import check_keys
from tramontane.stages.folder import CONFIG, SmallFiles, in_words, shown

LARGEST = {"max_position_embeddings": 1 << 24, "num_hidden_layers": 512, "num_local_experts": 512}
"""The largest values of these keys, several times those of any model, so that planning from them takes no time."""
LARGEST_NUMBER = 2**31 - 1
"""The largest value of the other keys: positions, ids and shapes travel as int32."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ArchitectureDefaults:
    """What an absent key of `config.json` means for one architecture."""

    sliding_window: int | None
    rms_norm_eps: float
    rope_theta: float
    sparse: bool
    model_types: tuple[str, ...]
    """The values that `model_type` may have."""


DENSE = ArchitectureDefaults(4096, 1e-6, 10_000.0, sparse=False, model_types=("mistral", "ministral"))
ARCHITECTURES = {
    "MistralForCausalLM": DENSE,
    "MixtralForCausalLM": ArchitectureDefaults(None, 1e-5, 1_000_000.0, sparse=True, model_types=("mixtral",)),
    "MinistralForCausalLM": DENSE,  # a Mistral with `layer_types`, to transformers
}
FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = {FULL: FULL, SLIDING: SLIDING, "attention": FULL}
"""The values in `layer_types`; the last is an older name of the first."""


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
    bos_id: int | None

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self.windows)

    @property
    def window_classes(self) -> tuple[int | None, ...]:
        """The different windows, in order of their first layer. Layers of one class share block pool and tables.

        >>> from dataclasses import replace
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
        """Read a checkpoint folder's `config.json`; see `read`."""
        return cls.read(SmallFiles.read(model_dir, [CONFIG]))

    @classmethod
    def read(cls, files: SmallFiles) -> ModelConfig:
        """The shape that `config.json` describes. (EOS belongs to the vocabulary: other files name it, too.)

        Raises:
            ValueError: the folder holds no readable `config.json`, or it describes a model that is not supported.
        """
        values = files.json(CONFIG)
        try:
            return cls.from_hf(values)
        except ValueError as error:
            raise ValueError(f"{files.folder / CONFIG}: {error}") from None


def _from_hf(values: Mapping[str, Any]) -> ModelConfig:
    architecture = _architecture(values)
    defaults = ARCHITECTURES[architecture]
    check_keys(values, defaults.model_types)

    layers = _positive(values, "num_hidden_layers", 32)
    dim = _positive(values, "hidden_size", 4096)
    heads = _positive(values, "num_attention_heads", 32)
    kv_heads = _positive(values, "num_key_value_heads", 8, null=heads)
    head_dim = _positive(values, "head_dim", None, null=dim // heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary positions need an even one")
    experts = _experts(values) if defaults.sparse else 0
    experts_per_token = _positive(values, "num_experts_per_tok", 2) if defaults.sparse else 0
    if experts_per_token > experts:
        raise ValueError(f"num_experts_per_tok is {experts_per_token}, more than num_local_experts {experts}")
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
        windows=_windows(values, layers, defaults),
        context=_positive(values, "max_position_embeddings", 131_072),
        rope_theta=_rope_theta(values, defaults.rope_theta),
        norm_eps=_positive_number("rms_norm_eps", values.get("rms_norm_eps", defaults.rms_norm_eps)),
        tied=_tied(values),
        bos_id=_bos_id(values, vocab),
    )


def _architecture(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or str(names[0]) not in ARCHITECTURES:
        raise ValueError(f"architectures is {shown(names)}; supported: {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _positive(values: Mapping[str, Any], key: str, default: int | None, null: int | None = None) -> int:
    """A whole number above 0; an absent key gives `default`, and a null, absent or not, gives `null`."""
    value = values.get(key, default)
    if value is None and null is not None:
        value = null
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {shown(value)}; it must be a whole number above 0")
    if value > (most := LARGEST.get(key, LARGEST_NUMBER)):
        raise ValueError(f"{key} is {shown(value)}; it may be {most} at most")
    return value


def _experts(values: Mapping[str, Any]) -> int:
    """The number of experts. `num_experts` is another name of `num_local_experts`."""
    names = ("num_local_experts", "num_experts")
    counts = [_positive(values, name, None) for name in names if name in values]
    if len(set(counts)) > 1:
        raise ValueError(f"num_local_experts is {counts[0]}, and num_experts {counts[1]}: they are the same")
    return counts[0] if counts else 8


def _windows(values: Mapping[str, Any], layers: int, defaults: ArchitectureDefaults) -> tuple[int | None, ...]:
    """Each layer's window: `sliding_window`, or None where `layer_types` gives the layer full attention."""
    window = values.get("sliding_window", defaults.sliding_window)
    if window is not None:
        window = _positive(values, "sliding_window", defaults.sliding_window)
    types = values.get("layer_types")
    if types is None:
        return (window,) * layers
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"layer_types is {shown(types)}; it must be a list of {layers}, one a layer")
    for layer, kind in enumerate(types):
        if not isinstance(kind, str) or kind not in LAYER_TYPES:
            raise ValueError(f"layer_types: layer {layer} is {shown(kind)}; supported: {FULL!r}, {SLIDING!r}")
        if LAYER_TYPES[kind] == SLIDING and window is None:
            raise ValueError(f"layer_types: layer {layer} is {kind!r}, and sliding_window is null")
        if LAYER_TYPES[kind] == FULL and window is not None and defaults.sparse:
            # transformers masks all layers of a Mixtral alike, but caches keys by these types.
            raise ValueError(f"layer_types: layer {layer} is {kind!r}, and sliding_window is {window} for all layers")
    return tuple(window if LAYER_TYPES[kind] == SLIDING else None for kind in types)


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """`rope_parameters` (transformers 5), else `rope_theta` beside `rope_scaling`; only the default type is known."""
    theta = values.get("rope_theta", default)
    given = [key for key in ("rope_scaling", "rope_parameters") if values.get(key)]
    if len(given) == 2:
        raise ValueError("rope_scaling and rope_parameters are both set; transformers 5 writes the latter only")
    for key in given:
        parameters = values[key]
        if not isinstance(parameters, dict):
            raise ValueError(f"{key} is {shown(parameters)}; it must be an object or null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{key}: RoPE scaling of type {shown(kind)} is not supported; supported: 'default'")
        theta = parameters.get("rope_theta", theta)
        for option, value in parameters.items():
            if option not in ("rope_type", "type", "rope_theta") and (option, value) != ("partial_rotary_factor", 1):
                raise ValueError(
                    f"{key}: {in_words(option)} is {shown(value)}, which RoPE of the default type does not know"
                )
    return _positive_number("rope_theta", theta)


def _positive_number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{key} is {shown(value)}; it must be a number above 0")
    return float(value)


def _tied(values: Mapping[str, Any]) -> bool:
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {shown(tied)}; it must be true or false")
    return tied


def _bos_id(values: Mapping[str, Any], vocab: int) -> int | None:
    """The id of BOS, which is one id, null, or the first of a list."""
    value = values.get("bos_token_id", 1)
    first = value[0] if isinstance(value, list) and value else None if value == [] else value
    if first is None:
        return None
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < vocab:
        raise ValueError(f"bos_token_id is {shown(value)}; it must be an id below vocab_size {vocab} or null")
    return first


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
    bos_id=1,
)
