"""A checkpoint folder's small files, and what to say of a folder that holds something else. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import reprlib
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.model"
ADDED, TOKENIZER_JSON, TOKENIZER_CONFIG = "added_tokens.json", "tokenizer.json", "tokenizer_config.json"
SMALL_FILES = (CONFIG, GENERATION, TOKENIZER, ADDED, TOKENIZER_JSON, TOKENIZER_CONFIG)
"""Beside the tensors, these decide which token comes next and how it reads."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of the text that Git LFS keeps in the place of a large file."""

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
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 100
LARGEST_BYTES = 256 << 20
"""Of a file that is read whole: configuration, tokenizer, index."""


class OtherBytes(ValueError):  # noqa: N818  (what was found, as much as an error)
    """A file of the checkpoint folder is not what the service has loaded."""


@dataclass(frozen=True)
class SmallFiles:
    """Small files of a checkpoint folder, read once: what is digested is what is used."""

    folder: Path
    contents: Mapping[str, bytes | None]
    """By name; None where the folder has no such file."""

    @classmethod
    def read(cls, folder: Path, names: Sequence[str] = SMALL_FILES) -> SmallFiles:
        """Read the files of these names.

        Raises:
            ValueError: a file is there and cannot be read, is empty, or is a Git LFS pointer.
        """
        return cls(folder, {name: _content(folder / name) for name in names})

    @property
    def digests(self) -> dict[str, bytes]:
        """SHA-256 of each that is there, by name."""
        return {
            name: hashlib.sha256(content).digest() for name, content in self.contents.items() if content is not None
        }

    def check(self, known: Mapping[str, bytes]) -> None:
        """Compare what was read with the digests that are known of all small files.

        Raises:
            OtherBytes: names the first file that differs.
        """
        mine = self.digests
        for name in self.contents:
            if mine.get(name) != known.get(name):
                raise OtherBytes(f"{self.folder / name}: not the file that the service has loaded")

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of them.

        Raises:
            ValueError: there is no such file (says what the folder holds instead), or it holds no JSON object.
        """
        path, content = self.folder / name, self.contents[name]
        if content is None:
            raise ValueError(f"{path}: no such file; {describe_folder(self.folder)}")
        try:
            values = json.loads(content.decode("utf-8-sig"))  # some editors put a byte order mark first
        except (ValueError, RecursionError) as error:  # undecodable, no JSON, a number of 5,000 digits, too deep
            raise ValueError(f"{path}: cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: holds {type(values).__name__}, not an object")
        return values


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


def shown(value: object) -> str:
    """A value from a file, for a message: in one line, and shortened where it is long.

    >>> shown(["a\\nb", 7])
    "['a\\\\nb', 7]"
    """
    return _shortened.repr(value)


def in_words(value: object) -> str:
    """A name from a file, for a message: as `shown`, but without quotes where it needs none.

    >>> in_words("model.norm.weight"), in_words("two\\nlines")
    ('model.norm.weight', "'two\\\\nlines'")
    """
    plain = isinstance(value, str) and value.isprintable() and len(value) <= _shortened.maxstring
    return str(value) if plain else shown(value)


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


def check_no_pointer(path: Path, beginning: bytes) -> None:
    """Refuse the pointer that Git LFS leaves in the place of a large file that it has not fetched.

    Raises:
        ValueError: the file begins as such a pointer.
    """
    if beginning.startswith(LFS_POINTER):
        raise ValueError(f"{path}: a Git LFS pointer lies there; `git lfs pull` fetches the file itself")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises as `SmallFiles.json` does."""
    return SmallFiles.read(path.parent, [path.name]).json(path.name)


def _content(path: Path) -> bytes | None:
    try:
        content = read_whole(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not content:
        raise ValueError(f"{path}: is empty")
    check_no_pointer(path, content)
    return content
