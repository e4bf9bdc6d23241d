"""One completion, from its pipeline's tokens to the events that its client hears."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tramontane.cluster.errors import RETRY_AFTER_S, CallError
from tramontane.cluster.messages import EndReason, Finished
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.text import CompletionText
from tramontane.cluster.validation import Request
from tramontane.protos import serving_pb2 as pb

JITTER = 4 / 3
FINISH_REASONS = {EndReason.STOP_TOKEN: pb.STOP_TOKEN, EndReason.LENGTH: pb.LENGTH}
FAILURES = {
    EndReason.REFUSED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EndReason.IMPOSSIBLE: grpc.StatusCode.INVALID_ARGUMENT,
    EndReason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    EndReason.BROKEN: grpc.StatusCode.UNAVAILABLE,
    EndReason.NOT_FINITE: grpc.StatusCode.INTERNAL,
}
FAILURE_SENTENCES = {
    EndReason.REFUSED: "too many requests wait",
    EndReason.IMPOSSIBLE: "the request could not run even alone",
    EndReason.DEADLINE: "the deadline passed",
    EndReason.BROKEN: "the pipeline broke",
    EndReason.NOT_FINITE: "the model's logits for this request held NaN or infinity",
}


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When a request came to the gateway and when it went on to its pipeline."""

    now: Callable[[], float]
    """In seconds."""
    arrived_s: float
    submitted_s: float


class Completion:
    """Hears tokens from a pipeline (it is its `Receiver`), and makes events of them.

    Tokens are looked at as they come, so that a stop string is found however slow the client reads; what came since
    the last event was taken is one event, so that a slow reader never makes a queue. `stop` is called when a stop
    string is complete: what the pipeline still does for the request is in vain.
    """

    def __init__(self, request: Request, model: ServedModel, clock: Clock, stop: Callable[[], None]) -> None:
        self._request = request
        self._model = model
        self._clock = clock
        self._stop = stop
        self._text = CompletionText(
            model.vocabulary,
            stop_strings=request.stop_strings,
            stop_ids=request.stopping.token_ids,
            min_tokens=request.stopping.min_tokens,
        )
        self._news = asyncio.Event()
        self._pieces: list[str] = []
        self._ids: list[int] = []
        self._log_probabilities: list[float] = []
        self._taken = 0
        self._first_s = self._last_s = clock.submitted_s
        self._finished: Finished | None = None
        self._leaving = False

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt."""
        return len(self._request.tokens)

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._text.tokens

    @property
    def reason(self) -> pb.FinishReason | None:
        """How it has ended, if it has ended well."""
        if self._text.stopped:
            return pb.STOP_STRING
        return None if self._finished is None else FINISH_REASONS.get(self._finished.reason)

    @property
    def over(self) -> bool:
        """The last event has been taken."""
        return self.reason is not None and not self._news.is_set()

    def put(self, offset: int, token: int, log_probability: float) -> None:
        """See `Receiver`."""
        assert offset == self.tokens, f"token at offset {offset}, expected {self.tokens}"
        assert self._finished is None, f"token at offset {offset} after the end"
        assert not self._text.stopped, f"token at offset {offset} after a stop string"
        self._last_s = self._clock.now()
        if offset == 0:
            self._first_s = self._last_s
        self._pieces.append(self._text.push(token))
        self._ids.append(token)
        self._log_probabilities.append(log_probability)
        self._news.set()
        if self._text.stopped:
            self._stop()

    def end(self, finished: Finished) -> None:
        """See `Receiver`. After a stop string nothing can go wrong any more."""
        if self._finished is None and not self._text.stopped:
            self._finished = finished
            self._news.set()

    def leave(self, finished: Finished) -> None:
        """As `end`, where the gateway is what ends: the request may be tried at another, if nothing was said yet."""
        self._leaving = True
        self.end(finished)

    async def wait(self) -> None:
        """Wait until there is something to take."""
        await self._news.wait()

    def take(self) -> pb.GenerateEvent:
        """All that has come since the last time, as one event: the first has `started`, the last `finished`.

        Raises:
            CallError: the pipeline could not finish the request; what came before has been taken.
        """
        if self._finished is None or self.reason is not None:
            self._news.clear()
        elif not self._ids:
            raise _failure(self._finished, retry=self._leaving or self._finished.reason is not EndReason.BROKEN)
        event = pb.GenerateEvent()
        if self._taken == 0:
            event.started.request_id = self._request.request_id
            event.started.seed = self._request.sampling.seed
            event.started.version = self._model.version
            event.started.prompt_tokens = self.prompt_tokens
            event.started.ids_only = self._model.tokenizer is None
        if self.reason is not None:
            self._pieces.append(self._text.finish())
            event.finished.reason = self.reason
            event.finished.usage.prompt_tokens = self.prompt_tokens
            event.finished.usage.completion_tokens = self.tokens
            event.finished.timings.CopyFrom(self.timings)
        if self._ids or any(self._pieces):
            event.delta.text = "".join(self._pieces)
            event.delta.token_ids.extend(self._ids)
            event.delta.offset = self._taken
            event.delta.log_probabilities.extend(self._log_probabilities)
        self._taken += len(self._ids)
        self._pieces.clear()
        self._ids.clear()
        self._log_probabilities.clear()
        return event

    @property
    def timings(self) -> pb.Timings:
        """The router's clock where it has ended the request; else the gateway's, which cannot tell queue from prefill.

        The time before the request was submitted is added to the queue's in both cases.
        """
        clock, finished = self._clock, self._finished
        own_ms = (clock.submitted_s - clock.arrived_s) * 1e3
        if finished is not None:
            return pb.Timings(
                queue_ms=own_ms + finished.queue_ms, prefill_ms=finished.prefill_ms, decode_ms=finished.decode_ms
            )
        return pb.Timings(
            queue_ms=own_ms,
            prefill_ms=(self._first_s - clock.submitted_s) * 1e3,
            decode_ms=(self._last_s - self._first_s) * 1e3,
        )


def _failure(finished: Finished, *, retry: bool) -> CallError:
    return CallError(
        FAILURES[finished.reason],
        finished.detail or FAILURE_SENTENCES[finished.reason],
        retry_after_s=_retry_after_s(finished) if finished.reason is EndReason.REFUSED else None,
        retry=retry,
    )


def _retry_after_s(finished: Finished) -> float:
    """What the router says, or a second, drawn out by up to a third so that those refused together come back apart."""
    retry_after_s = RETRY_AFTER_S if finished.retry_after_ms is None else finished.retry_after_ms / 1e3
    return retry_after_s * random.uniform(1.0, JITTER)  # noqa: S311  (no secret)
