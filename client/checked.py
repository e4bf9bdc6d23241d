"""Arguments checked and turned into values that a message can hold. Errors name the argument.

Raises, in every function: TypeError where a value is of the wrong kind, ValueError where it does not fit.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_TIMEOUT_S = 1e8
"""Some three years: an accident rather than a wish beyond that."""


@contextmanager
def naming(method: str) -> Iterator[None]:
    """A block whose TypeErrors begin with the name of the method that the user called, as Python's own do."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{method}(): {error}") from None


def unsigned(field: str, value: int | None, *, bits: int = 32) -> int | None:
    """A whole number that fits, or None for the server's default."""
    if value is None:
        return None
    number = whole(field, value)
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{field} is {number}; it must lie in 0 .. 2^{bits} - 1")
    return number


def token_ids(field: str, ids: Iterable[int]) -> list[int]:
    """Whole numbers that fit an id of 32 bits."""
    if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Iterable):
        kinds = "text or token ids" if field == "prompt" else "token ids"
        raise TypeError(f"{field} must be {kinds}, not {type(ids).__name__}")
    given = list(ids)
    try:
        result = list(map(operator.index, given))
    except TypeError:
        result = [whole(f"{field}[{place}]", token_id) for place, token_id in enumerate(given)]  # says which
    for number in result:
        if not 0 <= number < 1 << 32:
            raise ValueError(f"{field} holds {number}; a token id lies in 0 .. 2^32 - 1")
    return result


def whole(field: str, value: object) -> int:
    """A whole number, numpy's and others' included."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{field} must be a whole number, not {type(value).__name__}") from None


def real(field: str, value: object) -> float | None:
    """A number, or None for the server's default."""
    if value is None:
        return None
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{field} must be a number, not {type(value).__name__}")


def flag(field: str, value: object) -> bool:
    """True or False; 1 and 0 count as well."""
    if value not in (True, False):
        raise TypeError(f"{field} must be True or False, not {value!r:.40}")
    return bool(value)


def model_name(name: str | None) -> str | None:
    """A text, or None for the only model."""
    return None if name is None else text("model", name)


def texts(field: str, values: str | Iterable[str] | None) -> list[str]:
    """One text or several, as a list; None is none."""
    if values is None or isinstance(values, str):
        return [] if values is None else [text(field, values)]
    if not isinstance(values, Iterable):
        raise TypeError(f"{field} must be text, or several, not {type(values).__name__}")
    return [text(f"{field}[{place}]", value) for place, value in enumerate(values)]


def text(field: str, value: str) -> str:
    """A text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise TypeError(f"{field} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character, place = value[error.start], error.start
        raise ValueError(f"{field} holds the lone surrogate U+{ord(character):04X} at character {place}") from None
    return value


def timeout(timeout_s: float) -> float:
    """The seconds of a call's deadline."""
    seconds = real("timeout_s", timeout_s)
    if seconds is None:
        raise TypeError("timeout_s must be a number, not None: every call has a deadline")
    if not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise ValueError(f"timeout_s is {seconds:g}; it must be above 0 and at most {LONGEST_TIMEOUT_S:g}")
    return seconds
