"""A gRPC server that can be computed by hand, and that counts what reaches it.

Its model counts: the completion of a prompt that ends with id n is n + 1, n + 2, ... An id is a Unicode code point, BOS
is id 1, and every log probability is -offset. So `generate("ab", max_tokens=3)` gives "cde".
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from tramontane.protos import serving_pb2, serving_pb2_grpc

BOS = 1
VERSION = "counting-1"
SERVICE = "tramontane.v1.Serving"

Events = Iterator[serving_pb2.GenerateEvent]
Plan = Callable[[serving_pb2.GenerateRequest, grpc.ServicerContext], Events]


@dataclass
class Seen:
    """One call, as the server saw it."""

    method: str
    peer: str
    """`ipv4:127.0.0.1:PORT`, another one for every connection."""
    metadata: dict[str, str]
    remaining_s: float | None
    request: Message
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the call is over on the server, in whichever way."""


def started(request: serving_pb2.GenerateRequest) -> serving_pb2.Started:
    return serving_pb2.Started(
        request_id=request.request_id,
        seed=request.sampling.seed,
        version=VERSION,
        prompt_tokens=len(prompt_ids(request)),
    )


def prompt_ids(request: serving_pb2.GenerateRequest) -> list[int]:
    if request.WhichOneof("prompt") == "tokens":
        return list(request.tokens.ids)
    return [BOS, *map(ord, request.text)]


def delta(offset: int, *ids: int) -> serving_pb2.Delta:
    return serving_pb2.Delta(
        text="".join(map(chr, ids)),
        token_ids=ids,
        offset=offset,
        log_probabilities=[-float(offset + index) for index in range(len(ids))],
    )


def finished(prompt_tokens: int, completion_tokens: int, reason=serving_pb2.LENGTH) -> serving_pb2.Finished:
    return serving_pb2.Finished(
        reason=reason,
        usage=serving_pb2.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens),
        timings=serving_pb2.Timings(queue_ms=1.5, prefill_ms=20.0, decode_ms=300.0),
    )


def count_up(request: serving_pb2.GenerateRequest, context: grpc.ServicerContext) -> Events:
    """The honest answer: one token a message, `started` with the first, `finished` alone."""
    ids = prompt_ids(request)
    count = request.stopping.max_tokens if request.stopping.HasField("max_tokens") else 256
    for offset in range(count):
        event = serving_pb2.GenerateEvent(delta=delta(offset, ids[-1] + 1 + offset))
        if offset == 0:
            event.started.CopyFrom(started(request))
        yield event
    yield serving_pb2.GenerateEvent(finished=finished(len(ids), count))


def events(*makers: Callable[[serving_pb2.GenerateRequest], serving_pb2.GenerateEvent]) -> Plan:
    """Exactly these messages, then OK."""

    def plan(request, context):
        for maker in makers:
            yield maker(request)

    return plan


def refuse(code: grpc.StatusCode, message: str, *details: Message, pushback_ms: int | None = None) -> Plan:
    """End with a status before any message."""

    def plan(request, context):
        packed = []
        for detail in details:
            packed.append(Any())
            packed[-1].Pack(detail)
        status = rpc_status.to_status(Status(code=code.value[0], message=message, details=packed))
        metadata = status.trailing_metadata if details else ()
        if pushback_ms is not None:
            metadata = (*metadata, ("grpc-retry-pushback-ms", str(pushback_ms)))
        context.set_trailing_metadata(metadata)
        context.abort(code, message)
        yield

    return plan


def hold(after: int = 0) -> Plan:
    """So many tokens, then nothing more until the call is over."""

    def plan(request, context):
        over = threading.Event()
        if not context.add_callback(over.set):
            return
        for offset in range(after):
            event = serving_pb2.GenerateEvent(delta=delta(offset, ord("a") + offset))
            if offset == 0:
                event.started.CopyFrom(started(request))
            yield event
        over.wait(60)

    return plan


class FakeServer(serving_pb2_grpc.ServingServicer):
    """Answers each generating call by the next of `plans`, and by `count_up` when there are none."""

    def __init__(self, options=(), credentials: grpc.ServerCredentials | None = None, port: int = 0) -> None:
        self.seen: list[Seen] = []
        self.plans: deque[Plan] = deque()
        self._pool = ThreadPoolExecutor(32)
        # Each watching connection holds a thread: the servicer that holds none can deadlock when a watcher leaves while
        # a status is set.
        self.health = health.HealthServicer(experimental_non_blocking=False)
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0), *options])
        serving_pb2_grpc.add_ServingServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        address = f"127.0.0.1:{port}"
        bound = (
            self._server.add_secure_port(address, credentials)
            if credentials
            else self._server.add_insecure_port(address)
        )
        self.target = f"127.0.0.1:{bound}"
        self.set_serving(True)

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    def set_serving(self, serving: bool, reason: str = "loading, 43 %") -> None:
        self.reason = "" if serving else reason
        response = health_pb2.HealthCheckResponse
        for service in ("", SERVICE, f"{SERVICE}/counting"):
            self.health.set(service, response.SERVING if serving else response.NOT_SERVING)

    @property
    def generated(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "GenerateStream"]

    @contextlib.contextmanager
    def _record(self, method: str, request: Message, context: grpc.ServicerContext) -> Iterator[None]:
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        seen = Seen(method, context.peer(), metadata, context.time_remaining(), request)
        self.seen.append(seen)
        try:
            yield
        finally:
            seen.ended.set()

    def GenerateStream(self, request, context):  # noqa: N802
        with self._record("GenerateStream", request, context):
            plan = self.plans.popleft() if self.plans else count_up
            yield from plan(request, context)

    def Tokenize(self, request, context):  # noqa: N802
        with self._record("Tokenize", request, context):
            bos = [BOS] if not request.HasField("add_bos") or request.add_bos else []
            return serving_pb2.TokenizeResponse(ids=[*bos, *map(ord, request.text)])

    def Detokenize(self, request, context):  # noqa: N802
        with self._record("Detokenize", request, context):
            text = "".join(map(chr, request.ids))
            return serving_pb2.DetokenizeResponse(text=text if request.continuation else text.removeprefix(" "))

    def ListModels(self, request, context):  # noqa: N802
        with self._record("ListModels", request, context):
            info = serving_pb2.ModelInfo(
                name="counting",
                architecture="CountingForCausalLM",
                context_tokens=4096,
                checkpoint_context_tokens=4096,
                window_tokens=128,
                dtype="float32",
                stages=2,
                version=VERSION,
                row_invariant=True,
                vocabulary_tokens=0x110000,
                has_tokenizer=True,
                serving=not self.reason,
                reason=self.reason,
                quantization="int8",
            )
            full = serving_pb2.ModelInfo(
                name="full",
                architecture="CountingForCausalLM",
                context_tokens=64,
                checkpoint_context_tokens=128,
                context_lowered="128 do not fit",
            )
            return serving_pb2.ListModelsResponse(models=[info, full])

    def GetStats(self, request, context):  # noqa: N802
        with self._record("GetStats", request, context):
            return serving_pb2.GetStatsResponse(
                processes=[
                    serving_pb2.ProcessStats(role="stage", name="0.1", node="n", pid=7, start_time_s=1, cpu_s=2)
                ],
                stages=[serving_pb2.StageStats(name="0.1", busy_ns=5, steps=6, tokens=7)],
                routers=[serving_pb2.RouterStats(name="0", waiting=1, kv_blocks_used=[3], kv_blocks_total=[9])],
                gateways=[serving_pb2.GatewayStats(name="0", open_calls=2, recent_own_stall_ms=1.5)],
            )
