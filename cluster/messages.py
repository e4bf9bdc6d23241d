"""Every message that crosses a link, one frozen dataclass each; `frames.py` puts them into bytes.

    gateway ── Submit, Cancel ──▶ router ── Microbatch ──▶ stage 0 ── Microbatch + rows ──▶ ... ──▶ last stage
    gateway ◀─ Tokens, Finished, Load ─ router ◀──────────────── StepResult ──────────────────────────┘

`Microbatch` and `StepResult` live in `tramontane.stages.microbatch`, since the stages speak them too. Deadlines travel
as remaining milliseconds, because hosts' clocks differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tramontane.stages.microbatch import Float32Array, Int32Array, Int64Array

PROTOCOL = 3
"""Both ends of a link must speak the same number; another one closes the link with a line in the log."""


class Role(StrEnum):
    """Who dials."""

    GATEWAY = "gateway"
    ROUTER = "router"
    STAGE = "stage"


class EndReason(StrEnum):
    """How the router ended a request. Stop strings are the gateway's business: it cancels when it has seen one."""

    STOP_TOKEN = "stop_token"  # noqa: S105  (not a password)
    """One of `Stopping.token_ids` was generated."""
    LENGTH = "length"
    """`Stopping.max_tokens` is reached."""
    REFUSED = "refused"
    """Too many wait, or it would end too late; no stage worked for it."""
    IMPOSSIBLE = "impossible"
    """It could not run even in an empty pipeline."""
    DEADLINE = "deadline"
    """`Submit.remaining_ms` are over."""
    BROKEN = "broken"
    """A part of the pipeline died."""
    NOT_FINITE = "not_finite"
    """The model's logits for this request held NaN or infinity, or every id was banned."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Challenge:
    """The listener's first frame on every link."""

    protocol: int
    """`PROTOCOL` as the listener knows it."""
    nonce: bytes
    """32 random bytes of the listener's."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Hello:
    """The dialler's answer."""

    protocol: int
    """`PROTOCOL` as the dialler knows it."""
    role: Role
    """What the dialler is."""
    name: str
    """`router-0`, `stage-0.1`, `gateway-0`; for the log."""
    epoch: int
    """The binding that the link belongs to; 0 on gateways' links."""
    nonce: bytes
    """32 random bytes of the dialler's."""
    proof: bytes
    """That the dialler knows the service's secret; see `handshake.py`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Welcome:
    """The listener's answer to a Hello that it accepts; nothing but the frames of a link follows."""

    proof: bytes
    """That the listener knows the secret, too."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Carried whole from the validated request to the scheduler's sequence."""

    temperature: float = 1.0
    """0 is greedy, and ignores the filters."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    min_p: float = 0.0
    """0 is off."""
    seed: int = 0
    """The noise of a token depends on this and its position alone; unsigned, 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Stopping:
    """When the router ends a completion. Carried whole, as `Sampling` is. Stop strings stay at the gateway."""

    max_tokens: int
    """Tokens to generate at most; with the prompt no more than the context."""
    min_tokens: int = 0
    """Until so many tokens are generated, none of `token_ids` is sampled; 0 is off."""
    token_ids: tuple[int, ...] = ()
    """Ids that end it, EOS included unless the user ignores it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Submit:
    """A validated request. Text stays at the gateway."""

    request: int
    """The gateway's number for it, unique on its link."""
    request_id: str
    """The user's name for it, quoted for logs."""
    tokens: Int32Array
    """Ids of the prompt. [1 .. context)"""
    sampling: Sampling
    stopping: Stopping
    remaining_ms: float | None
    """Milliseconds left until its deadline when the gateway sent this, or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cancel:
    """The user left, or the gateway has seen a stop string: free everything, answer nothing."""

    request: int
    """`Submit.request`."""
    completed: bool = False
    """A stop string has ended it, so its length tells of others'."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """New tokens of the requests of one gateway, all from one step. N of them, at most one a request."""

    request: Int64Array
    """`Submit.request` of the request that each token belongs to. [N]"""
    offset: Int32Array
    """Place of each token in its completion, from 0. [N]"""
    token: Int32Array
    """The id that was chosen. [N]"""
    log_probability: Float32Array
    """Its natural log probability under the model's own softmax, before temperature and filters. [N]"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Finished:
    """A request has ended; no message about it follows. Sent after its last Tokens."""

    request: int
    """`Submit.request`."""
    reason: EndReason
    detail: str
    """For the user, where the reason is an error; else empty."""
    queue_ms: float
    """Milliseconds by the router's clock, as the next two: from its Submit until the first microbatch with a token of
    it left. What has not begun when it ends counts up to the end here, and as 0 in what would follow."""
    prefill_ms: float
    """From then until its first token was back from the last stage."""
    decode_ms: float
    """From the first token to the last; 0 where there is only one."""
    retry_after_ms: float | None = None
    """When a refused request may be tried again, by estimate; None where nothing is known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Load:
    """How busy a router is, pushed to every gateway when it changes."""

    outstanding_tokens: int
    """Prompt tokens not yet computed and tokens still to be generated, over all requests."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Heartbeat:
    """Says on an idle link that its sender lives."""
