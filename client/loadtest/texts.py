"""Texts as others write them, in their files and in their answers."""

from __future__ import annotations

from collections.abc import Mapping

_KEYS = ("text", "content", "thinking", "value")
"""Where the text of a part stands, by who wrote it."""
_DEPTH = 6
"""How deep within lists and parts a text is looked for."""


def plain(value: object, depth: int = _DEPTH) -> str:
    """The text that a value stands for: a string is itself, null is nothing, a list is its parts one after the other.

    >>> plain([{"type": "text", "text": "Or "}, None, {"type": "thinking", "thinking": [{"text": "not"}]}])
    'Or not'
    """
    if isinstance(value, str):
        return value
    if depth and isinstance(value, list):
        return "".join(plain(part, depth - 1) for part in value)
    if depth and isinstance(value, Mapping):
        return next((plain(value[key], depth - 1) for key in _KEYS if value.get(key)), "")
    return ""


def unsendable(text: str) -> str:
    """Why no server can be sent the text: half of a surrogate pair, or a byte that was no UTF-8. Empty where it can be.

    >>> unsendable("bad \\ud83d half"), unsendable("good")
    ('holds the lone surrogate U+D83D at character 4', '')
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return ""


def mended(text: str) -> str:
    """The text with question marks for what `unsendable` would name: fit for JSON and for a terminal.

    >>> mended("half \\ud83d")
    'half ?'
    """
    return text.encode(errors="replace").decode()
