"""Which field makes a request too large, found without parsing it."""

from __future__ import annotations

from tramontane.protos import serving_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Serving"]
MOST_FIELDS = 64
"""So many are looked at: an honest request has no more, and one of megabytes of tiny fields must not cost seconds."""


def largest_field(method: str, body: bytes) -> str | None:
    """Its path in the message of this method; None where that cannot be said.

    >>> largest_field("/tramontane.v1.Serving/Generate", pb.GenerateRequest(text="abc").SerializeToString())
    'text'
    """
    service, _, name = method.removeprefix("/").partition("/")
    if service != SERVICE.full_name or name not in SERVICE.methods_by_name:
        return None
    try:
        sizes = _sizes(body)
    except IndexError:  # it breaks off, or is no message
        return None
    number = max(sizes, key=lambda number: sizes[number], default=0)
    field = SERVICE.methods_by_name[name].input_type.fields_by_number.get(number)
    if field is None:
        return None
    return "tokens.ids" if field.name == "tokens" else field.name


def _sizes(body: bytes) -> dict[int, int]:
    """Bytes of the first fields, by their numbers. Raises IndexError where there is no end to one of them."""
    sizes: dict[int, int] = {}
    place = 0
    for _ in range(MOST_FIELDS):
        if place == len(body):
            break
        tag, place = _varint(body, place)
        begin = place
        match tag & 7:
            case 0:  # a number
                _, place = _varint(body, place)
            case 1:
                place += 8
            case 2:  # bytes, text, a message
                length, place = _varint(body, place)
                place += length
            case 5:
                place += 4
            case _:
                raise IndexError
        if place > len(body):
            raise IndexError
        sizes[tag >> 3] = sizes.get(tag >> 3, 0) + place - begin
    return sizes


def _varint(body: bytes, place: int) -> tuple[int, int]:
    """A number and the place after it."""
    number = 0
    for shift in range(0, 64, 7):
        byte = body[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise IndexError
