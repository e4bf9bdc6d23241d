"""What the client hands out: frozen values. Durations and counts carry their units in their names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP_TOKEN = "stop_token"  # noqa: S105  (not a password)
    """The model's EOS or one of the request's stop ids was generated."""
    STOP_STRING = "stop_string"
    """A stop string came up; the text leaves it out."""
    LENGTH = "length"
    """`max_tokens` is reached."""


class HealthStatus(StrEnum):
    """What the standard health service says about a server or a model."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    """Generated, the one that ended the completion included."""

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the server's time went, by its own clock."""

    queue_ms: float
    """From the request's arrival until a pipeline first worked for it."""
    prefill_ms: float
    """From then until the first token."""
    decode_ms: float
    """From the first token to the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New tokens of a stream, and the text that can be said for certain by now. Text may lag behind the ids."""

    text: str
    token_ids: tuple[int, ...]
    offset: int
    """Place of the first of `token_ids` in the completion, from 0."""
    log_probabilities: tuple[float, ...]
    """One a token: its natural log probability under the model's own softmax (temperature 1, no filters)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    """One a token, as in `Delta`."""
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    request_id: str
    seed: int
    """With prompt, sampling options and `version` it gives the same tokens again: in float32 on the CPU, and elsewhere
    where the model's `row_invariant` says so."""
    version: str
    """Of model and numerics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """One model that a server offers."""

    name: str
    architecture: str
    context_tokens: int
    """Prompt and completion together."""
    checkpoint_context_tokens: int
    """The context that the checkpoint was made for; more than `context_tokens` where less is served."""
    context_lowered: str
    """Why less is served although nobody asked for less: the sum of the server's memory. Else empty."""
    window_tokens: int | None
    """The smallest sliding window of any layer; None where every layer sees the whole context."""
    dtype: str
    stages: int
    version: str
    row_invariant: bool
    """A request's tokens do not depend on which other requests are served beside it."""
    vocabulary_tokens: int
    has_tokenizer: bool
    """False: the model takes and gives token ids only."""
    serving: bool
    quantization: str = ""
    """How the weights are held where that is not in `dtype`: int8. Else empty."""
    reason: str = ""
    """Why the model is not serving; empty while it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStats:
    """One process of the service."""

    role: str
    """controller, gateway, router or stage."""
    name: str
    """`0` for gateway 0 or router 0, `0.1` for stage 1 of replica 0."""
    node: str
    pid: int
    start_time_s: float
    """Seconds since 1970, by its host's clock."""
    cpu_s: float
    """User and system CPU time since then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """Counters of one stage since it was loaded."""

    name: str
    """`0.1` is stage 1 of replica 0."""
    busy_ns: int
    """Nanoseconds inside its steps."""
    steps: int
    """Microbatches that it stepped through."""
    tokens: int
    """Their rows, prompts and decode together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStats:
    """Whom a router has refused since it started, and what it estimates now. None where nothing was measured."""

    refused_queue_full: int = 0
    """As many requests waited as may (max-waiting)."""
    refused_queue_wait: int = 0
    """They would have waited too long (max-queue-wait)."""
    refused_deadline: int = 0
    """They could not have ended before their deadline."""
    estimated_wait_s: float | None = None
    """What a request that came now would wait until its prefill begins."""
    seats: int = 0
    """Sequences that may run (max-running)."""
    decode_step_s: float | None = None
    """A decode step of as many rows as are worth while."""
    max_step_s: float | None = None
    """The longest step while others decode, unless decode alone takes half of it (max-step)."""
    prompt_row_s: float | None = None
    """A token of a prompt, in a step that is made anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """Counters and gauges of one pipeline's router."""

    name: str
    """`0` is the router of replica 0."""
    microbatches: int
    """Sent down the pipeline since the router started, as all counters up to `preemptions`."""
    tokens: int
    """Their rows: prompts, decode and what was computed again after a preemption."""
    prompt_tokens: int
    """Tokens of the prompts whose first token has been chosen, each prompt once."""
    completion_tokens: int
    """Tokens generated, the ones that ended completions included."""
    preemptions: int
    """Times that a sequence lost its computed rows to an older one, to be computed again later."""
    waiting: int
    """Sequences that wait to be admitted now, the preempted included."""
    running: int
    """Sequences that are admitted now."""
    in_flight_microbatches: int
    """Microbatches sent whose results are not back now."""
    kv_blocks_used: tuple[int, ...]
    """KV blocks that sequences hold now, one entry a window class."""
    kv_blocks_total: tuple[int, ...]
    """KV blocks that there are, one entry a window class."""
    admission: AdmissionStats = AdmissionStats()
    late: str = ""
    """Which stage takes far longer than such a step does here; empty where none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStats:
    """How a gateway fares."""

    name: str
    """`0` is gateway 0."""
    open_calls: int
    """Of all methods, now."""
    refused_calls: int
    """Because their user had its share of open calls, since the start."""
    tokenizing_bytes: int
    """Of requests that wait to be tokenized, or are being tokenized, now."""
    longest_stall_ms: float
    """The longest time for which its event loop stood still, since the start."""
    recent_stall_ms: float
    """The same over the last minute."""
    longest_own_stall_ms: float
    """As `longest_stall_ms`, without the time for which other threads had the machine's cores."""
    recent_own_stall_ms: float
    """The same over the last minute."""
    refusal_bounds_s: tuple[float, ...]
    """Upper bounds of the counts, ascending; the last one is infinite."""
    refusal_counts: tuple[int, ...]
    """Calls that ended with RESOURCE_EXHAUSTED, by the time from their arrival to the status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters since each process started; subtract two readings."""

    processes: tuple[ProcessStats, ...]
    stages: tuple[StageStats, ...]
    routers: tuple[RouterStats, ...]
    gateways: tuple[GatewayStats, ...] = ()
    late: tuple[str, ...] = ()
    """Parts that do not answer, or stages that are late, a line each."""
    models: tuple[ModelInfo, ...] = ()
    """The models of the service; empty while the model is loading."""
