"""The model's shape is read from `config.json` as transformers would read it, and what we cannot run is refused."""

import dataclasses
import json

import pytest
import torch
from models import CLASSES, SHAPE, SPARSE_SHAPE, cached_checkpoint, hf_model
from transformers import AutoConfig

from tramontane.stages.config import EXAMPLE, ModelConfig
from tramontane.stages.folder import SmallFiles

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SPARSE_SHAPE}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SHAPE}


def written(path, values, **more_files):
    for name, content in {"config": values, **more_files}.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("values", [MISTRAL, MIXTRAL], ids=["mistral", "mixtral"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sliding_window": 12},
        {"sliding_window": None},
        {"head_dim": None, "hidden_size": 48},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": None, "rope_scaling": None},
        {"tie_word_embeddings": True},
    ],
    ids=str,
)
def test_agrees_with_transformers(tmp_path, values, change):
    folder = written(tmp_path, values | change)
    ours, theirs = ModelConfig.load(folder), AutoConfig.from_pretrained(folder)
    assert set(ours.windows) == {theirs.sliding_window}
    assert ours.layers == theirs.num_hidden_layers
    assert (ours.heads, ours.kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    ("architecture", "theta", "eps", "window"),
    [("MistralForCausalLM", 1e4, 1e-6, 4096), ("MixtralForCausalLM", 1e6, 1e-5, None)],
)
def test_absent_keys_take_the_defaults_of_the_class(tmp_path, architecture, theta, eps, window):
    model_type = architecture.removesuffix("ForCausalLM").lower()
    folder = written(tmp_path, {"architectures": [architecture], "model_type": model_type})
    ours, theirs = ModelConfig.load(folder), AutoConfig.from_pretrained(folder)
    assert (ours.rope_theta, ours.norm_eps, ours.windows[0]) == (theta, eps, window)
    assert (ours.rope_theta, ours.norm_eps) == (theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps)
    assert (ours.windows[0], ours.layers, ours.dim) == (theirs.sliding_window, theirs.num_hidden_layers, 4096)
    assert (ours.vocab, ours.ffn_dim, ours.context) == (32_000, theirs.intermediate_size, 131_072)
    assert ours.bos_id == theirs.bos_token_id


def test_reads_what_transformers_writes():
    config = ModelConfig.load(cached_checkpoint("MixtralForCausalLM", sliding_window=9))
    assert config == dataclasses.replace(
        EXAMPLE,
        vocab=99,
        dim=40,
        heads=6,
        ffn_dim=56,
        experts=5,
        windows=(9, 9, 9),
        context=256,
        rope_theta=1000.0,
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is ['LlamaForCausalLM']; supported: MistralForCausalLM, Mixtral"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequenceClassification"),
        ({"architectures": None}, "architectures is []"),
        ({"architectures": "MixtralForCausalLM"}, "architectures is 'MixtralForCausalLM'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters: RoPE scaling of type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling: RoPE scaling of type 'linear'"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "'llama3' is not supported"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling and rope_parameters are both set"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1.0}}}, "sliding_attention is {'rope_theta': 1.0}"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu' or 'swish'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}; "),
        ({"quantization": {"bits": 4}}, "quantization is {'bits': 4}; supported: null, or no such key"),
        ({"is_causal": False}, "is_causal is False; supported: True"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True; supported: False"),
        ({"attention_chunk_size": 64}, "attention_chunk_size is 64; supported: null"),
        ({"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config is {'1': {'head_dim': 16}}"),
        ({"kv_sharing_modes": ["full"]}, "kv_sharing_modes is ['full']"),
        ({"text_config": {"hidden_size": 8}}, "text_config is {'hidden_size': 8}"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; supported: 1 or null, or no such key"),
        ({"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling is {'beta': 0.1}"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported with this architecture: 'mixtral'"),
        ({"num_experts": 4}, "num_local_experts is 5, and num_experts 4: they are the same"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer 0 is 'sliding_attention', and sliding_window is null"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention', 'full_attention']; it "),
        ({"layer_types": 3}, "layer_types is 3; it must be a list of 3"),
        ({"layer_types": ["full_attention", "chunked_attention", 1]}, "layer 1 is 'chunked_attention'; supported: "),
        (
            {"layer_types": ["sliding_attention", "full_attention", "attention"], "sliding_window": 9},
            "layer_types: layer 1 is 'full_attention', and sliding_window is 9 for all layers",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number above 0"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings is 1000000000000; it may be 16777216 at most"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; it may be 512 at most"),
        ({"num_local_experts": 10**12}, "num_local_experts is 1000000000000; it may be 512 at most"),
        ({"sliding_window": 10**12}, "sliding_window is 1000000000000; it may be 2147483647 at most"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6, no multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even one"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, more than num_local_experts 5"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": [4, 8]}, "sliding_window is [4, 8]"),
        ({"rms_norm_eps": None}, "rms_norm_eps is None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_refusals_name_file_key_and_value(tmp_path, change, said):
    folder = written(tmp_path, MIXTRAL | change)
    with pytest.raises(ValueError, match=r"config\.json: ") as refusal:
        ModelConfig.load(folder)
    assert said in str(refusal.value)
    assert str(folder / "config.json") in str(refusal.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds nothing"),
        (["params.json", "consolidated.safetensors"], "params.json (Mistral's own layout, not supported)"),
        (["params.json", "consolidated.00.pth"], "consolidated.00.pth (Mistral's own layout, not supported)"),
        (["mixtral-8x7b.Q4_K_M.gguf"], "mixtral-8x7b.Q4_K_M.gguf (GGUF, not supported)"),
        (["notes.txt"], "holds notes.txt"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_a_wrong_folder_is_refused_by_what_it_holds(tmp_path, files, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"Hugging Face folder with config\.json") as refusal:
        ModelConfig.load(tmp_path)
    assert said in str(refusal.value)


def test_no_folder_at_all(tmp_path):
    (tmp_path / "model.gguf").touch()
    for path in (tmp_path / "nowhere", tmp_path / "model.gguf"):
        with pytest.raises(ValueError, match="is no folder") as refusal:
            ModelConfig.load(path)
        assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "cannot be read"), ("[1]", "holds list, not an object"), ("\udcff", "cannot be read")]
)
def test_a_broken_config_file_is_named(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=said) as refusal:
        ModelConfig.load(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


NEUTRAL = {
    "hidden_act": "swish",
    "is_causal": True,
    "is_encoder_decoder": False,
    "quantization_config": None,
    "text_config": None,
    "per_layer_config": None,
    "partial_rotary_factor": 1.0,
    "attention_dropout": 0.1,
    "attention_bias": True,
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 0,
    "output_hidden_states": True,
    "tie_last_hidden_states": True,
    "chunk_size_feed_forward": 7,
    "router_jitter_noise": 0.3,
    "use_sliding_window": False,
    "auto_map": {"AutoModelForCausalLM": "modeling.Mine"},
    "unsloth_fixed": True,
}


@pytest.mark.parametrize("architecture", CLASSES)
def test_keys_that_change_nothing_pass_and_change_nothing_in_transformers_either(architecture):
    """The same logits with all of them as with none."""
    plain = cached_checkpoint(architecture, sliding_window=9)
    values = json.loads((plain / "config.json").read_text()) | NEUTRAL
    assert ModelConfig.from_hf(values) == ModelConfig.load(plain)
    config_class, model_class, _ = CLASSES[architecture]
    model = model_class.from_pretrained(plain, config=config_class(**values), attn_implementation="eager").eval()
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=True).logits, hf_model(plain)(ids).logits)


@pytest.mark.parametrize("word", ["float16", "auto", "torch.float32", "float8_e4m3fn", None, 7])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_words_for_a_dtype_are_not_believed(key, word):
    """The tensors say what they are."""
    assert ModelConfig.from_hf(MISTRAL | {key: word}) == ModelConfig.from_hf(MISTRAL)


def test_layers_take_the_window_or_none_by_their_type():
    kinds = ["sliding_attention", "full_attention", "attention"]
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": 9, "layer_types": kinds}).windows == (9, None, None)
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": 9, "layer_types": None}).windows == (9, 9, 9)
    assert ModelConfig.from_hf(MIXTRAL | {"layer_types": ["full_attention"] * 3}).windows == (None, None, None)


def test_experts_have_two_names():
    values = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}
    assert ModelConfig.from_hf(values).experts == 8
    assert ModelConfig.from_hf(values | {"num_experts": 4}).experts == 4
    assert ModelConfig.from_hf(MIXTRAL | {"num_experts": 5}).experts == 5


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(MISTRAL))
    assert ModelConfig.load(tmp_path) == ModelConfig.from_hf(MISTRAL)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.model", "added_tokens.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer lies there; "),
    ],
    ids=["empty", "pointer"],
)
def test_a_file_that_was_not_fetched_is_told_so_once(tmp_path, name, content, said):
    written(tmp_path, MISTRAL)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r".") as refusal:
        SmallFiles.read(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / name}: {said}")
    assert str(refusal.value).count(str(tmp_path)) == 1


def test_absent_or_null_heads_fall_back(tmp_path):
    assert ModelConfig.load(written(tmp_path, MISTRAL | {"num_key_value_heads": None})).kv_heads == 6
    assert ModelConfig.load(written(tmp_path, MISTRAL | {"head_dim": None})).head_dim == 40 // 6


def test_window_classes_keep_the_order_of_layers():
    config = dataclasses.replace(EXAMPLE, windows=(None, 8, 4, 8))
    assert config.window_classes == (None, 8, 4)
    assert config.smallest_window == 4
    assert dataclasses.replace(EXAMPLE, windows=(None, None)).smallest_window is None
