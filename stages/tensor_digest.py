"""Digests of whole tensors, on a thread beside the one that reads them. No torch.

A tensor's digest is BLAKE3 of its bytes, with BLAKE3 of its name, dtype and shape as the key. Neither the file that a
tensor lies in nor its place there counts. One thread keeps up with reading and packing.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from blake3 import blake3

from tramontane.stages.safetensors_header import TensorInfo

MOST_WAITING = 2
"""How many tensors may wait for the thread. They stay in memory meanwhile, so a loader that is quicker has to wait."""


def digest(tensor: TensorInfo, content: memoryview) -> bytes:
    """The digest of one tensor with these bytes. Releases Python's lock while it hashes."""
    about = blake3(f"{tensor.name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
    return blake3(content, key=about.digest()).digest()


class Hashing:
    """A thread that computes digests while its owner reads on. It ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "hashing")
        self._taken: deque[Future[bytes]] = deque()

    def digest(self, tensor: TensorInfo, content: memoryview) -> Future[bytes]:
        """Start to digest a tensor. Nobody may write to its bytes until the result is there."""
        if len(self._taken) == MOST_WAITING:
            self._taken.popleft().result()
        taken = self._thread.submit(digest, tensor, content)
        self._taken.append(taken)
        return taken
