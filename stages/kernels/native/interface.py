"""`interface.h` in Python: the same structs, field by field, and the types of its functions."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

WEIGHTS = {"float32": 0, "bfloat16": 1, "int8": 2}
"""How weights are held."""


class Shape(Structure):
    """Of the model, the same in all calls."""

    _fields_: ClassVar = [
        *((name, c_int32) for name in ("dim", "heads", "kv_heads", "head_dim", "ffn_dim")),
        *((name, c_int32) for name in ("experts", "experts_per_token", "weights", "bfloat16")),
        ("norm_eps", c_float),
        ("frequency", c_void_p),
    ]


class Matrix(Structure):
    """A packed weight."""

    _fields_: ClassVar = [("panels", c_void_p), ("outputs", c_int32), ("inputs", c_int32)]


class Layer(Structure):
    """One layer's weights."""

    _fields_: ClassVar = [
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("gate", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", POINTER(Matrix)),
        ("down", POINTER(Matrix)),
    ]


class Plan(Structure):
    """One window class in one step."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("pieces", c_int32),
        *((name, c_void_p) for name in ("first", "length", "blocks", "held")),
        *((name, c_int32) for name in ("block", "ring", "window")),
    ]


class Block(Structure):
    """One block of one layer."""

    _fields_: ClassVar = [("layer", c_void_p), ("plan", c_void_p), ("cache", c_void_p)]


class Sampling(Structure):
    """How rows of logits are sampled."""

    _fields_: ClassVar = [
        ("rows", c_int32),
        ("ids", c_int32),
        ("vocabulary", c_int32),
        ("stride", c_int64),
        *((name, c_void_p) for name in ("temperature", "top_k", "top_p", "min_p", "noise", "banned", "banned_count")),
    ]


class Sampled(Structure):
    """What is chosen."""

    _fields_: ClassVar = [(name, c_void_p) for name in ("token", "log_probability", "finite")]


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions' types."""
    shape, layer, block, matrix = POINTER(Shape), POINTER(Layer), POINTER(Block), POINTER(Matrix)
    int32, pointer = c_int32, c_void_p
    for name, result, *arguments in (
        ("panel_columns", int32),
        ("variant", c_char_p),
        ("create", pointer),
        ("destroy", None, pointer),
        ("packed_bytes", c_int64, int32, int32, int32, int32),
        ("pack", None, int32, pointer, pointer, int32, int32, pointer),
        ("plan_flaw", c_char_p, POINTER(Plan), c_int64, int32),
        ("cache_block", c_int64, shape, int32),
        ("attention", None, pointer, int32, shape, block, pointer, pointer),
        ("experts", None, pointer, int32, shape, layer, int32, pointer, pointer),
        ("blocks", None, pointer, int32, shape, block, int32, pointer, pointer),
        ("widen", int32, pointer, int32, int32, pointer, int32, pointer, int32, int32, pointer),
        ("head", int32, pointer, int32, shape, pointer, matrix, int32, pointer, int32, pointer, pointer),
        ("sample", None, pointer, int32, POINTER(Sampling), pointer, POINTER(Sampled)),
        ("score", None, pointer, int32, int32, int32, c_int64, pointer, pointer, pointer),
    ):
        function = getattr(library, f"tramontane_{name}")
        function.restype, function.argtypes = result, arguments
    return library
