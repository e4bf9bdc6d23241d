"""The keys of `config.json` that change what transformers computes, and the values for which it computes what we do.

They come from transformers 5.23: from `MistralConfig`, `MinistralConfig`, `MixtralConfig`, `PreTrainedConfig`, and from
what their models, masks and caches read. A key that none of these reads may have any value. So may these keys:

    attention_dropout, router_jitter_noise, initializer_range, router_aux_loss_coef    in training only
    use_cache, chunk_size_feed_forward, attn_implementation, experts_implementation    other ways to the same numbers
    output_*, return_dict, tie_last_hidden_states                                      what is returned beside logits
    pad_token_id                                                                       no gradient for that row
    attention_bias, mlp_bias, use_sliding_window                                       ignored by these models
    dtype, torch_dtype                                                                 the tensors say what they are
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tramontane.stages.folder import shown

COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "is_causal": (True,),
    "is_encoder_decoder": (False, None),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None, []),
    "per_layer_config": (None, {}),
    "text_config": (None, {}),  # it would hold the shape of the model
    "partial_rotary_factor": (1, None),
    "llama_4_scaling": (None, {}),  # of queries: vLLM computes it, transformers' Mistral does not
    "quantization_config": (None,),
    "compression_config": (None,),
    "quantization": (None,),  # MLX
}
"""The supported values of each key; no such key is right as well."""


def check_keys(values: Mapping[str, Any], model_types: tuple[str, ...]) -> None:
    """Refuse a configuration with which transformers computes something that we do not.

    Raises:
        ValueError: the message names the key, its value and what is supported.
    """
    for key, supported in COMPUTED.items():
        if key in values and not any(_same(values[key], value) for value in supported):
            known = " or ".join(repr(value) for value in supported if value not in ({}, []))
            raise ValueError(
                f"{key} is {shown(values[key])}; supported: {known.replace('None', 'null, or no such key')}"
            )
    kind = values.get("model_type")
    if kind is not None and kind not in model_types:
        known = " or ".join(map(repr, model_types))
        raise ValueError(f"model_type is {shown(kind)}; supported with this architecture: {known}")


def _same(one: Any, other: Any) -> bool:
    """Equality as in a configuration: 1.0 is 1, and `True` is not."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
