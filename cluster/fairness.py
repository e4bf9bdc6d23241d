"""What users share: how much each may hold, and whose turn it is. Pure: no clock, no threads, no event loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Shares:
    """A stock of which users hold parts. Nobody may hold more than is left after it.

    So a user alone gets half, one of two who take all they can a third, and there is always something left for who
    comes next (dynamic thresholds, Choudhury and Hahne 1998).

    >>> shares = Shares(12)
    >>> [shares.take("ann", 3), shares.take("ann", 4), shares.take("ann", 3), shares.take("bob", 3), shares.left]
    [True, False, True, True, 3]
    """

    def __init__(self, total: int) -> None:
        assert total >= 2, f"a stock of {total}, of which half is nothing"
        self.total = total
        self.left = total
        self._held: dict[str, int] = {}

    def held_by(self, user: str) -> int:
        """What the user holds now."""
        return self._held.get(user, 0)

    def has_room(self, user: str, amount: int = 1) -> bool:
        """Whether the user may take so much now."""
        return self.held_by(user) + amount <= self.left - amount

    def take(self, user: str, amount: int = 1) -> bool:
        """Take so much, if the user may."""
        if not self.has_room(user, amount):
            return False
        self.left -= amount
        self._held[user] = self.held_by(user) + amount
        return True

    def give_back(self, user: str, amount: int = 1) -> None:
        """Give back what was taken."""
        held = self._held.pop(user) - amount
        assert held >= 0, f"{user} gives back {amount} of {held + amount}"
        self.left += amount
        if held:
            self._held[user] = held


class FairQueue(Generic[T]):
    """Next comes the user who has been served least, of those who wait; each user's own items come in order.

    An item is in the queue once at most.

    A user who comes, or comes back, starts level with the one served last (start-time fair queueing, Goyal, Vin and
    Cheng 1996): idleness saves nothing up.

    >>> queue = FairQueue[str]()
    >>> for user, item in (("ann", "a1"), ("ann", "a2"), ("ann", "a3"), ("bob", "b1")):
    ...     queue.put(user, item)
    >>> order = []
    >>> while (taken := queue.take()) is not None:
    ...     order.append(taken[1])
    ...     queue.charge(taken[0], 1.0)
    >>> order
    ['a1', 'b1', 'a2', 'a3']
    """

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[T, None]] = {}
        """Each user's items in order. Thousands may leave at once, so an item is taken out without a search."""
        self._served: dict[str, float] = {}
        """Of users who wait, and of others who are ahead of `_level`."""
        self._level = 0.0
        """What the user served last had been served before."""

    def put(self, user: str, item: T) -> None:
        """Let an item wait behind the user's others."""
        self._line(user)[item] = None

    def put_back(self, user: str, item: T) -> None:
        """Let an item that is not done with wait before the user's others."""
        line = self._line(user)
        line[item] = None
        line.move_to_end(item, last=False)

    def take(self, may: Callable[[str], bool] = lambda user: True) -> tuple[str, T] | None:
        """The next item of those whose users may have one now, and its user."""
        user = min(filter(may, self._waiting), key=self._served.__getitem__, default=None)
        if user is None:
            return None
        item, _ = self._waiting[user].popitem(last=False)
        self._level = max(self._level, self._served[user])
        self._tidy(user)
        return user, item

    def charge(self, user: str, cost: float) -> None:
        """Say what serving the user has cost."""
        self._served[user] = self._served.get(user, self._level) + cost

    def discard(self, user: str, item: T) -> bool:
        """Take an item out; False where it does not wait."""
        if item not in self._waiting.get(user, ()):
            return False
        del self._waiting[user][item]
        self._tidy(user)
        return True

    def _line(self, user: str) -> OrderedDict[T, None]:
        self._served[user] = max(self._served.get(user, 0.0), self._level)
        return self._waiting.setdefault(user, OrderedDict())

    def _tidy(self, user: str) -> None:
        """Forget an empty line, and from time to time those who would start level anyway."""
        if not self._waiting[user]:
            del self._waiting[user]
        if len(self._served) > 2 * len(self._waiting) + 64:
            self._served = {
                each: served for each, served in self._served.items() if each in self._waiting or served > self._level
            }
