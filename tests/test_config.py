"""The model's shape is read from `config.json` as transformers would read it, and what we cannot run is refused."""

import dataclasses
import json

import pytest
from models import SHAPE, SPARSE_SHAPE, cached_checkpoint
from transformers import AutoConfig

from tramontane.stages.config import EXAMPLE, ModelConfig

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
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
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
    assert ours.dtype == str(theirs.dtype or "float32").removeprefix("torch.")


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
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


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
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is set"),
        ({"dtype": "float16"}, "dtype is 'float16'; supported: float32 and bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
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
        ({"eos_token_id": 99}, "eos_token_id is 99; it must be an id below vocab_size 99"),
        ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1]"),
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


def test_eos_ids_come_from_the_generation_config_first(tmp_path):
    assert ModelConfig.load(written(tmp_path, MIXTRAL | {"eos_token_id": None})).eos_ids == ()
    assert ModelConfig.load(written(tmp_path, MIXTRAL | {"eos_token_id": [5, 6]})).eos_ids == (5, 6)
    folder = written(tmp_path, MIXTRAL, generation_config={"eos_token_id": None})
    assert ModelConfig.load(folder).eos_ids == (2,)
    folder = written(tmp_path, MIXTRAL, generation_config={"eos_token_id": [7, 8]})
    assert ModelConfig.load(folder).eos_ids == (7, 8)
    folder = written(tmp_path, MIXTRAL, generation_config={"eos_token_id": 400})
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is 400"):
        ModelConfig.load(folder)


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


def test_absent_or_null_heads_fall_back(tmp_path):
    assert ModelConfig.load(written(tmp_path, MISTRAL | {"num_key_value_heads": None})).kv_heads == 6
    assert ModelConfig.load(written(tmp_path, MISTRAL | {"head_dim": None})).head_dim == 40 // 6


def test_window_classes_keep_the_order_of_layers():
    config = dataclasses.replace(EXAMPLE, windows=(None, 8, 4, 8))
    assert config.window_classes == (None, 8, 4)
    assert config.smallest_window == 4
    assert dataclasses.replace(EXAMPLE, windows=(None, None)).smallest_window is None
