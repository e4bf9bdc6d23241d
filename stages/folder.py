"""A checkpoint folder's small files, and what to say of a folder that holds something else. No torch."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FOREIGN_FILES = {
    "params.json": "Mistral's own layout",
    "consolidated*": "Mistral's own layout",
    "pytorch_model*.bin*": "pickled weights",
    "*.pt": "pickled weights",
    "*.pth": "pickled weights",
    "*.gguf": "GGUF",
    "*.ggml": "GGML",
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
    "adapter_*": "an adapter without its base model",
}
"""Files of formats that are not read, by pattern."""

SHOWN_FILES = 5


def describe_folder(folder: Path) -> str:
    """What a checkpoint folder should hold, and what this one holds instead, for a refusal."""
    wanted = "a checkpoint is a Hugging Face folder with config.json and model.safetensors (or its index and shards)"
    if not folder.is_dir():
        return f"{wanted}; {folder} is no folder"
    held = sorted(path.name for path in folder.iterdir())
    foreign = {
        name: kind for name in held for pattern, kind in reversed(FOREIGN_FILES.items()) if fnmatch(name, pattern)
    }
    shown = [f"{name} ({kind}, not supported)" for name, kind in foreign.items()] or held
    return f"{wanted}; {folder} holds {', '.join(shown[:SHOWN_FILES]) if shown else 'nothing'}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file (says what the folder holds instead), or it holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {describe_folder(path.parent)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not an object")
    return values
