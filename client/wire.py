"""Between Python values and the messages of `serving.proto`. Pure: both clients share it, and nothing here waits."""

from __future__ import annotations

import operator
import secrets
import uuid
from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypedDict

from grpc_health.v1 import health_pb2

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

Prompt: TypeAlias = str | Sequence[int]
"""Text, which the server tokenizes after a BOS; or token ids, which it takes as they are."""

SEED_BITS = 53
"""Of seeds that the client chooses: programs that read JSON numbers as doubles keep them exactly."""


class GenerateArguments(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`. None, or left out, is the server's default."""

    max_tokens: int | None
    """Tokens to generate at most. Default: 256, or what the context leaves if that is less."""
    min_tokens: int | None
    """Until so many tokens are generated nothing ends the completion. Default: 0."""
    temperature: float | None
    """Default: 1. 0 is greedy and ignores the filters."""
    top_k: int | None
    """Keep the k most likely tokens. Default: 0, off."""
    top_p: float | None
    """Keep the most likely tokens whose probabilities reach this sum, in (0, 1]. Default: 1, all."""
    min_p: float | None
    """Drop tokens less likely than this share of the most likely one, in [0, 1]. Default: 0."""
    seed: int | None
    """Equal seeds give equal tokens. Default: the client chooses one; the result says which."""
    stop: str | Sequence[str]
    """Text, or several, that ends the completion and is left out of it."""
    stop_ids: Sequence[int]
    """Token ids that end the completion, besides the model's EOS."""
    ignore_eos: bool
    """Go on after EOS as after any other token."""
    model: str | None
    """Which model. Default: the only one that is served."""
    request_id: str | None
    """Names the request in the server's log and in errors. Default: the client chooses one."""


def generate_request(
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    model: str | None = None,
    request_id: str | None = None,
) -> serving_pb2.GenerateRequest:
    """A request that always names its id and its seed.

    Only what cannot be put into the message is refused here; what makes sense is the server's to judge.

    Raises:
        TypeError: the prompt is neither text nor whole numbers.
        ValueError: a number is negative or too large for its field, or a text cannot be encoded.
    """
    request = serving_pb2.GenerateRequest(
        request_id=_text("request_id", request_id if request_id is not None else uuid.uuid4().hex),
        model=None if model is None else _text("model", model),
        sampling=serving_pb2.Sampling(
            temperature=temperature,
            top_k=_unsigned("top_k", top_k),
            top_p=top_p,
            min_p=min_p,
            seed=_unsigned("seed", secrets.randbits(SEED_BITS) if seed is None else seed, bits=64),
        ),
        stopping=serving_pb2.Stopping(
            max_tokens=_unsigned("max_tokens", max_tokens),
            min_tokens=_unsigned("min_tokens", min_tokens),
            strings=[_text("stop", string) for string in ([stop] if isinstance(stop, str) else stop)],
            token_ids=_ids("stop_ids", stop_ids),
            ignore_eos=ignore_eos,
        ),
    )
    if isinstance(prompt, str):
        request.text = _text("prompt", prompt)
    else:
        # Chosen even when there are no ids, so that the server can say that the prompt is empty.
        request.tokens.CopyFrom(serving_pb2.TokenIds(ids=_ids("prompt", prompt)))
    return request


def tokenize_request(text: str, model: str | None, add_bos: bool) -> serving_pb2.TokenizeRequest:
    """Raises ValueError where the text cannot be encoded."""
    return serving_pb2.TokenizeRequest(model=model, text=_text("text", text), add_bos=add_bos)


def detokenize_request(ids: Sequence[int], model: str | None, continuation: bool) -> serving_pb2.DetokenizeRequest:
    """Raises ValueError where an id is negative or beyond 32 bits, TypeError where one is no whole number."""
    return serving_pb2.DetokenizeRequest(model=model, ids=_ids("ids", ids), continuation=continuation)


def models(response: serving_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
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
        )
        for info in response.models
    )


def stats(response: serving_pb2.GetStatsResponse) -> Stats:
    """One reading of all counters."""
    return Stats(
        late=tuple(response.late),
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


def _unsigned(field: str, value: int | None, *, bits: int = 32) -> int | None:
    if value is None:
        return None
    number = operator.index(value)
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{field} is {number}; it must lie in 0 .. 2^{bits} - 1")
    return number


def _ids(field: str, ids: Iterable[int]) -> list[int]:
    if isinstance(ids, str | bytes | bytearray):
        raise TypeError(f"{field} is {type(ids).__name__}; token ids are a sequence of whole numbers")
    numbers = [operator.index(token_id) for token_id in ids]
    for number in numbers:
        if not 0 <= number < 1 << 32:
            raise ValueError(f"{field} holds {number}; a token id lies in 0 .. 2^32 - 1")
    return numbers


def _text(field: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character, place = text[error.start], error.start
        raise ValueError(f"{field} holds the lone surrogate U+{ord(character):04X} at character {place}") from None
    return text
