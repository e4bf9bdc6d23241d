"""Messages survive the way into bytes and back; bytes that are no message of ours are refused by name."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from tramontane.cluster import fields, frames, messages
from tramontane.cluster.frames import FrameError
from tramontane.cluster.messages import Cancel, EndReason, Finished, Hello, Role, Sampling, Stopping, Tokens
from tramontane.stages.microbatch import BlockTable, Microbatch, SampledRows, StepResult, no_scored_rows

HEADER = frames.PREFIX.size


def values_of(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Whatever a field of this type may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is np.ndarray:
        dtype = np.dtype(typing.get_args(arguments[1])[0])
        return arrays_of.arrays(dtype, st.integers(0, 12))
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is types.UnionType:
        return st.one_of(*(values_of(argument) for argument in arguments))
    if hint is type(None):
        return st.none()
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(hint)})
    if issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if hint is int:
        return st.integers(-(2**63), 2**64 - 1)
    if hint is float:
        return st.floats(allow_nan=False)
    return {bool: st.booleans(), str: st.text(max_size=20), bytes: st.binary(max_size=40)}[hint]


MESSAGES = st.one_of(*(values_of(kind) for kind in frames.KINDS.values()))


def as_plain(value: object) -> object:
    """Comparable: dataclasses as dicts, arrays as their dtype and bytes."""
    if dataclasses.is_dataclass(value):
        return type(value), {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(as_plain(item) for item in value)
    return type(value), value


def split(frame: bytes) -> tuple[bytes, bytes]:
    prefix = frames.parse_prefix(frame[:HEADER])
    assert len(frame) == HEADER + prefix.header + prefix.arrays
    return frame[HEADER : HEADER + prefix.header], frame[HEADER + prefix.header :]


def table(**changes: object) -> BlockTable:
    ints = {name: np.array([1, 2], np.int32) for name in ("blocks", "held", "fresh")}
    return BlockTable(**{**ints, **changes})


def microbatch(**changes: object) -> Microbatch:
    ints, floats = np.array([3], np.int32), np.array([0.5], np.float32)
    whole = {
        "epoch": 1,
        "step": 0,
        "tokens": np.array([11, 12, 13, 14], np.int32),
        "first": np.array([8, 20], np.int32),
        "length": np.array([3, 1], np.int32),
        "sequence": np.array([4, 9], np.int64),
        "tables": (table(), table()),
        "sampled": SampledRows(
            row=ints,
            temperature=floats,
            top_k=ints,
            top_p=floats,
            min_p=floats,
            seed=np.array([2**64 - 1], np.uint64),
            banned=ints[:0],
            banned_count=ints,
        ),
        "scored": no_scored_rows(),
    }
    return Microbatch(**{**whole, **changes})


@settings(deadline=None)
@given(MESSAGES)
def test_every_message_comes_back_as_it_was(message: frames.Message) -> None:
    header, arrays = split(b"".join(frames.encode(message)))
    assert as_plain(frames.decode(header, arrays)) == as_plain(message)


def test_every_dataclass_of_the_messages_has_a_kind() -> None:
    said = {item for _, item in inspect.getmembers(messages, dataclasses.is_dataclass)}
    assert said - {Sampling, Stopping} | {Microbatch, StepResult} == set(frames.KINDS.values())


def test_a_frame_written_out_by_hand() -> None:
    message = Tokens(
        request=np.array([5], np.int64),
        offset=np.array([2], np.int32),
        token=np.array([7], np.int32),
        log_probability=np.array([-1.0], np.float32),
    )
    header = msgpack.packb(
        ["tokens", {"request": ["<i8", 1], "offset": ["<i4", 1], "token": ["<i4", 1], "log_probability": ["<f4", 1]}]
    )
    arrays = (
        (5).to_bytes(8, "little")
        + (2).to_bytes(4, "little")
        + bytes(4)
        + (7).to_bytes(4, "little")
        + bytes(4)
        + b"\x00\x00\x80\xbf"
        + bytes(4)
    )
    prefix = len(header).to_bytes(4, "little") + len(arrays).to_bytes(4, "little") + bytes(4)
    assert b"".join(frames.encode(message)) == prefix + header + arrays


def test_decoded_arrays_are_aligned_views_of_the_bytes_received() -> None:
    header, arrays = split(b"".join(frames.encode(microbatch())))
    received = bytearray(arrays)
    message = frames.decode(header, received)
    assert isinstance(message, Microbatch)
    for array in (message.tokens, message.sequence, message.tables[1].fresh, message.sampled.seed):
        assert np.shares_memory(array, np.frombuffer(received, np.uint8))
        assert array.flags.aligned
        assert array.flags.writeable


def test_large_arrays_are_handed_over_and_not_copied() -> None:
    blocks = np.arange(100_000, dtype=np.int32)
    parts = frames.encode(microbatch(tables=(table(blocks=blocks),)))
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), blocks) for part in parts)
    message = frames.decode(*split(b"".join(parts)))
    assert isinstance(message, Microbatch)
    assert np.array_equal(message.tables[0].blocks, blocks)


def test_an_array_with_gaps_is_sent_as_what_it_shows() -> None:
    message = frames.decode(*split(b"".join(frames.encode(microbatch(tokens=np.arange(9, dtype=np.int32)[::3])))))
    assert isinstance(message, Microbatch)
    assert message.tokens.tolist() == [0, 3, 6]


HELLO = {"protocol": 1, "role": "stage", "name": "s", "epoch": 3, "nonce": b"n", "proof": b""}


@pytest.mark.parametrize(
    ("header", "arrays", "complaint"),
    [
        (["hullo", {}], b"", "kind: 'hullo' is unknown"),
        ([{}, {}], b"", "kind: {} is unknown"),
        (["cancel"], b"", "header: not a pair"),
        ("cancel", b"", "header: not a pair"),
        (["cancel", []], b"", r"cancel: \[\] is no map of fields"),
        (["cancel", {}], b"", r"cancel\.request: is missing"),
        (["cancel", {"request": 1, "why": 2, "completed": False}], b"", r"cancel\.why: is unknown"),
        (["cancel", {"request": "1", "completed": False}], b"", r"cancel\.request: '1' is no int"),
        (["cancel", {"request": True, "completed": False}], b"", r"cancel\.request: True is no int"),
        (["cancel", {"request": 1.0, "completed": False}], b"", r"cancel\.request: 1.0 is no int"),
        (["hello", {**HELLO, "role": "king"}], b"", r"hello\.role: 'king' is no Role"),
        (["hello", {**HELLO, "name": b"s"}], b"", r"hello\.name: b's' is no str"),
        (["hello", {**HELLO, "proof": "s"}], b"", r"hello\.proof: 's' is no bytes"),
        (["cancel", {"request": 1, "completed": False}], bytes(8), "cancel: 8 bytes of arrays, 0 belong to fields"),
    ],
)
def test_a_header_that_says_something_else_is_refused_by_name(header: object, arrays: bytes, complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        frames.decode(msgpack.packb(header), arrays)


@pytest.mark.parametrize(
    ("tokens", "complaint"),
    [
        (["<i8", 4], r"microbatch\.tokens: \['<i8', 4\] is no flat array of int32"),
        (["|O", 4], r"microbatch\.tokens: \['\|O', 4\] is no flat array"),
        (["<i4", -1], r"microbatch\.tokens: .* is no flat array"),
        (["<i4", [2, 2]], r"microbatch\.tokens: .* is no flat array"),
        (["<i4", 2**62], r"microbatch\.tokens: \d+ bytes of array, \d+ are left"),
        (["<i4", 1], "microbatch: .* bytes of arrays, .* belong to fields"),
        (None, r"microbatch\.tokens: None is no flat array"),
    ],
)
def test_an_array_must_be_what_its_field_says_and_fill_its_bytes(tokens: object, complaint: str) -> None:
    header, arrays = split(b"".join(frames.encode(microbatch())))
    kind, values = msgpack.unpackb(header)
    values["tokens"] = tokens
    with pytest.raises(FrameError, match=complaint):
        frames.decode(msgpack.packb([kind, values]), arrays)


def test_a_nested_field_is_named_with_its_path() -> None:
    header, arrays = split(b"".join(frames.encode(microbatch())))
    kind, values = msgpack.unpackb(header)
    del values["tables"][1]["held"]
    with pytest.raises(FrameError, match=r"microbatch\.tables\[1\]\.held: is missing"):
        frames.decode(msgpack.packb([kind, values]), arrays)


def test_a_bool_is_0_or_1() -> None:
    one = np.array([1], np.int32)
    result = StepResult(
        epoch=1,
        step=2,
        token=one,
        log_probability=np.ones(1, np.float32),
        finite=np.array([True]),
        score=np.empty(0, np.float32),
    )
    header, arrays = split(b"".join(frames.encode(result)))
    assert arrays[16] == 1
    with pytest.raises(FrameError, match=r"step_result\.finite: a bool is neither 0 nor 1"):
        frames.decode(header, arrays[:16] + b"\x02" + arrays[17:])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (microbatch(tokens=np.zeros(2, np.int64)), r"microbatch\.tokens: int64\[2\] is no flat array of int32"),
        (microbatch(tokens=np.zeros((2, 2), np.int32)), r"microbatch\.tokens: int32\[2, 2\] is no flat array"),
        (microbatch(tokens=[1]), r"microbatch\.tokens: list is no flat array"),
        (microbatch(epoch=np.int64(1)), r"microbatch\.epoch: .* is no int"),
        (microbatch(tables=(table(), table(held=None))), r"microbatch\.tables\[1\]\.held: NoneType is no flat array"),
        (microbatch(tables=(table(),) * 100), "more than 256 arrays"),
        (Cancel(request=2**64), "cancel: "),
        (Hello(protocol=1, role="stage", name="s", epoch=0, nonce=b"", proof=b""), r"hello\.role: 'stage' is no Role"),
        (table(), "kind: BlockTable is no message"),
        (Cancel(request=b"x" * 70_000), r"cancel\.request: "),
        (
            Hello(protocol=1, role=Role.STAGE, name="s" * 70_000, epoch=0, nonce=b"", proof=b""),
            "header: .*, the limit is 65536",
        ),
        (microbatch(tokens=np.zeros(17 << 20, np.int32)), "arrays: .* bytes, the limit is 67108864"),
    ],
)
def test_a_message_that_does_not_fit_is_not_encoded(message: frames.Message, complaint: str) -> None:
    with pytest.raises(FrameError, match=complaint):
        frames.encode(message)


def test_a_whole_number_will_do_for_a_float() -> None:
    message = Finished(request=1, reason=EndReason.LENGTH, detail="", queue_ms=1, prefill_ms=0, decode_ms=2)
    back = frames.decode(*split(b"".join(frames.encode(message))))
    assert isinstance(back, Finished)
    assert (type(back.queue_ms), back.queue_ms) == (float, 1.0)


def test_rows_follow_a_microbatch_only() -> None:
    assert frames.parse_prefix(frames.encode(microbatch(), rows=32)[0][:HEADER]).rows == 32
    with pytest.raises(FrameError, match="cancel: only a microbatch carries rows"):
        frames.encode(Cancel(request=1), rows=32)


@pytest.mark.parametrize("part", ["header", "arrays", "rows"])
@pytest.mark.parametrize("limits", [frames.LIMITS, frames.HANDSHAKE_LIMITS])
def test_each_length_has_its_limit(part: str, limits: frames.Limits) -> None:
    largest = dataclasses.asdict(limits)
    assert frames.parse_prefix(frames.PREFIX.pack(*largest.values()), limits) == frames.Prefix(**largest)
    largest[part] += 1
    with pytest.raises(FrameError, match=f"{part}: {largest[part]} bytes, the limit is {largest[part] - 1}"):
        frames.parse_prefix(frames.PREFIX.pack(*largest.values()), limits)


def test_lists_that_claim_to_be_huge_are_not_allocated() -> None:
    nested = b"\xdd\x00\x00\xff\xff" * 500  # each a list of 65,535 items, the first of which is the next list
    with pytest.raises(FrameError, match=r"header: .*exceeds max_array_len"):
        frames.decode(b"\x92" + msgpack.packb("cancel") + nested + bytes(65_535), b"")


@settings(deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_noise_is_refused_and_nothing_else_happens(header: bytes, arrays: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode(header, arrays)


@settings(max_examples=500, deadline=None)
@given(MESSAGES, st.data())
def test_a_damaged_frame_is_refused_or_another_valid_message(message: frames.Message, data: st.DataObject) -> None:
    frame = bytearray(b"".join(frames.encode(message)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        prefix = frames.parse_prefix(frame[:HEADER])
        end = HEADER + prefix.header
        again = frames.decode(frame[HEADER:end], frame[end : end + prefix.arrays])
    except FrameError:
        return
    assert type(again) in frames.KINDS.values()


def test_what_is_decoded_can_only_be_of_the_listed_dtypes() -> None:
    assert set(fields.DTYPES) == {"<i4", "<i8", "<u8", "<f4", "|b1"}
