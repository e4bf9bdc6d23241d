"""How the fields of a dataclass go into a frame's header, and come out of it, by their type hints.

A codec is made once for each class: bool, int, float, str, bytes, string enums, flat numpy arrays, dataclasses,
`X | None` and tuples of any length of these. Whatever is not exactly what the hint says is a mismatch, on both ways.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tramontane.cluster.log_lines import quoted

Buffer: TypeAlias = bytes | bytearray | memoryview
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

DTYPES = {code: np.dtype(code) for code in ("<i4", "<i8", "<u8", "<f4", "|b1")}
ALIGNMENT = 8
MAX_ARRAYS = 256
"""In one frame."""


class MismatchError(Exception):
    """A value that is not what its field's hint says. `path` grows from the inside out."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path

    def at(self, place: str) -> str:
        """One line, with the whole path below `place`."""
        return f"{place}{self.path}: {self.problem}"


class ArrayWriter:
    """Gathers the arrays of one message, padded."""

    def __init__(self) -> None:
        self.parts: list[Buffer] = []
        self.bytes = 0
        self._count = 0

    def add(self, array: Array) -> None:
        """Append one that is contiguous."""
        self._count += 1
        if self._count > MAX_ARRAYS:
            raise MismatchError(f"more than {MAX_ARRAYS} arrays")
        size = array.nbytes
        if size:
            self.parts.append(array.data)
            padding = -size % ALIGNMENT
            if padding:
                self.parts.append(bytes(padding))
            self.bytes += size + padding


class ArrayReader:
    """Hands out views of a frame's arrays, one after the other."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._offset = 0
        self._count = 0

    def take(self, dtype: np.dtype[Any], length: int) -> Array:
        """The next `length` items."""
        self._count += 1
        if self._count > MAX_ARRAYS:
            raise MismatchError(f"more than {MAX_ARRAYS} arrays")
        size = length * dtype.itemsize
        if size > len(self._data) - self._offset:
            raise MismatchError(f"{size} bytes of array, {len(self._data) - self._offset} are left")
        array = np.frombuffer(self._data, dtype, length, self._offset) if length else np.empty(0, dtype)
        self._offset += size + -size % ALIGNMENT
        return array

    def finish(self) -> None:
        """Nothing may be left over."""
        if self._offset != len(self._data):
            raise MismatchError(f"{len(self._data)} bytes of arrays, {self._offset} belong to fields")


@dataclass(frozen=True)
class Codec:
    """How values of one type hint go into a header, and come out of it."""

    pack: Callable[[Any, ArrayWriter], object]
    unpack: Callable[[Any, ArrayReader], object]


def _codec(hint: Any) -> Codec:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is np.ndarray:
        return _array_codec(np.dtype(typing.get_args(arguments[1])[0]))
    if origin is tuple:
        item, ellipsis = arguments
        assert ellipsis is ..., f"{hint} is not a tuple of any length"
        return _tuple_codec(_codec(item))
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _optional_codec(_codec(inner))
    if dataclasses.is_dataclass(hint):
        return dataclass_codec(typing.cast(type, hint))
    if issubclass(hint, enum.StrEnum):
        return _enum_codec(hint)
    assert hint in (bool, int, float, str, bytes), f"no codec for {hint}"
    return _scalar_codec(hint)


def _scalar_codec(scalar: type) -> Codec:
    def check(value: Any, _: object) -> object:
        if type(value) is not scalar:
            raise MismatchError(f"{value!r:.50} is no {scalar.__name__}")
        return value

    def pack_float(value: Any, arrays: ArrayWriter) -> object:
        return check(float(value) if type(value) is int else value, arrays)

    return Codec(pack_float if scalar is float else check, check)


def _enum_codec(members: type[enum.StrEnum]) -> Codec:
    def pack(value: Any, _: ArrayWriter) -> object:
        if type(value) is not members:
            raise MismatchError(f"{value!r:.50} is no {members.__name__}")
        return value.value

    def unpack(value: Any, _: ArrayReader) -> object:
        if type(value) is not str or value not in members.__members__.values():
            raise MismatchError(f"{value!r:.50} is no {members.__name__}")
        return members(value)

    return Codec(pack, unpack)


def _optional_codec(inner: Codec) -> Codec:
    return Codec(
        lambda value, arrays: None if value is None else inner.pack(value, arrays),
        lambda value, arrays: None if value is None else inner.unpack(value, arrays),
    )


def _array_codec(dtype: np.dtype[Any]) -> Codec:
    code = dtype.str
    assert code in DTYPES, f"{dtype} is not in the list of dtypes"

    def pack(value: Any, arrays: ArrayWriter) -> object:
        if type(value) is not np.ndarray or value.dtype != dtype or value.ndim != 1:
            shape = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
            raise MismatchError(f"{shape} is no flat array of {dtype}")
        arrays.add(value if value.flags.c_contiguous else np.ascontiguousarray(value))
        return code, len(value)

    def unpack(value: Any, arrays: ArrayReader) -> object:
        if type(value) is not list or len(value) != 2 or value[0] != code or type(value[1]) is not int or value[1] < 0:
            raise MismatchError(f"{value!r:.50} is no flat array of {dtype}")
        array = arrays.take(dtype, value[1])
        if code == "|b1" and len(array) and array.view(np.uint8).max() > 1:
            raise MismatchError("a bool is neither 0 nor 1")
        return array

    return Codec(pack, unpack)


def _tuple_codec(item: Codec) -> Codec:
    def each(convert: Callable[[Any, Any], object], values: Any, arrays: Any) -> list[object]:
        if type(values) not in (tuple, list):
            raise MismatchError(f"{values!r:.50} is no list")
        converted = []
        for index, value in enumerate(values):
            try:
                converted.append(convert(value, arrays))
            except MismatchError as error:
                raise MismatchError(error.problem, f"[{index}]{error.path}") from None
        return converted

    return Codec(
        lambda values, arrays: each(item.pack, values, arrays),
        lambda values, arrays: tuple(each(item.unpack, values, arrays)),
    )


def dataclass_codec(record: type) -> Codec:
    """The codec of a dataclass: a map of its fields, all of them and no other."""
    hints = typing.get_type_hints(record)
    codecs = {field.name: _codec(hints[field.name]) for field in dataclasses.fields(record)}
    packs = [(name, codec.pack) for name, codec in codecs.items()]
    unpacks = [(name, codec.unpack) for name, codec in codecs.items()]

    def pack(value: Any, arrays: ArrayWriter) -> object:
        if type(value) is not record:
            raise MismatchError(f"{type(value).__name__} is no {record.__name__}")
        packed = {}
        for name, convert in packs:
            try:
                packed[name] = convert(getattr(value, name), arrays)
            except MismatchError as error:
                raise MismatchError(error.problem, f".{name}{error.path}") from None
        return packed

    def unpack(values: Any, arrays: ArrayReader) -> object:
        if type(values) is not dict:
            raise MismatchError(f"{values!r:.50} is no map of fields")
        if values.keys() != codecs.keys():
            name, problem = next(
                ((name, "is missing") for name in codecs if name not in values),
                (next((name for name in values if name not in codecs), ""), "is unknown"),
            )
            raise MismatchError(problem, f".{quoted(str(name), 50)}")
        unpacked = {}
        for name, convert in unpacks:
            try:
                unpacked[name] = convert(values[name], arrays)
            except MismatchError as error:
                raise MismatchError(error.problem, f".{name}{error.path}") from None
        return record(**unpacked)

    return Codec(pack, unpack)
