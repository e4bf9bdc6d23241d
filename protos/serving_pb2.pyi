from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    STOP_TOKEN: _ClassVar[FinishReason]
    STOP_STRING: _ClassVar[FinishReason]
    LENGTH: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
STOP_TOKEN: FinishReason
STOP_STRING: FinishReason
LENGTH: FinishReason

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class Stopping(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "strings", "token_ids", "ignore_eos")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STRINGS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    strings: _containers.RepeatedScalarFieldContainer[str]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., strings: _Optional[_Iterable[str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("token_ids", "version")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    version: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., version: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("model", "request_id", "text", "tokens", "sampling", "stopping", "resume")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    model: str
    request_id: str
    text: str
    tokens: TokenIds
    sampling: Sampling
    stopping: Stopping
    resume: Resume
    def __init__(self, model: _Optional[str] = ..., request_id: _Optional[str] = ..., text: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., stopping: _Optional[_Union[Stopping, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("request_id", "seed", "version", "prompt_tokens", "ids_only")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDS_ONLY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    version: str
    prompt_tokens: int
    ids_only: bool
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., version: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., ids_only: _Optional[bool] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("text", "token_ids", "offset", "log_probabilities")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    log_probabilities: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., log_probabilities: _Optional[_Iterable[float]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "completion_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    completion_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "prefill_ms", "decode_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., prefill_ms: _Optional[float] = ..., decode_ms: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason", "usage", "timings")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    reason: FinishReason
    usage: Usage
    timings: Timings
    def __init__(self, reason: _Optional[_Union[FinishReason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("started", "delta", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    delta: Delta
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "completion", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    completion: Delta
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., completion: _Optional[_Union[Delta, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("model", "text", "add_bos")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ADD_BOS_FIELD_NUMBER: _ClassVar[int]
    model: str
    text: str
    add_bos: bool
    def __init__(self, model: _Optional[str] = ..., text: _Optional[str] = ..., add_bos: _Optional[bool] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("model", "ids", "continuation")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    ids: _containers.RepeatedScalarFieldContainer[int]
    continuation: bool
    def __init__(self, model: _Optional[str] = ..., ids: _Optional[_Iterable[int]] = ..., continuation: _Optional[bool] = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "context_tokens", "window_tokens", "dtype", "stages", "version", "row_invariant", "vocabulary_tokens", "has_tokenizer", "serving", "checkpoint_context_tokens", "context_lowered", "quantization", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROW_INVARIANT_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LOWERED_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    context_tokens: int
    window_tokens: int
    dtype: str
    stages: int
    version: str
    row_invariant: bool
    vocabulary_tokens: int
    has_tokenizer: bool
    serving: bool
    checkpoint_context_tokens: int
    context_lowered: str
    quantization: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., context_tokens: _Optional[int] = ..., window_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., stages: _Optional[int] = ..., version: _Optional[str] = ..., row_invariant: _Optional[bool] = ..., vocabulary_tokens: _Optional[int] = ..., has_tokenizer: _Optional[bool] = ..., serving: _Optional[bool] = ..., checkpoint_context_tokens: _Optional[int] = ..., context_lowered: _Optional[str] = ..., quantization: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("processes", "stages", "routers", "gateways", "late", "models")
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    processes: _containers.RepeatedCompositeFieldContainer[ProcessStats]
    stages: _containers.RepeatedCompositeFieldContainer[StageStats]
    routers: _containers.RepeatedCompositeFieldContainer[RouterStats]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayStats]
    late: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, processes: _Optional[_Iterable[_Union[ProcessStats, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[StageStats, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterStats, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[GatewayStats, _Mapping]]] = ..., late: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class ProcessStats(_message.Message):
    __slots__ = ("role", "name", "node", "pid", "start_time_s", "cpu_s")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_S_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    role: str
    name: str
    node: str
    pid: int
    start_time_s: float
    cpu_s: float
    def __init__(self, role: _Optional[str] = ..., name: _Optional[str] = ..., node: _Optional[str] = ..., pid: _Optional[int] = ..., start_time_s: _Optional[float] = ..., cpu_s: _Optional[float] = ...) -> None: ...

class StageStats(_message.Message):
    __slots__ = ("name", "busy_ns", "steps", "tokens")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUSY_NS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    name: str
    busy_ns: int
    steps: int
    tokens: int
    def __init__(self, name: _Optional[str] = ..., busy_ns: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class RouterStats(_message.Message):
    __slots__ = ("name", "microbatches", "tokens", "prompt_tokens", "completion_tokens", "preemptions", "waiting", "running", "in_flight_microbatches", "kv_blocks_used", "kv_blocks_total", "admission", "late")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_MICROBATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    microbatches: int
    tokens: int
    prompt_tokens: int
    completion_tokens: int
    preemptions: int
    waiting: int
    running: int
    in_flight_microbatches: int
    kv_blocks_used: _containers.RepeatedScalarFieldContainer[int]
    kv_blocks_total: _containers.RepeatedScalarFieldContainer[int]
    admission: AdmissionStats
    late: str
    def __init__(self, name: _Optional[str] = ..., microbatches: _Optional[int] = ..., tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., in_flight_microbatches: _Optional[int] = ..., kv_blocks_used: _Optional[_Iterable[int]] = ..., kv_blocks_total: _Optional[_Iterable[int]] = ..., admission: _Optional[_Union[AdmissionStats, _Mapping]] = ..., late: _Optional[str] = ...) -> None: ...

class AdmissionStats(_message.Message):
    __slots__ = ("refused_queue_full", "refused_queue_wait", "refused_deadline", "estimated_wait_s", "seats", "decode_step_s", "max_step_s", "prompt_row_s")
    REFUSED_QUEUE_FULL_FIELD_NUMBER: _ClassVar[int]
    REFUSED_QUEUE_WAIT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEP_S_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ROW_S_FIELD_NUMBER: _ClassVar[int]
    refused_queue_full: int
    refused_queue_wait: int
    refused_deadline: int
    estimated_wait_s: float
    seats: int
    decode_step_s: float
    max_step_s: float
    prompt_row_s: float
    def __init__(self, refused_queue_full: _Optional[int] = ..., refused_queue_wait: _Optional[int] = ..., refused_deadline: _Optional[int] = ..., estimated_wait_s: _Optional[float] = ..., seats: _Optional[int] = ..., decode_step_s: _Optional[float] = ..., max_step_s: _Optional[float] = ..., prompt_row_s: _Optional[float] = ...) -> None: ...

class GatewayStats(_message.Message):
    __slots__ = ("name", "open_calls", "refused_calls", "tokenizing_bytes", "longest_stall_ms", "recent_stall_ms", "longest_own_stall_ms", "recent_own_stall_ms", "refusal_bounds_s", "refusal_counts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPEN_CALLS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_CALLS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZING_BYTES_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    RECENT_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_OWN_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    RECENT_OWN_STALL_MS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_BOUNDS_S_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_COUNTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    open_calls: int
    refused_calls: int
    tokenizing_bytes: int
    longest_stall_ms: float
    recent_stall_ms: float
    longest_own_stall_ms: float
    recent_own_stall_ms: float
    refusal_bounds_s: _containers.RepeatedScalarFieldContainer[float]
    refusal_counts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., open_calls: _Optional[int] = ..., refused_calls: _Optional[int] = ..., tokenizing_bytes: _Optional[int] = ..., longest_stall_ms: _Optional[float] = ..., recent_stall_ms: _Optional[float] = ..., longest_own_stall_ms: _Optional[float] = ..., recent_own_stall_ms: _Optional[float] = ..., refusal_bounds_s: _Optional[_Iterable[float]] = ..., refusal_counts: _Optional[_Iterable[int]] = ...) -> None: ...
