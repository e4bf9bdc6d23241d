"""The calls that wait for a server: when to ask why, what to tell the user, which of them to give up. Pure.

A call that waits costs no question until `PATIENCE_S` have passed without a first event. After that its connection asks
now and then (`diagnosis`), as long as any of its calls waits, and passes each diagnosis to `WaitingCalls.update`:

    hopeless     all calls end at once
    unreached    a call ends once it has tried for `reach_timeout_s`
    awaited      the server answers and does not serve: calls wait until their own deadlines
    unknown      nothing changes
"""

from __future__ import annotations

import logging
from typing import Generic, Protocol, TypeVar

from tramontane.client.diagnosis import Diagnosis, Standing

PATIENCE_S = 0.25
"""A call that has waited for less makes nobody ask."""
LOOK_AGAIN_S = {
    Standing.SERVING: 5.0,  # the call waits for its turn, or for its prompt
    Standing.AWAITED: 2.0,
    Standing.UNREACHED: 1.0,
    Standing.UNKNOWN: 1.0,
    Standing.HOPELESS: 1.0,
}
"""The time from one diagnosis to the next, by what the first one found."""

log = logging.getLogger("tramontane.client")

Call = TypeVar("Call")


class WaitingCall(Protocol):
    """A call that waits for its first event, as a connection sees it."""

    waited_for: str
    """The reason that was known when the call stopped waiting; empty where none was."""

    def give_up(self, diagnosis: Diagnosis) -> None:
        """End the call with the diagnosis's error."""


class WaitingCalls(Generic[Call]):
    """The calls of one connection that have had no event yet."""

    def __init__(self, reach_timeout_s: float) -> None:
        self._reach_timeout_s = reach_timeout_s
        self._since_s: dict[Call, float] = {}
        self._reached_s = float("-inf")
        self._look_s = float("-inf")
        self._told: set[str] = set()
        self.reason = ""
        """What the calls wait for; empty while nothing is known to be wrong."""

    def __len__(self) -> int:
        return len(self._since_s)

    def add(self, call: Call, now_s: float) -> None:
        """The call begins to wait."""
        self._since_s[call] = now_s

    def remove(self, call: Call) -> None:
        """The call has its first event, or has ended."""
        self._since_s.pop(call, None)
        if not self._since_s:
            self.reason = ""
            self._told.clear()

    def look_due(self, now_s: float) -> bool:
        """Whether it is time to find out why the calls wait."""
        return now_s >= self._look_s and any(now_s - since_s >= PATIENCE_S for since_s in self._since_s.values())

    def update(self, diagnosis: Diagnosis, now_s: float) -> dict[Call, Diagnosis]:
        """Take a new diagnosis in; the calls to give up, each with the diagnosis that it ends with."""
        self._look_s = now_s + LOOK_AGAIN_S[diagnosis.standing]
        if diagnosis.standing is Standing.UNKNOWN:
            return {}
        self._log(diagnosis)
        self.reason = diagnosis.reason
        if diagnosis.standing is Standing.HOPELESS:
            return dict.fromkeys(self._since_s, diagnosis)
        if diagnosis.standing is not Standing.UNREACHED:
            self._reached_s = now_s
            return {}
        late = Diagnosis(
            standing=diagnosis.standing,
            reason=f"{diagnosis.reason} (tried for {self._reach_timeout_s:g} s)",
            error_class=diagnosis.error_class,
        )
        return {
            call: late
            for call, since_s in self._since_s.items()
            if now_s - max(since_s, self._reached_s) >= self._reach_timeout_s
        }

    def _log(self, diagnosis: Diagnosis) -> None:
        """Log each reason once: of a name with two addresses gRPC tells now the one's failure, now the other's."""
        reason = diagnosis.reason
        if diagnosis.standing is not Standing.HOPELESS and reason not in ("", *self._told) and self._since_s:
            log.log(logging.INFO if self._told else logging.WARNING, "waiting: %s", reason)
            self._told.add(reason)
