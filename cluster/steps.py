"""Work in short steps, so that whoever does it can stop between two of them, or turn to somebody else's."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Steps: TypeAlias = Generator[None, None, T]
"""Each `next` is one step; the result comes with the last."""


def finish(steps: Steps[T]) -> T:
    """Do all steps that are left, here and now."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
