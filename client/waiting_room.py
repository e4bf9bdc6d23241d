"""The calls that wait for a server: when to look why they do, whom to tell, and which of them to give up. Pure.

A call that waits costs nothing until `PATIENCE_S` have gone by without a first event. From then on, as long as some
call of its connection waits, somebody looks now and then (`diagnosis`) and tells the room what was found. The rules:

- what cannot become true ends all calls at once;
- a server that nobody reaches ends a call that has tried for `reach_timeout_s`;
- one that answers and does not serve is waited for, until the call's own deadline;
- no answer in time is no news.
"""

from __future__ import annotations

import logging
from typing import Generic, TypeVar

from tramontane.client.diagnosis import News, Standing

PATIENCE_S = 0.25
"""A call that has waited for less makes nobody look."""
LOOK_AGAIN_S = {
    Standing.SERVING: 5.0,  # the call waits for its turn, or for its prompt
    Standing.AWAITED: 2.0,
    Standing.UNREACHED: 1.0,
    Standing.UNKNOWN: 1.0,
    Standing.HOPELESS: 1.0,
}

log = logging.getLogger("tramontane.client")

Guest = TypeVar("Guest")


class WaitingRoom(Generic[Guest]):
    """Of one connection. Guests are calls that have had no event yet."""

    def __init__(self, reach_timeout_s: float) -> None:
        self._reach_timeout_s = reach_timeout_s
        self._since_s: dict[Guest, float] = {}
        self._reached_s = float("-inf")
        self._look_s = float("-inf")
        self._told: set[str] = set()
        self.reason = ""
        """What the guests wait for; empty while nothing is known to be wrong."""

    def __len__(self) -> int:
        return len(self._since_s)

    def enter(self, guest: Guest, now_s: float) -> None:
        """It begins to wait."""
        self._since_s[guest] = now_s

    def leave(self, guest: Guest) -> None:
        """It has its first event, or has ended."""
        self._since_s.pop(guest, None)
        if not self._since_s:
            self.reason = ""
            self._told.clear()

    def look_due(self, now_s: float) -> bool:
        """Whether somebody should find out why the guests wait."""
        return now_s >= self._look_s and any(now_s - since_s >= PATIENCE_S for since_s in self._since_s.values())

    def hear(self, news: News, now_s: float) -> dict[Guest, News]:
        """Take what was found; these guests are to be given up, and why."""
        self._look_s = now_s + LOOK_AGAIN_S[news.standing]
        if news.standing is Standing.UNKNOWN:
            return {}
        self._tell(news)
        self.reason = news.reason
        if news.standing is Standing.HOPELESS:
            return dict.fromkeys(self._since_s, news)
        if news.standing is not Standing.UNREACHED:
            self._reached_s = now_s
            return {}
        late = News(
            standing=news.standing,
            reason=f"{news.reason} (tried for {self._reach_timeout_s:g} s)",
            error_class=news.error_class,
        )
        return {
            guest: late
            for guest, since_s in self._since_s.items()
            if now_s - max(since_s, self._reached_s) >= self._reach_timeout_s
        }

    def _tell(self, news: News) -> None:
        """Once a reason. (Of a name with two addresses gRPC tells now the one's failure, now the other's.)"""
        if news.standing is not Standing.HOPELESS and news.reason not in ("", *self._told) and self._since_s:
            log.log(logging.INFO if self._told else logging.WARNING, "waiting: %s", news.reason)
            self._told.add(news.reason)
