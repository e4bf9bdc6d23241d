"""What a run found, as frozen values: the table, the JSON, the page and `compare` all read these and nothing else.

Milliseconds and seconds stand in the names. What could not be known is None, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from tramontane.client.loadtest.finding import EXIT_STATUSES, Finding, Severity, worst_first
from tramontane.client.loadtest.plan import Load

MEASURES = {
    "ttft": "time to first token: from the intended arrival to the first token id (HTTP: the first content)",
    "itl": "inter-token latency: gaps between messages that bring tokens",
    "itl_per_token": "the same gaps, each message of k tokens counted as k equal gaps",
    "tpot": "time per output token: (end - first token) / (tokens - 1), undefined below 2 tokens",
    "e2el": "end-to-end latency: from the intended arrival to the end",
    "e2el_per_token": "end-to-end latency divided by the completion's tokens",
}
"""Every latency that is reported, and its one definition. All are in milliseconds."""

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
"""Those that are reported of each measure, as far as there are samples for them."""

CONFIDENCE = 0.95
"""Of the intervals of quantiles, and of all intervals of a comparison together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantile:
    """One quantile with its 95 % confidence interval. Printed only with at least 10 samples beyond it."""

    q: float
    """0.5 is the median."""
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """One measure over all samples of a run, in milliseconds."""

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: tuple[Quantile, ...]

    def quantile(self, q: float) -> Quantile | None:
        """None where there were too few samples for it."""
        return next((each for each in self.quantiles if abs(each.q - q) < 1e-9), None)

    def at(self, q: float) -> float | None:
        """The quantile's value, None where there were too few samples for it."""
        found = self.quantile(q)
        return None if found is None else found.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a run shall keep, such as TTFT p95 < 1 s."""

    measure: str
    """A key of MEASURES."""
    q: float
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.measure} p{self.q * 100:g} < {self.limit_ms:g} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveResult:
    """Whether a run kept an objective. A refused, failed or cut request counts as infinitely late."""

    objective: Objective
    value_ms: float | None
    """The quantile over all requests; None where it is infinite or there are no samples."""
    met: bool | None
    """None: no verdict, as of a closed loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Requests of the measured window with NORMAL, SLOW or CHURN conduct, by their end."""

    sent: int
    completed: int
    failed: int
    """`Record.failed`: ended with an error, refused ones included; CUT and LEFT ones did not."""
    cut: int
    by_status: dict[str, int]
    refused: int = 0
    """`Record.refused`: those of the failed that the server had no room for."""
    first_errors: dict[str, str] = field(default_factory=dict)
    """By status, the message of the first request that ended with it."""

    @property
    def broken(self) -> int:
        """Requests that got no answer and no refusal either."""
        return self.failed - self.refused + self.cut

    @property
    def mostly_unserved(self) -> bool:
        """More requests failed or were cut than not: that is the server's doing, whatever else is wrong with a run."""
        return self.failed + self.cut > self.sent / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Rates over the measured window. Tokens count when they arrive, requests when they end."""

    requests_per_s: float
    goodput_per_s: float | None
    """Requests per second that met every objective; None without objectives, and of a closed loop."""
    goodput_share: float | None
    """Of all requests that arrived in the window."""
    input_tokens_per_s: float | None
    """None where the server does not say how long prompts are."""
    output_tokens_per_s: float
    tokens_per_message: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Where a completed request's time went, on the mean. The parts add up to the mean end-to-end latency."""

    client_lag_ms: float
    """From the intended arrival to sending."""
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    network_ms: float
    """The rest: the way there and back, and what nobody accounts for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorLag:
    """How late the generator itself was."""

    send: Distribution | None
    """From each intended arrival to sending."""
    read: Distribution | None
    """By how much each worker's event loop ran behind, sampled all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessShare:
    """CPU time of one process over the measured window."""

    role: str
    """gateway, router, stage or controller."""
    name: str
    cpu_s: float
    cores: float
    """CPU seconds per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """What the server's own counters say about the measured window. Two readings, subtracted."""

    seconds: float
    """Between the readings."""
    stage_busy: dict[str, float]
    """Share of the time that each stage spent inside its steps."""
    microbatches: int
    rows_per_microbatch: float | None
    preemptions: int
    processes: tuple[ProcessShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What the generator itself reaches against a server that answers at once."""

    requests_per_s: float
    messages_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """Correctness while loading."""

    offsets_wrong: int
    """Streams that contradicted themselves."""
    texts_checked: int
    texts_wrong: int
    """Text that is not what the ids print, up to the stop string."""
    alone_checked: int
    """Requests asked again alone after the run."""
    alone_wrong: int
    """Whose tokens were others than under load."""
    alone_unanswered: int = 0
    """Asked again alone and not answered in full; the first such one ends the asking."""
    repeats_checked: int
    """Requests that share prompt, options and seed with an earlier one of the run."""
    repeats_wrong: int
    bad_accepted: int
    """Requests that had to be refused and were not, or not in the right way."""
    must_match: bool
    """The model's `row_invariant`: a mismatch is a fault, not rounding."""
    examples: tuple[str, ...] = ()
    """One sentence per mismatch, the first few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A time in which requests were open and not one message came."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultReport:
    """What one fault cost."""

    fault: str
    """As it was asked for."""
    at_s: float
    """When it really happened."""
    target: str
    """The process: role, name, pid."""
    errors: int
    """Requests that failed from then until recovery."""
    stall_s: float | None
    """The longest time in which somebody waited and no message came, from then until recovery, however short; None
    where no message came again.
    """
    completed_per_s_before: float | None
    completed_per_s_after: float | None
    """Completed requests per second, whether they met the objectives or not: before the fault and after recovery."""
    error: str = ""
    """Why it could not be done, where it could not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Second:
    """One second of the timeline."""

    at_s: int
    arrived: int
    ended: int
    failed: int
    """Requests that failed or were cut in it."""
    open: int
    """Requests under way at its end."""
    output_tokens: int
    ttft_ms: float | None
    """Median of the first tokens that came in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """Whom the run talked to."""

    kind: str
    """grpc or openai."""
    address: str
    model: str
    version: str = ""
    dtype: str = ""
    stages: int | None = None
    context_tokens: int | None = None
    vocabulary_tokens: int | None = None
    has_tokenizer: bool = True
    row_invariant: bool = False
    unsent: tuple[str, ...] = ()
    """Optional fields that were not sent, since this server is not known to take them."""

    @property
    def tells_token_ids(self) -> bool:
        """Answers can be checked by their ids; HTTP brings text alone."""
        return self.kind == "grpc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the generator ran."""

    processor: str
    cores: int
    memory_gib: float
    system: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Per request, in order of intended arrival, completed ones only: what `compare` resamples."""

    arrived_s: tuple[float, ...] = ()
    ttfts_ms: tuple[float, ...] = ()
    e2els_ms: tuple[float, ...] = ()
    tpots_ms: tuple[float | None, ...] = ()
    itls_ms: tuple[tuple[float, ...], ...] = ()
    input_lens: tuple[int, ...] = ()
    output_lens: tuple[int, ...] = ()
    met: tuple[bool, ...] = ()
    """Whether it met every objective."""

    def __post_init__(self) -> None:
        rows = {len(getattr(self, each.name)) for each in fields(self)}
        if len(rows) > 1:
            raise ValueError(f"samples hold one row a request; their columns have {sorted(rows)} rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run."""

    date: str
    """ISO 8601, UTC, when it started."""
    tool: str
    """Name and version of this harness."""
    command: str
    target: TargetInfo
    machine: Machine
    workers: int
    load: Load
    workload: str
    """Words for the report."""
    window_s: tuple[float, float]
    """The measured part of the run, warm-up and drain cut off."""
    counts: Counts
    latencies: dict[str, Distribution]
    """By the keys of MEASURES; one without samples is left out."""
    throughput: Throughput
    objectives: tuple[ObjectiveResult, ...]
    breakdown: Breakdown | None
    """None where the server does not tell its timings."""
    lag: GeneratorLag
    generator_cores: float
    """CPU seconds per second of all generator processes together over the measured window."""
    server: ServerView | None
    checks: Checks | None
    """Over HTTP, where ids are not told, only whether bad requests were refused. None where nothing was checked."""
    stationary: bool | None
    """Whether open requests neither piled up nor drained. None where it cannot be told: in a window below 5 s or 30
    requests, and under loads that themselves change (ramp, steps, trace) or wait for answers (closed).
    """
    stalls: tuple[Stall, ...]
    faults: tuple[FaultReport, ...]
    ceiling: Ceiling | None
    findings: tuple[Finding, ...]
    timeline: tuple[Second, ...]
    samples: Samples = field(default_factory=Samples)
    refusals: Distribution | None = None
    """How long refused requests waited for their refusal, from sending, in milliseconds; None where none was."""

    @property
    def worst(self) -> Severity | None:
        """The severity of its worst finding; None where it has none."""
        found = worst_first(self.findings)
        return found[0].severity if found else None

    @property
    def exit_status(self) -> int:
        """0; 1 for wrong answers, else 4 for figures that cannot be trusted, else 3 for a missed objective."""
        return 0 if self.worst is None else EXIT_STATUSES[self.worst]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """Several runs of one workload at different rates."""

    levels: tuple[RunResult, ...]
    """In ascending order of rate."""
    objectives: tuple[Objective, ...]
    best_rate: float | None
    """The highest rate at which every objective held; None where none did."""
    first_missed_rate: float | None
    """The lowest rate above it at which one did not; None where none was missed."""
    findings: tuple[Finding, ...] = ()
    """On the levels together: answers that differ between them, and why there is no best rate."""

    @property
    def exit_status(self) -> int:
        """0; 1 for wrong answers at any level; where no rate kept the objectives 3, or 4 if nothing can be said."""
        everywhere = [*self.findings, *(finding for level in self.levels for finding in level.findings)]
        if any(finding.severity is Severity.WRONG for finding in everywhere):
            return 1
        if self.best_rate is not None:
            return 0
        return 4 if any(finding.severity is Severity.INVALID for finding in self.findings) else 3
