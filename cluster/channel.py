"""A bounded queue between two threads that either of them, or a third, may close."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ChannelClosed(Exception):  # noqa: N818  (an event, not an error)
    """Nothing goes in or comes out any more."""


class Channel(Generic[T]):
    """First in, first out, at most `limit` items inside."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, item: T) -> None:
        """Append; waits while the channel is full. Raises ChannelClosed."""
        with self._changed:
            while len(self._items) >= self._limit and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ChannelClosed
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> T:
        """Take the oldest; waits while the channel is empty. Raises ChannelClosed."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if self._closed:
                raise ChannelClosed
            self._changed.notify_all()
            return self._items.popleft()

    def close(self) -> None:
        """Drop what is inside and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
