"""The size of requests, checked before they are parsed."""

from __future__ import annotations

import contextlib

import grpc
import pytest
from calls import Code, failure
from fake_pipeline import serving, tiny_model
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tramontane.cluster.request_size import BYTES_OF_OPTIONS, LEAST_OF_A_FIELD, check_size, request_limit_bytes
from tramontane.cluster.validation import MAX_STOP_IDS, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS
from tramontane.protos import serving_pb2 as pb

GENERATE, TOKENIZE, DETOKENIZE = (f"/tramontane.v1.Serving/{name}" for name in ("Generate", "Tokenize", "Detokenize"))
SPIKE = "\N{LOWER ONE EIGHTH BLOCK}" * 16


@pytest.mark.parametrize("context", [2, 4096, 1 << 20])
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_the_limit_follows_the_context_and_what_fills_it_fits(context, kind):
    assert request_limit_bytes(4096) == (64 << 10) + 64 * 4096
    prompt = {"text": SPIKE * context} if kind == "text" else {"tokens": pb.TokenIds(ids=[1 << 31] * context)}
    strings = ["x" * MAX_STOP_STRING_BYTES] * MAX_STOP_STRINGS
    stopping = pb.Stopping(strings=strings, token_ids=[1 << 31] * MAX_STOP_IDS)
    request = pb.GenerateRequest(stopping=stopping, request_id="x" * 128, model="x" * 4096, **prompt)
    for method in (GENERATE, GENERATE + "Stream"):
        check_size(method, request.SerializeToString(), context)
    check_size(TOKENIZE, pb.TokenizeRequest(text=SPIKE * context, model="x" * 4096).SerializeToString(), context)
    check_size(DETOKENIZE, pb.DetokenizeRequest(ids=[1 << 31] * context).SerializeToString(), context)


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


MANY = 400_000
SLOW = {
    "empty stop strings": (GENERATE, field(6, b"\x1a\x00" * MANY), "beside its prompt"),
    "ids one by one": (GENERATE, field(4, b"\x08\x01" * MANY), "a prompt of token ids may be"),
    "ids in small messages": (GENERATE, field(4, b"\x08\x01" * 50) * (MANY // 50), "beside its prompt"),
    "ids in large messages": (GENERATE, field(4, b"\x08\x01" * 30_000) * 10, "a prompt of token ids may be"),
    "empty prompts": (GENERATE, b"\x1a\x00" * MANY, "beside its prompt"),
    "empty prompts of both kinds": (GENERATE, b"\x1a\x00\x22\x00" * (MANY // 2), "beside its prompt"),
    "empty options": (GENERATE, b"\x32\x00" * MANY, "beside its prompt"),
    "fields that nobody knows": (GENERATE, b"\x78\x01" * MANY, "beside its prompt"),
    "empty texts to tokenize": (TOKENIZE, b"\x12\x00" * MANY, "beside its prompt"),
    "ids to join": (DETOKENIZE, b"\x10\x01" * MANY, "a request may be"),
    "names of models": ("/tramontane.v1.Serving/ListModels", b"\x0a\x00" * MANY, "a request may be"),
}


class CountingBytes(bytes):
    """Counts how often one of its bytes is looked at."""

    looks = 0

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("kind", SLOW)
def test_what_would_be_slow_to_parse_is_refused_in_few_steps(kind):
    method, content, says = SLOW[kind]
    body = CountingBytes(content)
    with pytest.raises(ValueError, match=says):
        check_size(method, body, 20_000)
    assert body.looks <= 2 * (BYTES_OF_OPTIONS // LEAST_OF_A_FIELD + 1), "a tag and a size a field, a byte each"


def refusal(body: bytes) -> str:
    try:
        check_size(GENERATE, body, 4096)
    except ValueError as refused:
        return str(refused)
    return ""


@given(st.binary(max_size=200), st.sampled_from([0, 1, 5, 6]))
def test_what_protobuf_takes_passes(noise, cut):
    """Groups are an exception, which none of our messages has."""
    body = pb.GenerateRequest(text="x" * (BYTES_OF_OPTIONS + 1)).SerializeToString()[: -cut or None] + noise
    with contextlib.suppress(DecodeError):
        pb.GenerateRequest.FromString(body)
        assert not refusal(body) or any(byte & 7 in (3, 4) for byte in noise)


@pytest.mark.parametrize(
    "rest", [b"\x80", b"\x2a", b"\x2a\x80", b"\x2a\x05ab", b"\x29\0\0", b"\x2d\0", b"\x28\xff", b"\x2f", b"\xff" * 11]
)
def test_what_is_cut_off_or_of_no_kind_is_no_message(rest):
    body = pb.GenerateRequest(text="x" * (BYTES_OF_OPTIONS + 1)).SerializeToString()
    assert not refusal(body)
    assert "no message of its type" in refusal(body + rest)


def test_a_number_without_end_is_read_to_its_tenth_byte():
    body = CountingBytes(b"\x80" * (BYTES_OF_OPTIONS + 1))
    with pytest.raises(ValueError, match="no message of its type"):
        check_size(GENERATE, body, 20_000)
    assert body.looks == 10


@pytest.mark.parametrize("kind", ["empty stop strings", "ids in small messages"])
async def test_a_gateway_says_so(kind):
    _, body, says = SLOW[kind]
    async with serving(model=tiny_model(context=20_000)) as (_, target), grpc.aio.insecure_channel(target) as channel:
        error = await failure(channel.unary_unary(GENERATE)(body))
    assert error.code() == Code.INVALID_ARGUMENT
    assert says in error.details()
