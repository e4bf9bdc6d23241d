"""What a run will do, fixed before it starts: every request, and when it is meant to arrive.

A plan is made from a seed (`load/arrivals.py`, `load/workload.py`), so that two runs, two servers or two levels of a
sweep get the same requests. Workers receive their part of it as JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Conduct(StrEnum):
    """How the client behaves after sending."""

    NORMAL = "normal"
    """Reads as fast as it can, to the end."""
    CANCEL = "cancel"
    """Leaves after `cancel_after` tokens."""
    SLOW = "slow"
    """Pauses `pause_s` before each message it reads."""
    CHURN = "churn"
    """Opens a connection of its own for this request and closes it after."""
    BAD = "bad"
    """Sends what the server must refuse; anything but INVALID_ARGUMENT (HTTP: 400, 422) is a fault of the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. It says everything that decides its tokens, so that it can be asked again alone."""

    number: int
    """Its place in the plan, from 0."""
    prompt: str | tuple[int, ...]
    """Text, or token ids, which are taken as they are."""
    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    """True where the workload fixes the completion's length."""
    conduct: Conduct = Conduct.NORMAL
    cancel_after: int = 0
    """Tokens after which a CANCEL leaves; 0: as soon as it is sent."""
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How requests come: the words for reports, and the window that is measured."""

    kind: str
    """closed, constant, poisson, gamma, steps, ramp or trace."""
    duration_s: float
    """Arrivals come in [0, duration); of a closed loop: users send until then."""
    warmup_s: float
    """Requests that arrive earlier are sent but not measured."""
    seed: int
    rate: float | None = None
    """Mean arrivals a second; None for a closed loop."""
    burstiness: float | None = None
    """Shape of gamma's gaps: 1 is Poisson, less comes in bursts."""
    users: int | None = None
    """Of a closed loop."""
    detail: str = ""
    """More words, for example the steps or the trace's file."""

    @property
    def is_open(self) -> bool:
        """Arrivals do not wait for answers, so that overload shows. A closed loop hides it."""
        return self.kind != "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A whole run's requests.

    Of an open loop `arrivals_s` has one intended arrival an ask, ascending, in seconds from the run's start. Of a
    closed loop it is empty, and each user takes the next ask when the last is done; the asks begin again when they run
    out.
    """

    load: Load
    asks: tuple[Ask, ...]
    arrivals_s: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    """What the report must say of the files that it was made from."""

    def __post_init__(self) -> None:
        assert len(self.arrivals_s) == (len(self.asks) if self.load.is_open else 0), (
            f"{len(self.asks)} asks of a {self.load.kind} load have {len(self.arrivals_s)} arrivals"
        )
