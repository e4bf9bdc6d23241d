"""Between Python values and the messages of `serving.proto`. Pure: both clients share it, and nothing here waits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from tramontane.client import checked
from tramontane.client.types import (
    AdmissionStats,
    GatewayStats,
    HealthStatus,
    ModelInfo,
    ProcessStats,
    RouterStats,
    StageStats,
    Stats,
)
from tramontane.protos import serving_pb2


def tokenize_request(text: str, model: str | None, add_bos: bool) -> serving_pb2.TokenizeRequest:
    """Raises ValueError where the text cannot be encoded, TypeError where a value is of the wrong kind."""
    return serving_pb2.TokenizeRequest(
        model=checked.model_name(model), text=checked.text("text", text), add_bos=checked.flag("add_bos", add_bos)
    )


def detokenize_request(ids: Sequence[int], model: str | None, continuation: bool) -> serving_pb2.DetokenizeRequest:
    """Raises ValueError where an id is negative or beyond 32 bits, TypeError where a value is of the wrong kind."""
    return serving_pb2.DetokenizeRequest(
        model=checked.model_name(model),
        ids=checked.token_ids("ids", ids),
        continuation=checked.flag("continuation", continuation),
    )


def health_request(service: str) -> health_pb2.HealthCheckRequest:
    """Raises TypeError where the service's name is no text."""
    return health_pb2.HealthCheckRequest(service=checked.text("service", service))


def largest_field(request: Message) -> str:
    """Which field makes a request as large as it is, as a path."""

    def size(value: object) -> int:
        if isinstance(value, str):
            return len(value.encode())
        if isinstance(value, Message):
            return value.ByteSize()
        return len(value) if isinstance(value, Sized) else 0

    field, _ = max(request.ListFields(), key=lambda pair: size(pair[1]))
    return "tokens.ids" if field.name == "tokens" else field.name


def models(found: Iterable[serving_pb2.ModelInfo]) -> tuple[ModelInfo, ...]:
    """The models in the server's order."""
    return tuple(
        ModelInfo(
            name=info.name,
            architecture=info.architecture,
            context_tokens=info.context_tokens,
            checkpoint_context_tokens=info.checkpoint_context_tokens,
            context_lowered=info.context_lowered,
            window_tokens=info.window_tokens if info.HasField("window_tokens") else None,
            dtype=info.dtype,
            stages=info.stages,
            version=info.version,
            row_invariant=info.row_invariant,
            vocabulary_tokens=info.vocabulary_tokens,
            has_tokenizer=info.has_tokenizer,
            serving=info.serving,
            quantization=info.quantization,
            reason=info.reason,
        )
        for info in found
    )


def stats(response: serving_pb2.GetStatsResponse) -> Stats:
    """One reading of all counters."""
    return Stats(
        late=tuple(response.late),
        models=models(response.models),
        processes=tuple(
            ProcessStats(
                role=process.role,
                name=process.name,
                node=process.node,
                pid=process.pid,
                start_time_s=process.start_time_s,
                cpu_s=process.cpu_s,
            )
            for process in response.processes
        ),
        stages=tuple(
            StageStats(name=stage.name, busy_ns=stage.busy_ns, steps=stage.steps, tokens=stage.tokens)
            for stage in response.stages
        ),
        routers=tuple(
            RouterStats(
                name=router.name,
                microbatches=router.microbatches,
                tokens=router.tokens,
                prompt_tokens=router.prompt_tokens,
                completion_tokens=router.completion_tokens,
                preemptions=router.preemptions,
                waiting=router.waiting,
                running=router.running,
                in_flight_microbatches=router.in_flight_microbatches,
                kv_blocks_used=tuple(router.kv_blocks_used),
                kv_blocks_total=tuple(router.kv_blocks_total),
                admission=_admission(router.admission),
                late=router.late,
            )
            for router in response.routers
        ),
        gateways=tuple(
            GatewayStats(
                name=gateway.name,
                open_calls=gateway.open_calls,
                refused_calls=gateway.refused_calls,
                tokenizing_bytes=gateway.tokenizing_bytes,
                longest_stall_ms=gateway.longest_stall_ms,
                recent_stall_ms=gateway.recent_stall_ms,
                longest_own_stall_ms=gateway.longest_own_stall_ms,
                recent_own_stall_ms=gateway.recent_own_stall_ms,
                refusal_bounds_s=tuple(gateway.refusal_bounds_s),
                refusal_counts=tuple(gateway.refusal_counts),
            )
            for gateway in response.gateways
        ),
    )


def _admission(stats: serving_pb2.AdmissionStats) -> AdmissionStats:
    def measured(field: str) -> float | None:
        return getattr(stats, field) if stats.HasField(field) else None

    return AdmissionStats(
        refused_queue_full=stats.refused_queue_full,
        refused_queue_wait=stats.refused_queue_wait,
        refused_deadline=stats.refused_deadline,
        estimated_wait_s=measured("estimated_wait_s"),
        seats=stats.seats,
        decode_step_s=measured("decode_step_s"),
        max_step_s=measured("max_step_s"),
        prompt_row_s=measured("prompt_row_s"),
    )


_HEALTH = {
    health_pb2.HealthCheckResponse.SERVING: HealthStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: HealthStatus.NOT_SERVING,
}


def health_status(response: health_pb2.HealthCheckResponse) -> HealthStatus:
    """Any status but the two clear ones is UNKNOWN."""
    return _HEALTH.get(response.status, HealthStatus.UNKNOWN)
