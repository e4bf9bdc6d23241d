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

PROTOCOL = 1
"""Both ends of a link must speak the same number; another one closes the link with a line in the log."""


class Role(StrEnum):
    """Who dials."""

    GATEWAY = "gateway"
    ROUTER = "router"
    STAGE = "stage"


class EndReason(StrEnum):
    """How the router ended a request. Stop strings are the gateway's business: it cancels when it has seen one."""

    STOP_TOKEN = "stop_token"  # noqa: S105  (not a password)
    LENGTH = "length"
    REFUSED = "refused"
    """The waiting queue is full; no stage worked for it."""
    DEADLINE = "deadline"
    BROKEN = "broken"
    """A part of the pipeline died."""
    NOT_FINITE = "not_finite"
    """The model's logits for this request held NaN or infinity."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Challenge:
    """The listener's first frame on every link."""

    protocol: int
    nonce: bytes
    """32 random bytes; the dialler's proof is their HMAC."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Hello:
    """The dialler's answer."""

    protocol: int
    role: Role
    name: str
    """`router-0`, `stage-0.1`, `gateway-0`; for the log."""
    epoch: int
    """The binding that the link belongs to; 0 on gateways' links."""
    proof: bytes
    """HMAC-SHA256 of the nonce under the service's secret; empty while everything runs on one node."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Submit:
    """A validated request. Text stays at the gateway."""

    request: int
    """The gateway's number for it, unique on its link."""
    request_id: str
    """The user's name for it, for logs."""
    tokens: Int32Array
    """The prompt. [1 .. context)"""
    max_tokens: int
    min_tokens: int
    stop_ids: Int32Array
    """Ids that end it, EOS included unless the user ignores it."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    remaining_ms: float | None
    """Time left until its deadline, or None."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cancel:
    """The user left, or the gateway has seen a stop string: free everything, answer nothing."""

    request: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """New tokens of the requests of one gateway, all from one step. N of them, at most one a request."""

    request: Int64Array
    offset: Int32Array
    """Place of the token in its completion."""
    token: Int32Array
    log_probability: Float32Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Finished:
    """A request has ended; no message about it follows. Sent after its last Tokens."""

    request: int
    reason: EndReason
    detail: str
    """For the user, where the reason is an error; else empty."""
    queue_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Load:
    """How busy a router is, pushed to every gateway when it changes."""

    outstanding_tokens: int
    """Prompt tokens not yet computed and tokens still to be generated, over all requests."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Heartbeat:
    """Says on an idle TCP link that its sender lives."""
