"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeAlias, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
Stamp: TypeAlias = tuple[tuple[int, ...], ...]


class Reloading(Generic[T]):
    """`value()` looks at the files each time, which costs a `stat` of each, a few microseconds.

    Files that cannot be read, are wrong, or change while they are read leave the value as it was; a log line says so,
    once for each change. Any thread may ask.

    Raises:
        ValueError: what `read` says of the files as they are at first.
    """

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._stamp = _stamp(paths)
        self._value = read()

    def value(self) -> T:
        """What the files say, or last said when they were right."""
        with self._lock:
            stamp = _stamp(self._paths)
            if stamp != self._stamp:
                self._stamp = stamp
                self._reload()
            return self._value

    def _reload(self) -> None:
        try:
            value = self._read()
        except ValueError as error:
            log.error("%s stay as they were: %s", self._what, error)
            return
        if _stamp(self._paths) == self._stamp:  # else the next call sees another stamp, and reads again
            self._value = value
            log.info("%s were read again", self._what)


def _stamp(paths: Sequence[str]) -> Stamp:
    return tuple(_stamp_of(path) for path in paths)


def _stamp_of(path: str) -> tuple[int, ...]:
    """What differs once a file was written, replaced, or its permissions changed; empty where it is not there."""
    try:
        seen = os.stat(path)
    except OSError:
        return ()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def read_bytes(option: str, path: str, limit: int) -> bytes:
    """A small file that an option names.

    Raises:
        ValueError: it cannot be read, or is longer than `limit`; names option and value.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{option} is {path}, which cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise ValueError(f"{option} is {path}, which is longer than {limit} bytes")
    return content
