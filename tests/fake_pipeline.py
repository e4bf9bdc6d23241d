"""A pipeline whose tokens can be computed by hand, and a gateway around it, for tests of what talks to a gateway."""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from sentencepiece import SentencePieceTrainer

from tramontane.cluster.entrance import Entrance
from tramontane.cluster.gateway import Gateway
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import EndReason, Finished, Submit
from tramontane.cluster.named_ids import NamedIds
from tramontane.cluster.pipeline import Receiver, broken_end
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.stats import (
    AdmissionCounters,
    GatewayCounters,
    ProcessFacts,
    RouterCounters,
    ServiceStats,
    StageCounters,
)
from tramontane.cluster.tokenizer import Tokenizer
from tramontane.cluster.vocabulary import Vocabulary
from tramontane.stages.config import EXAMPLE

VOCAB = 400
CONTEXT = 4096
LOG_PROBABILITY = -0.5

CORPUS = """Shall I compare thee to a summer's day? Thou art more lovely and more temperate: rough winds do shake the
darling buds of May, and summer's lease hath all too short a date; sometime too hot the eye of heaven shines, and often
is his gold complexion dimm'd; and every fair from fair sometime declines, by chance or nature's changing course
untrimm'd; but thy eternal summer shall not fade, nor lose possession of that fair thou ow'st."""


def count_up(submit: Submit) -> Iterable[int]:
    """Each token is the one before plus one, from the prompt's last on, around the ids 300 .. 379."""
    token = int(submit.tokens[-1])
    while True:
        token = 300 + (token - 299) % 80
        yield token


@dataclass(eq=False)
class FakePipeline:
    """Answers each request from `reply`: a token a turn of the event loop while `running` is set.

    The reply ends at max_tokens (LENGTH), at a stop id (STOP_TOKEN), or when it is exhausted, with `end`.
    """

    reply: Callable[[Submit], Iterable[int]] = count_up
    end: EndReason = EndReason.BROKEN
    detail: str = ""
    pause_s: float = 0.0
    """Between two tokens of a request."""
    name: str = "fake"
    outstanding_tokens: int = 0
    submitted: list[Submit] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    produced: int = 0
    """Tokens over all requests."""
    retired: bool = False

    def __post_init__(self) -> None:
        self.broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running = asyncio.Event()
        self.running.set()
        self.open: dict[int, Receiver] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, request: Submit, receiver: Receiver) -> None:
        self.submitted.append(request)
        if self.broken.done():
            receiver.end(broken_end(request.request, self.broken.result()))
            return
        self.open[request.request] = receiver
        task = asyncio.get_running_loop().create_task(self._answer(request, receiver))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self, request: int, *, completed: bool = False) -> None:
        if self.open.pop(request, None) is not None:
            self.cancelled.append(request)

    def retire(self) -> None:
        self.retired = True

    def break_down(self, reason: str) -> None:
        """What a dead router looks like from here."""
        if self.broken.done():
            return
        self.broken.set_result(reason)
        for request, receiver in self.open.items():
            receiver.end(broken_end(request, reason))
        self.open.clear()

    async def close(self) -> None:
        self.break_down("closed")

    async def _answer(self, request: Submit, receiver: Receiver) -> None:
        reason, stop_ids = self.end, set(request.stopping.token_ids)
        for offset, token in enumerate(self.reply(request)):
            await self.running.wait()
            await asyncio.sleep(self.pause_s)
            if self.open.get(request.request) is not receiver:
                return  # cancelled
            receiver.put(offset, token, LOG_PROBABILITY)
            self.produced += 1
            if token in stop_ids or offset + 1 == request.stopping.max_tokens:
                reason = EndReason.STOP_TOKEN if token in stop_ids else EndReason.LENGTH
                break
        await self.running.wait()
        if self.open.pop(request.request, None) is receiver:
            detail = self.detail if reason is self.end else ""
            receiver.end(
                Finished(
                    request=request.request, reason=reason, detail=detail, queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0
                )
            )


@functools.cache
def tiny_tokenizer_bytes(**options: object) -> bytes:
    """A SentencePiece model of 380 pieces with byte fallback: `<unk>`, `<s>`, `</s>`, `[INST]`, 256 bytes, text."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=model,
        minloglevel=2,
        **{
            "vocab_size": 380,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 1.0,
            "control_symbols": ["[INST]"],
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            **options,
        },
    )
    return model.getvalue()


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer_bytes(), bos_id=1)


def vocabulary_of(tokenizer: Tokenizer | None, rows: int = VOCAB, **named: object) -> Vocabulary:
    """As of a folder with this tokenizer whose other files say `named`."""
    return Vocabulary.of(rows, tokenizer, NamedIds(**named))


@functools.cache
def tiny_vocabulary() -> Vocabulary:
    return vocabulary_of(tiny_tokenizer())


def tiny_model(*, context: int = CONTEXT, tokenizer: Tokenizer | None = None) -> ServedModel:
    """Called "tiny"; ids 0 .. 399, EOS 2."""
    return ServedModel(
        name="tiny",
        config=replace(EXAMPLE, vocab=VOCAB, context=context),
        context=context,
        dtype="float32",
        stages=2,
        version="v-tiny",
        row_invariant=True,
        vocabulary=tiny_vocabulary() if tokenizer else vocabulary_of(None, eos_ids={"config.json": (2,)}),
        tokenizer=tokenizer,
    )


async def fake_stats() -> ServiceStats:
    return ServiceStats(
        late=("router-0 has not answered for 6 s",),
        processes=(ProcessFacts(role="gateway", name="0", node="n", pid=7, start_time_s=1.5, cpu_s=0.25),),
        stages=(StageCounters(name="0.1", busy_ns=5, steps=3, tokens=9),),
        routers=(
            RouterCounters(
                name="0",
                microbatches=1,
                tokens=2,
                prompt_tokens=3,
                completion_tokens=4,
                preemptions=5,
                waiting=6,
                running=7,
                in_flight_microbatches=8,
                kv_blocks_used=(1, 2),
                kv_blocks_total=(10, 20),
                admission=AdmissionCounters(
                    refused_queue_full=1,
                    refused_queue_wait=2,
                    refused_deadline=3,
                    estimated_wait_s=0.5,
                    seats=4,
                    decode_step_s=0.25,
                    max_step_s=0.375,
                    prompt_row_s=None,
                ),
                late="",
            ),
        ),
        gateways=(
            GatewayCounters(
                name="0",
                open_calls=1,
                refused_calls=2,
                tokenizing_bytes=3,
                longest_stall_ms=4.0,
                recent_stall_ms=5.0,
                longest_own_stall_ms=6.0,
                recent_own_stall_ms=7.0,
            ),
        ),
    )


def routes_to(*pipelines: FakePipeline) -> list[tuple[str, FakePipeline]]:
    """A table of routers for a gateway with `dial_fake`: each pipeline is its own address."""
    return [(pipeline.name, pipeline) for pipeline in pipelines]


async def dial_fake(name: str, address: FakePipeline) -> FakePipeline:
    if address.broken.done():
        raise LinkClosed(address.broken.result())
    return address


@asynccontextmanager
async def serving(
    *pipelines: FakePipeline, model: ServedModel | None = None, entrance: Entrance | None = None
) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway that serves "tiny" (with its tokenizer) from these pipelines, and the address where it listens."""
    model = model or tiny_model(tokenizer=tiny_tokenizer())
    gateway = Gateway("gateway-0", model.name, context=model.context, fetch_stats=fake_stats, dial=dial_fake)
    port = await gateway.start(entrance or Entrance())
    try:
        gateway.set_model(model)
        await gateway.set_routes(1, routes_to(*(pipelines or [FakePipeline()])))
        yield gateway, f"127.0.0.1:{port}"
    finally:
        await gateway.close(0.0)
