"""Where a stage receives its rows: buffers that one thread fills while another computes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Inbox:
    """A small pool of receive buffers. One thread fills them, another consumes them, in the same order."""

    def __init__(self, max_tokens: int, row_bytes: int, pinned: bool) -> None:
        self._max_tokens = max_tokens
        self._row_bytes = row_bytes
        self._pinned = pinned
        self._free: deque[Tensor] = deque()
        self._filled: deque[tuple[Tensor, int]] = deque()

    def hand_out(self, tokens: int) -> memoryview:
        """Writable bytes for so many rows.

        Raises:
            ValueError: more than a microbatch may have.
        """
        if not 0 < tokens <= self._max_tokens:
            raise ValueError(f"microbatch has {tokens} tokens; the stage takes 1 to {self._max_tokens}")
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = torch.empty(self._max_tokens * self._row_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self._filled.append((buffer, tokens))
        return buffer.numpy().data[: tokens * self._row_bytes]

    def take(self) -> tuple[Tensor, int]:
        """The buffer handed out first among those not taken yet, and its rows."""
        assert self._filled, "a step came before its rows were received"
        return self._filled.popleft()

    def discard(self) -> None:
        """Let the oldest rows go unread, if there are any."""
        if self._filled:
            self.give_back(self.take()[0])

    def give_back(self, buffer: Tensor) -> None:
        """The rows have been read: the buffer may be handed out again."""
        self._free.append(buffer)
