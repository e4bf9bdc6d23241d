"""Digests of whole tensors, on a thread beside the one that reads them. No torch.

A tensor's digest is BLAKE3 of its bytes, with BLAKE3 of its name, dtype and shape as the key. Neither the file that a
tensor lies in nor its place there counts. One thread keeps up with reading and packing: it hashes 4.8 GB/s, and 0.75 by
SHA-256 (an Intel Xeon with SHA-NI and AVX-512, shared with others, 2026-11-28).
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from blake3 import blake3

from tramontane.stages.safetensors_header import TensorInfo

MOST_WAITING = 2
"""Tensors that wait for the thread, and stay in memory for it; a loader that is quicker waits as well."""


def digest(tensor: TensorInfo, content: memoryview) -> bytes:
    """Of one tensor and its bytes. Other threads run meanwhile."""
    about = blake3(f"{tensor.name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    return blake3(content, key=about.digest()).digest()


class Hashing:
    """A thread that takes digests while its owner reads on. It ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hashing")
        self._taken: deque[Future[bytes]] = deque()

    def digest(self, tensor: TensorInfo, content: memoryview) -> Future[bytes]:
        """Of a tensor, whose bytes nobody may write to until then."""
        if len(self._taken) == MOST_WAITING:
            self._taken.popleft().result()
        taken = self._thread.submit(digest, tensor, content)
        self._taken.append(taken)
        return taken
