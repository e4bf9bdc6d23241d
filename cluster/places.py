"""Places that calls take one after the other, in turn by user."""

from __future__ import annotations

import asyncio

from tramontane.cluster.fairness import FairQueue, Shares


class Places:
    """A number of places; who finds none waits. Belongs to one event loop.

    No user has more places than are left, so a newcomer finds one at once. A place that comes free goes to the user who
    has been given fewest.
    """

    def __init__(self, total: int) -> None:
        self._shares = Shares(total)
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @property
    def taken(self) -> int:
        """Places in use now."""
        return self._shares.total - self._shares.left

    def take_at_once(self, user: str) -> bool:
        """Take a place if there is one for the user now."""
        return self._shares.take(user)

    async def take(self, user: str) -> None:
        """Wait for a place."""
        if self._shares.take(user):
            return
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(user, given)
        try:
            await given
        except asyncio.CancelledError:
            if given.cancelled():
                self._waiting.discard(user, given)
            else:
                self.leave(user)
            raise

    def leave(self, user: str) -> None:
        """Give a place back, and give away what there is now."""
        self._shares.give_back(user)
        while (taken := self._waiting.take(self._shares.has_room)) is not None:
            next_user, given = taken
            if not given.cancelled():
                self._shares.take(next_user)
                self._waiting.charge(next_user, 1.0)
                given.set_result(None)
