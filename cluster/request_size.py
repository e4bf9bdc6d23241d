"""Checks the size of a request before it is parsed. Pure.

Parsing holds up the event loop. One text or packed ids take next to no time, many small fields up to 25 ms a MiB. So
only a prompt may be large, and a large request is looked through before it is parsed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tramontane.protos import serving_pb2 as pb

BYTES_OF_OPTIONS = 64 << 10
"""The most bytes that a request may have beside its prompt. A request of no more in all is not looked through."""
BYTES_OF_A_TOKEN = 64
"""The bytes that a token may take as text. Mistral's longest piece is 16 spaces, 48 bytes if written as U+2581."""
BYTES_OF_AN_ID = 8
"""The bytes that an id may take, in whatever way it is encoded."""
LEAST_OF_A_FIELD = 64
"""A field counts as so many bytes at least, so that looking through takes a thousand steps at most."""

_GENERATE = {
    pb.GenerateRequest.TEXT_FIELD_NUMBER: BYTES_OF_A_TOKEN,
    pb.GenerateRequest.TOKENS_FIELD_NUMBER: BYTES_OF_AN_ID,
}
PROMPTS: Mapping[str, Mapping[int, int]] = {
    "/tramontane.v1.Serving/Generate": _GENERATE,
    "/tramontane.v1.Serving/GenerateStream": _GENERATE,
    "/tramontane.v1.Serving/Tokenize": {pb.TokenizeRequest.TEXT_FIELD_NUMBER: BYTES_OF_A_TOKEN},
}
"""For each method that takes a prompt: the fields that may hold it, with the bytes that a token may have there. Other
methods take ids at most, and a client may send each id as a field."""

_SERVICE = pb.DESCRIPTOR.services_by_name["Serving"]
_REQUESTS = {f"/{_SERVICE.full_name}/{method.name}": method.input_type for method in _SERVICE.methods}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The wire types of protobuf's fields, but for groups, which none of our messages has."""

MOST_FIELDS = 64
"""How many fields are looked at to find the largest; an honest request has no more."""


class SizeError(ValueError):
    """A request is too large. `field` is the path of the field that makes it so, where one does."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def request_limit_bytes(context: int) -> int:
    """The most bytes of a request on the wire. A prompt that fills the context fits."""
    return BYTES_OF_OPTIONS + BYTES_OF_A_TOKEN * context


def check_size(method: str, body: bytes, context: int) -> None:
    """Check the size of a request that has not been parsed.

    Raises:
        SizeError: the request is too large, or too much of it is no prompt; the message names limit and value.
    """
    if len(body) <= BYTES_OF_OPTIONS:
        return
    prompts = PROMPTS.get(method, {})
    limit = BYTES_OF_OPTIONS + max(prompts.values(), default=BYTES_OF_AN_ID) * context
    if len(body) > limit:
        field = largest_field(method, body)
        said = f", most of them {field}" if field else ""
        raise SizeError(f"a request may be {limit} bytes; this one is {len(body)}{said}", field)
    if prompts:
        _look_through(body, prompts, context)


def largest_field(method: str, body: bytes) -> str | None:
    """The path of the field that makes a request large; None where no field does.

    >>> largest_field("/tramontane.v1.Serving/Generate", pb.GenerateRequest(text="abc").SerializeToString())
    'text'
    """
    message = _REQUESTS.get(method)
    sizes: dict[int, int] = {}
    place = 0
    try:
        for _ in range(MOST_FIELDS):
            if place < len(body):
                number, _, end = _field(body, place)
                sizes[number] = sizes.get(number, 0) + end - place
                place = end
    except SizeError:
        return None
    number = max(sizes, key=lambda number: sizes[number], default=0)
    field = None if message is None else message.fields_by_number.get(number)
    return None if field is None else "tokens.ids" if field.name == "tokens" else field.name


def _look_through(body: bytes, prompts: Mapping[int, int], context: int) -> None:
    """Add up the bytes of the prompt and those beside it, and refuse either that is too large."""
    place, beside, held = 0, 0, dict.fromkeys(prompts, 0)
    while place < len(body):
        number, size, end = _field(body, place)
        in_prompt = size if number in prompts else 0
        if in_prompt:
            held[number] += in_prompt
        beside += max(end - place - in_prompt, LEAST_OF_A_FIELD)
        place = end
        if beside > BYTES_OF_OPTIONS:
            raise SizeError(f"beside its prompt a request may have {BYTES_OF_OPTIONS} bytes; this one has more")
    if place != len(body):
        raise _no_message(body)
    for number, size in held.items():
        limit = BYTES_OF_OPTIONS + prompts[number] * context
        if size > limit:
            raise SizeError(f"a prompt of token ids may be {limit} bytes; this one is {size}", "tokens.ids")


def _field(body: bytes, place: int) -> tuple[int, int, int]:
    """The field at `place`: its number, the size of its content where that is bytes, and the place behind the field."""
    tag, place = _varint(body, place)
    size, kind = 0, tag & 7
    if kind == VARINT:
        _, place = _varint(body, place)
    elif kind in (FIXED64, FIXED32):
        place += 8 if kind == FIXED64 else 4
    elif kind == BYTES:
        size, place = _varint(body, place)
    else:
        raise _no_message(body)
    return tag >> 3, size, place + size


def _varint(body: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, and the place behind it."""
    value = 0
    for index in range(10):
        if place + index >= len(body):
            break
        byte = body[place + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, place + index + 1
    raise _no_message(body)


def _no_message(body: bytes) -> SizeError:
    return SizeError(f"the request's {len(body)} bytes are no message of its type")
