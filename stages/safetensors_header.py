"""The header of one safetensors file, read and checked without touching the tensors' bytes. No torch.

A file is 8 bytes of length (little-endian), a JSON header of that length, and the data; the header gives each tensor's
dtype, shape and place in the data (https://huggingface.co/docs/safetensors, "Format"). Tensors must cover the data
exactly, without overlap, so that nothing in the file goes unaccounted for.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tramontane.stages.folder import LFS_POINTER, check_no_pointer, in_words, open_regular, shown

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

LONGEST_NAME, MOST_DIMENSIONS = 256, 8

DTYPES = {"F32": ("float32", 4), "BF16": ("bfloat16", 2)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    file: Path
    dtype: str
    """`float32` or `bfloat16`."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""
    size: int
    """Bytes."""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name.

    Raises:
        ValueError: the file is unreadable, truncated, or not a safetensors file, or a tensor's dtype is not supported;
            names the file and, where there is one, the tensor.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            beginning = stream.read(len(LFS_POINTER))
            check_no_pointer(file, beginning)
            length = int.from_bytes(beginning[:8], "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"{file}: truncated, or not a safetensors file: {size} bytes, header of {length}")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except _RepeatedKeyError as error:
        raise ValueError(f"{file}: the header names {error} twice") from None
    except (ValueError, RecursionError) as error:  # undecodable, no JSON, a number of 5,000 digits, too deep
        raise ValueError(f"{file}: its header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the header is {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, name, entry, 8 + length) for name, entry in header.items()]
    _check_cover(file, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


class _RepeatedKeyError(Exception):
    """A JSON object with the same key twice."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen = set[str]()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise _RepeatedKeyError(in_words(twice))
    return values


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(f"{file}: a tensor is called {shown(name)}")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{file}: tensor {name} has no dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{file}: tensor {name} has dtype {in_words(dtype)}; supported: {', '.join(DTYPES)}")
    numbers = [*shape, start, end] if isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS else [None]
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{file}: tensor {name} has shape {shown(shape)} and data_offsets {shown([start, end])}")
    ours, item_bytes = DTYPES[dtype]
    if end - start != math.prod(shape) * item_bytes:
        raise ValueError(f"{file}: tensor {name} has {end - start} bytes for shape {shape} of {dtype}")
    return TensorInfo(name, file, ours, tuple(shape), data_start + start, end - start)


def _check_cover(file: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    reached = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.size)):
        end = tensor.start + tensor.size
        if end > size:
            raise ValueError(f"{file}: truncated: tensor {tensor.name} ends at byte {end}, the file at {size}")
        if tensor.start != reached:
            raise ValueError(f"{file}: tensor {tensor.name} starts at byte {tensor.start}, not at {reached}")
        reached = end
    if reached != size:
        raise ValueError(f"{file}: {size - reached} bytes after the last tensor belong to none")
