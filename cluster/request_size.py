"""How large requests may be, and of what. Pure.

Parsing is one go of the event loop. Of one text or of packed ids it takes next to nothing, of many small things up to
25 ms a MiB (empty stop strings, on 2 cores of an Intel Xeon, 2026-11-28). So what may be large is a prompt, and a large
request is looked through before it is parsed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tramontane.protos import serving_pb2 as pb

BYTES_OF_OPTIONS = 64 << 10
"""What a request may have beside its prompt. One that has no more in all is not looked through."""
BYTES_OF_A_TOKEN = 64
"""Of a text. The longest piece of Mistral's vocabularies is 16 spaces, or 48 bytes where U+2581 is written out."""
BYTES_OF_AN_ID = 8
"""Of ids, in whatever way they are encoded."""
LEAST_OF_A_FIELD = 64
"""A field counts as so many bytes beside the prompt, at least: looking through takes a thousand steps at most."""

_GENERATE = {
    pb.GenerateRequest.TEXT_FIELD_NUMBER: BYTES_OF_A_TOKEN,
    pb.GenerateRequest.TOKENS_FIELD_NUMBER: BYTES_OF_AN_ID,
}
PROMPTS: Mapping[str, Mapping[int, int]] = {
    "/tramontane.v1.Serving/Generate": _GENERATE,
    "/tramontane.v1.Serving/GenerateStream": _GENERATE,
    "/tramontane.v1.Serving/Tokenize": {pb.TokenizeRequest.TEXT_FIELD_NUMBER: BYTES_OF_A_TOKEN},
}
"""Of methods that take a prompt: the fields that may hold it, with the bytes that a token may have there. Other methods
take ids at most, which a client may send as a field each."""

_SERVICE = pb.DESCRIPTOR.services_by_name["Serving"]
_REQUESTS = {f"/{_SERVICE.full_name}/{method.name}": method.input_type for method in _SERVICE.methods}

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Kinds of fields on the wire. Groups are the past's, and none of ours."""


MOST_FIELDS = 64
"""So many are looked at to find the largest one; an honest request has no more."""


class SizeError(ValueError):
    """The user's mistake. `field` is the path of the field that is to blame, where there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def request_limit_bytes(context: int) -> int:
    """The size of a request on the wire: a prompt that fills the context fits."""
    return BYTES_OF_OPTIONS + BYTES_OF_A_TOKEN * context


def check_size(method: str, body: bytes, context: int) -> None:
    """Look through a request that has not been parsed.

    Raises:
        SizeError: it is too large, or too much of it is no prompt; names limit and value.
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
    """Which field makes a request large, as a path; None where that cannot be said.

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
    """The number of the field there, the bytes of its content where it is bytes, and the place behind it."""
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
    """The number there, and the place behind it."""
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
