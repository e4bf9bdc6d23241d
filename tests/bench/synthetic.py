"""Random checkpoints of realistic shape: as large as a bench needs, made once, the same bytes on every machine.

mid         dim 1024, 8 layers of 8 experts (2 chosen) of 2048, 16 heads over 4 KV heads of 64, vocabulary 32,000:
            489,243,648 parameters; a decode step of one row reads 154,468,352 and the norms
mid-w       the same weights with a sliding window of 1,024
mid-dense   the dense Mistral of the same width: one FFN a layer
tiny, tiny-w, tiny-dense    the same three in small, to try the bench itself

Weights are drawn with a gain over 1 / sqrt(inputs), so that activations and logits keep about unit scale, attention is
peaked and routing decided: greedy decoding then takes no path that a trained model would not take. They are a folder
of bfloat16 tensors in Hugging Face's layout and have no tokenizer: token ids go in and come out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from tramontane.stages.config import ModelConfig
from tramontane.stages.layouts import Slot, slots, tensor_name, tensor_shape

SEED = 20_261_124
FILE = "model.safetensors"

MID = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 32_000,
    "max_position_embeddings": 8192,
}
TINY = MID | {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 1024,
}
SHARED = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
DENSE = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}

WINDOWS_GROWN = 32
"""A windowed model's context holds so many windows, and a chunk more."""


def _windowed(shape: dict[str, int], window: int) -> dict[str, object]:
    return shape | SPARSE | {"sliding_window": window, "max_position_embeddings": (WINDOWS_GROWN + 1) * window}


MODELS: dict[str, dict[str, object]] = {
    "mid": MID | SPARSE | {"sliding_window": None},
    "mid-w": _windowed(MID, 1024),
    "mid-dense": MID | DENSE | {"sliding_window": None},
    "tiny": TINY | SPARSE | {"sliding_window": None},
    "tiny-w": _windowed(TINY, 32),
    "tiny-dense": TINY | DENSE | {"sliding_window": None},
}
SAME_WEIGHTS = {"mid-w": "mid", "tiny-w": "tiny"}
"""Models that differ from another in their configuration only."""


def default_folder() -> Path:
    """Where the models are kept unless told otherwise: the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tramontane-bench"


def make_model(name: str, folder: Path) -> Path:
    """The folder of that model, made if it is not there, or is of another recipe."""
    path, values = folder / name, MODELS[name] | SHARED
    recipe = json.dumps(values | {"seed": SEED}, indent=1)
    done = path / "recipe.json"
    if done.exists() and done.read_text() == recipe:
        return path
    path.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    (path / "config.json").write_text(json.dumps(values, indent=1))
    (path / FILE).unlink(missing_ok=True)
    if name in SAME_WEIGHTS:
        make_model(SAME_WEIGHTS[name], folder)
        (path / FILE).symlink_to(Path("..") / SAME_WEIGHTS[name] / FILE)
    else:
        # A folder that was left half written has no recipe, and is made again.
        save_file(random_weights(ModelConfig.load(path)), path / FILE, metadata={"format": "pt"})
    done.write_text(recipe)
    return path


def random_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Every tensor in bfloat16, each from a seed of its own: the order in which they are made does not matter."""
    return {
        tensor_name(slot, config): _random(slot, tensor_shape(slot, config), SEED + number)
        for number, slot in enumerate(slots(config))
    }


def _random(slot: Slot, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 1:
        return values.mul_(0.2).add_(1.0).bfloat16()
    gain = {"q": 1.5, "k": 1.5, "gate": 2.0, "embedding": shape[-1] ** 0.5}.get(slot.role, 1.0)
    return values.mul_(gain / shape[-1] ** 0.5).bfloat16()
