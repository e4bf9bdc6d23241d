"""The records of the services that this user has started on this node, one file each. `down` ends these and no others.

A record is a JSON object in a file that this user alone can read. Readers pass over keys that they do not know, so that
records can grow. The `serve` that wrote a record holds a lock on the file. The kernel names the lock's holder, and
releases the lock when that process ends, however it ends. A record without a holder belongs to a service that was left
running, or to one that has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

LONGEST_RECORD = 64 * 1024
LOCK = "hhqqi4x"
"""The layout of the kernel's `struct flock`: type, whence, start, length, process."""


@dataclass(frozen=True, kw_only=True)
class ServiceRecord:
    """One service, as its `serve` has recorded it."""

    identity: str
    name: str
    """The model's name towards users."""
    ray: str
    """HOST:PORT of the Ray's GCS."""
    owns_ray: bool
    """The Ray was started by this `serve` and ends with it."""
    namespace: str
    """The Ray namespace of the service's actors."""
    pid: int
    """The process id of `serve`."""
    target: str = ""
    """HOST:PORT for clients; empty before the port is open."""

    def __str__(self) -> str:
        """The service in one line, for people.

        >>> record = ServiceRecord(identity="5e", name="embedded", ray="10.0.0.1:6379", owns_ray=False,
        ...     namespace="tramontane", pid=7, target="127.0.0.1:50051")
        >>> str(record)
        'embedded on 127.0.0.1:50051 (5e, Ray at 10.0.0.1:6379)'
        """
        at = f" on {self.target}" if self.target else ""
        whose = "a Ray of its own" if self.owns_ray else f"Ray at {self.ray}"
        return f"{self.name}{at} ({self.identity}, {whose})"


class RecordFile:
    """The record of this process's service, held until `close` or the process's end."""

    def __init__(self, folder: Path, record: ServiceRecord) -> None:
        """Write the record to `folder`, which is private (`services_folder`).

        Raises:
            OSError: the record cannot be written.
        """
        self._path = folder / f"{record.identity}.json"
        self._record = record
        self._descriptor = self._write()

    def add(self, **facts: Any) -> None:
        """Write the record again with these facts. Where that fails the record stays as it was."""
        self._record = replace(self._record, **facts)
        with contextlib.suppress(OSError):
            older, self._descriptor = self._descriptor, self._write()
            os.close(older)

    def close(self, *, remove: bool) -> None:
        """Release the lock. A record that is not removed belongs to a service that runs on."""
        if self._descriptor >= 0:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self) -> int:
        """Put the record in place, whole and locked at once. Returns the descriptor that holds the lock."""
        descriptor, mine = tempfile.mkstemp(dir=self._path.parent)  # of mode 600
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, json.dumps(asdict(self._record), indent=2).encode() + b"\n")
            os.replace(mine, self._path)
        except BaseException:
            os.unlink(mine)
            os.close(descriptor)
            raise
        return descriptor


@dataclass(frozen=True)
class FoundRecord:
    """A record as a reader finds it."""

    path: Path
    record: ServiceRecord
    holder: int | None
    """The process that holds the lock; 0 where it is not visible from here, None where nobody holds it."""


def read_records(folder: Path) -> tuple[list[FoundRecord], list[str]]:
    """All records of this user, by model and target, and a line about each file that is no record."""
    found, flaws = [], []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(FileNotFoundError):  # the service has ended meanwhile
            try:
                found.append(_read(path))
            except (OSError, ValueError) as error:
                flaws.append(f"{path} is no record of a service: {error}")
    return sorted(found, key=lambda each: (each.record.name, each.record.target)), flaws


def remove_ended(folder: Path) -> None:
    """Remove the records of services that ended with their `serve`, because it owned their Ray."""
    for found in read_records(folder)[0]:
        if found.record.owns_ray and found.holder is None:
            found.path.unlink(missing_ok=True)


def holder_of(path: Path) -> int | None:
    """See `FoundRecord.holder`."""
    with _opened(path) as descriptor:
        return _holder(descriptor)


def _read(path: Path) -> FoundRecord:
    """Raises ValueError where it is no record."""
    with _opened(path) as descriptor:
        written = os.read(descriptor, LONGEST_RECORD)
        try:
            values = json.loads(written)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        known = {}
        for field in fields(ServiceRecord):
            value = values.get(field.name, field.default)
            if type(value).__name__ != field.type:
                raise ValueError(f"{field.name} is {'missing' if value is MISSING else repr(value)[:100]}")
            known[field.name] = value
        holder = _holder(descriptor)
        replaced = not os.path.samestat(os.fstat(descriptor), path.lstat())
    return _read(path) if replaced else FoundRecord(path, ServiceRecord(**known), holder)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a regular file. Closing it would release a lock of this process's own on it, so `serve` reads no record."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    ask = struct.pack(LOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = struct.unpack(LOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, ask))
    return None if kind == fcntl.F_UNLCK else pid
