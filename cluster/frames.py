"""Messages as bytes, and back. A frame is a prefix and three parts:

    prefix   3 x uint32, little-endian: how many bytes of header, arrays and rows follow
    header   msgpack [kind, {field: value, ...}]; the value of an array is [dtype, length]
    arrays   raw little-endian bytes in the order of the fields, each padded to a multiple of 8 bytes
    rows     a stage's output, raw; behind a Microbatch only

What may be in a header follows from the type hints of the dataclasses in `KINDS`, and nothing else can be decoded.
The plan of each class is made once, when this module is imported.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias, cast

import msgpack

from tramontane.cluster.fields import ArrayReader, ArrayWriter, Buffer, Codec, MismatchError, dataclass_codec
from tramontane.cluster.messages import Cancel, Challenge, Finished, Heartbeat, Hello, Load, Submit, Tokens, Welcome
from tramontane.stages.microbatch import Microbatch, StepResult

Message: TypeAlias = (
    Challenge | Hello | Welcome | Submit | Cancel | Tokens | Finished | Load | Heartbeat | Microbatch | StepResult
)

KINDS: dict[str, type[Message]] = {
    "challenge": Challenge,
    "hello": Hello,
    "welcome": Welcome,
    "submit": Submit,
    "cancel": Cancel,
    "tokens": Tokens,
    "finished": Finished,
    "load": Load,
    "heartbeat": Heartbeat,
    "microbatch": Microbatch,
    "step_result": StepResult,
}

PREFIX = struct.Struct("<III")
MAX_JOINED = 64 << 10
"""Bytes of arrays that are cheaper to copy into one buffer than to send one by one."""
MAX_ITEMS = 1024
"""Of any list or map in a header; msgpack allocates them before it has seen their contents."""


@dataclass(frozen=True)
class Limits:
    """The most bytes of each part that a receiver takes."""

    header: int
    arrays: int
    rows: int


LIMITS = Limits(header=64 << 10, arrays=64 << 20, rows=1 << 30)
HANDSHAKE_LIMITS = Limits(header=1 << 10, arrays=0, rows=0)
"""For strangers."""


class FrameError(ValueError):
    """Bytes that are no frame of ours, or a message that does not fit into one; says which part or field."""


@dataclass(frozen=True)
class Prefix:
    """Bytes of each part to come."""

    header: int
    arrays: int
    rows: int


def encode(message: Message, rows: int = 0) -> list[Buffer]:
    """The frame up to its rows, as buffers to be sent one after the other; `rows` bytes are to follow.

    One buffer where it is small, else the arrays themselves behind the header.

    Raises:
        FrameError: the message is of no kind that we know, has a field of another type than its hint says, or is
            larger than `LIMITS`.
    """
    known = _BY_CLASS.get(type(message))
    if known is None:
        raise FrameError(f"kind: {type(message).__name__} is no message")
    kind, codec = known
    arrays = ArrayWriter()
    try:
        header = msgpack.packb([kind, codec.pack(message, arrays)])
    except MismatchError as error:
        raise FrameError(error.at(kind)) from None
    except (OverflowError, ValueError) as error:
        raise FrameError(f"{kind}: {error}") from None
    if rows and kind != "microbatch":
        raise FrameError(f"{kind}: only a microbatch carries rows")
    _check_limits(len(header), arrays.bytes, rows, LIMITS)
    parts = [PREFIX.pack(len(header), arrays.bytes, rows), header, *arrays.parts]
    return [b"".join(parts)] if arrays.bytes <= MAX_JOINED else parts


def parse_prefix(prefix: Buffer, limits: Limits = LIMITS) -> Prefix:
    """Read a frame's first `PREFIX.size` bytes.

    Raises:
        FrameError: a part is larger than its limit.
    """
    header, arrays, rows = PREFIX.unpack(prefix)
    _check_limits(header, arrays, rows, limits)
    return Prefix(header, arrays, rows)


def decode(header: Buffer, arrays: Buffer) -> Message:
    """The message whose header and arrays these are. Its arrays are views of `arrays`.

    Raises:
        FrameError: names the field that is unknown, missing or of another type.
    """
    try:
        value = msgpack.unpackb(header, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, max_ext_len=0)
    except Exception as error:  # msgpack raises half a dozen unrelated ones
        raise FrameError(f"header: {type(error).__name__} {error}") from None
    if not isinstance(value, list) or len(value) != 2:
        raise FrameError("header: not a pair of kind and fields")
    kind, fields = value
    message_class = KINDS.get(kind) if isinstance(kind, str) else None
    if message_class is None:
        raise FrameError(f"kind: {kind!r:.50} is unknown")
    reader = ArrayReader(arrays)
    try:
        message = _BY_CLASS[message_class][1].unpack(fields, reader)
        reader.finish()
    except MismatchError as error:
        raise FrameError(error.at(kind)) from None
    return cast(Message, message)


def _check_limits(header: int, arrays: int, rows: int, limits: Limits) -> None:
    for part, size, limit in (
        ("header", header, limits.header),
        ("arrays", arrays, limits.arrays),
        ("rows", rows, limits.rows),
    ):
        if size > limit:
            raise FrameError(f"{part}: {size} bytes, the limit is {limit}")


_BY_CLASS: dict[type, tuple[str, Codec]] = {
    message_class: (kind, dataclass_codec(message_class)) for kind, message_class in KINDS.items()
}
HEARTBEAT = b"".join(encode(Heartbeat()))
"""The whole frame."""
