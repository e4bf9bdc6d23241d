"""What OpenAI-compatible servers say in a chunk of their stream, read as they really send it: null where nothing is,
lists of parts where text was expected, fields that nobody knows, an error where a completion was due.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tramontane.client.loadtest.record import STREAM_ERROR
from tramontane.client.loadtest.texts import mended, plain

ERROR_LIMIT = 300
"""Characters of a server's error that are kept."""
_SAID = ("content", "reasoning_content", "reasoning")
"""Where a chat's words stand. What a model thinks before it answers was waited for just as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One event of a completion."""

    content: str = ""
    finish_reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818  (not an error of ours)
    """The server says that the request failed."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        """HTTP_400 and its like, as `Record.status`; STREAM_ERROR where the server names none."""


def read_chunk(data: bytes, event: bytes = b"") -> Chunk:
    """The data of one event, and the event's type.

    Raises:
        Refusal: it is an error.
        ValueError: it is no JSON object.
    """
    if event == b"error":
        raise Refusal(*_refusal(_error_of(data)))
    value = _decoded(data)
    if value is None:
        return Chunk()
    if not isinstance(value, dict):
        raise ValueError(f"an event is no JSON object: {data[:ERROR_LIMIT]!r}")
    if error := value.get("error") or (value.get("object") == "error" and value):
        raise Refusal(*_refusal(error))
    content, reason = "", ""
    for choice in _objects(value.get("choices")):
        content += plain(choice.get("text")) or _said(choice.get("delta")) or _said(choice.get("message"))
        reason = plain(choice.get("finish_reason")) or reason
    usage = value.get("usage")
    return Chunk(content=mended(content), finish_reason=reason, usage=usage if isinstance(usage, dict) else {})


def error_message(body: bytes) -> str:
    """What a server says of an error, as words where it says them, else as it came."""
    return mended(_message(_error_of(body)) or body.decode(errors="replace"))[:ERROR_LIMIT]


def _error_of(data: bytes) -> object:
    """The object or the text that says what is wrong."""
    try:
        value = _decoded(data)
    except ValueError:
        return data.decode(errors="replace")
    return value.get("error") or value if isinstance(value, dict) else value


def _decoded(data: bytes) -> Any:
    """Strict JSON, else what Python's own encoder writes besides: NaN, and halves of surrogate pairs."""
    try:
        try:
            return msgspec.json.decode(data)
        except ValueError:
            return json.loads(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def _refusal(error: object) -> tuple[str, str]:
    """Status and message: HTTP's where the error names it, as in {"error": {"code": 400, "message": "too long"}}."""
    code = error.get("code") if isinstance(error, dict) else None
    number = int(code) if isinstance(code, str) and code.isdecimal() and len(code) == 3 else code
    status = f"HTTP_{number}" if isinstance(number, int) and 400 <= number < 600 else STREAM_ERROR
    return status, f"in the stream: {mended(_message(error) or json.dumps(error))}"[:ERROR_LIMIT]


def _message(error: object) -> str:
    return plain(error.get("message")) or plain(error.get("detail")) if isinstance(error, dict) else plain(error)


def _said(message: object) -> str:
    if not isinstance(message, dict):
        return ""
    return next((said for key in _SAID if (said := plain(message.get(key)))), "")


def _objects(values: object) -> list[dict[str, Any]]:
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []
