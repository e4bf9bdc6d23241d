"""A checkpoint folder's small files, and what to say of a folder that holds something else. No torch."""

from __future__ import annotations

import errno
import json
import os
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

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
LARGEST_BYTES = 256 << 20
"""Of a file that is read whole: configuration, tokenizer, index."""


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


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file for reading that must be one: a pipe would be waited for, and a device need not end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  (handed on)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file")
    return file


def read_whole(path: Path, limit: int = LARGEST_BYTES) -> bytes:
    """A file's bytes.

    Raises:
        OSError: see `open_regular`.
        ValueError: it is longer than the limit.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: there is no such file (says what the folder holds instead), or it holds no JSON object.
    """
    try:
        values = json.loads(read_whole(path).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {describe_folder(path.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:  # of ValueErrors json and the decoder have their own
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {type(values).__name__}, not an object")
    return values
