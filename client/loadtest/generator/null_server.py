"""A server that answers at once: what the load generator reaches against it is the generator's own ceiling.

    $ python -m tramontane.client.loadtest.generator.null_server
    ready 127.0.0.1:40031

Its streams keep the whole contract of `serving.proto`, so that the client does all its checking. Its model says the
alphabet, again and again, one letter a message; a letter's id is its code point. Messages are made once and sent as
bytes, so that nearly all of its time is gRPC's own.

It ends on SIGTERM, on SIGINT, and, where its stdin is a pipe, when that ends: so it never outlives its parent.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from typing import Any, TypeAlias

import click
import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2

from tramontane.client.channel import SERVICE
from tramontane.protos import serving_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[pb.GenerateRequest, bytes]"

MODEL = "null"
VERSION = "null-1"
CONTEXT_TOKENS = 1 << 20
DEFAULT_TOKENS = 256
LETTERS = 26
GRACE_S = 1.0
"""For streams that are under way at the end."""


class Deltas:
    """The message of each offset, as bytes, made when it is first needed."""

    def __init__(self) -> None:
        self._messages: list[bytes] = []

    def first(self, count: int) -> list[bytes]:
        """Those of a completion of `count` tokens."""
        for offset in range(len(self._messages), count):
            self._messages.append(_delta(offset))
        return self._messages[:count]


_DELTAS = Deltas()


async def generate_stream(request: pb.GenerateRequest, context: Context) -> None:
    """All tokens, one a message: the first says what was started too, the last how it finished.

    Serialised protobuf messages that stand one after the other are one message with the fields of both.
    """
    count = request.stopping.max_tokens if request.stopping.HasField("max_tokens") else DEFAULT_TOKENS
    if not 0 < count <= CONTEXT_TOKENS:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"max_tokens must lie in 1 .. {CONTEXT_TOKENS}; it is {count}"
        )
    prompt_tokens = len(request.tokens.ids) or 1 + len(request.text)
    messages = _DELTAS.first(count)
    messages[0] = _started(request, prompt_tokens) + messages[0]
    messages[-1] += _finished(prompt_tokens, count)
    for message in messages:
        await context.write(message)


async def tokenize(request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
    """Code points, after a BOS of id 1 where it is wanted."""
    bos = [1] if not request.HasField("add_bos") or request.add_bos else []
    return pb.TokenizeResponse(ids=[*bos, *map(ord, request.text)])


async def detokenize(request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
    """The characters of the code points."""
    return pb.DetokenizeResponse(text="".join(map(chr, request.ids)))


async def list_models(request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
    """The only one."""
    model = pb.ModelInfo(
        name=MODEL,
        architecture="NullForCausalLM",
        context_tokens=CONTEXT_TOKENS,
        dtype="float32",
        stages=0,
        version=VERSION,
        row_invariant=True,
        vocabulary_tokens=sys.maxunicode + 1,
        has_tokenizer=True,
        serving=True,
    )
    return pb.ListModelsResponse(models=[model])


async def get_stats(request: pb.GetStatsRequest, context: Any) -> pb.GetStatsResponse:
    """Nobody to tell of."""
    return pb.GetStatsResponse()


async def serve(port: int, ended: asyncio.Event) -> None:
    """Say where it listens, and serve until the event."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers([_serving(), _health(ended)])
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    click.echo(f"ready 127.0.0.1:{bound}")
    sys.stdout.flush()
    await ended.wait()
    await server.stop(GRACE_S)


def _serving() -> grpc.GenericRpcHandler[Any, Any]:
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            # No serialiser: it writes bytes.
            "GenerateStream": grpc.unary_stream_rpc_method_handler(
                generate_stream, request_deserializer=pb.GenerateRequest.FromString
            ),
            "Tokenize": _answer(tokenize, pb.TokenizeRequest),
            "Detokenize": _answer(detokenize, pb.DetokenizeRequest),
            "ListModels": _answer(list_models, pb.ListModelsRequest),
            "GetStats": _answer(get_stats, pb.GetStatsRequest),
        },
    )


def _health(ended: asyncio.Event) -> grpc.GenericRpcHandler[Any, Any]:
    """All is well, and those who watch are let go at the end, so that stopping waits for nobody."""
    well = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def check(request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        return well

    async def watch(request: health_pb2.HealthCheckRequest, context: Any) -> None:
        await context.write(well)
        await ended.wait()

    return grpc.method_handlers_generic_handler(
        health.SERVICE_NAME,
        {
            "Check": _answer(check, health_pb2.HealthCheckRequest),
            "Watch": grpc.unary_stream_rpc_method_handler(
                watch, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
            ),
        },
    )


def _answer(function: Any, request: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        function, request.FromString, lambda message: message.SerializeToString()
    )


def _delta(offset: int) -> bytes:
    token_id = ord("a") + offset % LETTERS
    delta = pb.Delta(text=chr(token_id), token_ids=[token_id], offset=offset, log_probabilities=[0.0])
    return pb.GenerateEvent(delta=delta).SerializeToString()


def _started(request: pb.GenerateRequest, prompt_tokens: int) -> bytes:
    started = pb.Started(
        request_id=request.request_id, seed=request.sampling.seed, version=VERSION, prompt_tokens=prompt_tokens
    )
    return pb.GenerateEvent(started=started).SerializeToString()


def _finished(prompt_tokens: int, count: int) -> bytes:
    usage = pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=count)
    finished = pb.Finished(reason=pb.LENGTH, usage=usage, timings=pb.Timings())
    return pb.GenerateEvent(finished=finished).SerializeToString()


async def _run(port: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    _watch_stdin(loop, ended)
    await serve(port, ended)


def _watch_stdin(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    """A terminal and /dev/null do not count: a server that a shell starts in the background must not end at once."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed from the beginning
        return
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):

        def read() -> None:
            if not os.read(0, 4096):
                loop.remove_reader(0)
                ended.set()

        loop.add_reader(0, read)


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="0 takes a free one.")
def main(port: int) -> None:
    """Serve nothing, as fast as it goes."""
    asyncio.run(_run(port))


if __name__ == "__main__":
    main()
