"""Digests of whole tensors, on threads beside the one that reads them. No torch.

A tensor's digest is the root of a tree, so that its pieces can be hashed on several threads and in any order. Neither
the file that a tensor lies in nor its place there counts:

    leaf    SHA-256("leaf", 0, bytes)    of each piece of 1 MiB; the last piece may be shorter
    root    SHA-256("root", 0, SHA-256(name, dtype, shape), all leaves in order)

The shape says how many leaves there are, and the labels keep a leaf from passing for a root. SHA-256 is the fastest
sound hash of the standard library on a CPU with instructions for it (an Intel Xeon with SHA-NI, one thread, pieces of
1 MiB, 2026-11-28: SHA-256 1.16 GB/s, BLAKE2b 0.45, SHA-512 0.37).
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

PIECE_BYTES = 2**20
MOST_THREADS = 4
"""And at most one for two cores, since reading and packing need some too."""
MOST_WAITING = 64
"""Pieces that wait for a thread, each of which keeps its tensor in memory; a loader that is quicker waits as well."""


def leaf(piece: memoryview) -> bytes:
    """Of one piece."""
    digest = hashlib.sha256(b"leaf\0")
    digest.update(piece)
    return digest.digest()


def root(name: str, dtype: str, shape: Sequence[int], leaves: Iterable[bytes]) -> bytes:
    """Of one tensor, from the leaves of its pieces in their order."""
    about = hashlib.sha256(f"{name}\n{dtype}\n{list(shape)}\n".encode()).digest()
    return hashlib.sha256(b"root\0" + about + b"".join(leaves)).digest()


class Hashing:
    """Threads that take leaves while their owner reads on. They end with this object."""

    def __init__(self) -> None:
        threads = min(MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
        self._threads = ThreadPoolExecutor(threads, "hashing")
        self._taken: deque[Future[bytes]] = deque()

    def leaf(self, piece: memoryview) -> Future[bytes]:
        """The leaf of a piece, which nobody may write to until then."""
        if len(self._taken) == MOST_WAITING:
            self._taken.popleft().result()
        taken = self._threads.submit(leaf, piece)
        self._taken.append(taken)
        return taken
