"""A value that is read from files, and read again when they change."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from tramontane.stages.folder import read_whole

log = logging.getLogger(__name__)

T = TypeVar("T")
Stamp: TypeAlias = tuple[tuple[int, ...], ...]


class Unreadable(ValueError):  # noqa: N818  (what it is)
    """A file that cannot be opened or read at the moment."""


class Reloading(Generic[T]):
    """`value()` looks at the files each time, which costs a `stat` of each, a few microseconds.

    Files that are wrong, or change while they are read, leave the value as it was until they change again; ones that
    cannot be read (too many open files, say) are tried again at each call. A log line says so, once for each change.
    Any thread may ask.

    Raises:
        ValueError: what `read` says of the files as they are at first.
    """

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], T]) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        self._stamp = self._complained = _stamp(paths)
        self._value = read()

    def value(self) -> T:
        """What the files say, or last said when they were right."""
        with self._lock:
            stamp = _stamp(self._paths)
            if stamp != self._stamp and self._reload(stamp):
                self._stamp = stamp
            return self._value

    def _reload(self, stamp: Stamp) -> bool:
        """Take up what the files say now. False where they have to be looked at again."""
        try:
            value = self._read()
        except ValueError as error:
            if stamp != self._complained:
                log.error("%s stay as they were: %s", self._what, error)
                self._complained = stamp
            return not isinstance(error, Unreadable)
        if _stamp(self._paths) != stamp:
            return False  # it may be half of the old and half of the new
        self._value = value
        log.info("%s were read again", self._what)
        return True


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
        Unreadable: it cannot be read; names option and value, as the next.
        ValueError: it is longer than `limit`.
    """
    try:
        return read_whole(Path(path), limit)
    except OSError as error:
        raise Unreadable(f"{option} is {path}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{option} is {path}, which is {error}") from None
