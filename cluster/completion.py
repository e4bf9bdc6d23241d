"""One completion, from its pipeline's batches of tokens to the events that its client hears. Decides only."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from tramontane.cluster.errors import RETRY_AFTER_S, CallError
from tramontane.cluster.messages import EndReason
from tramontane.cluster.pipeline import Batch
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.text import CompletionText
from tramontane.cluster.validation import Request
from tramontane.protos import serving_pb2 as pb

FINISH_REASONS = {EndReason.STOP_TOKEN: pb.STOP_TOKEN, EndReason.LENGTH: pb.LENGTH}
FAILURES = {
    EndReason.REFUSED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EndReason.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    EndReason.BROKEN: grpc.StatusCode.UNAVAILABLE,
    EndReason.NOT_FINITE: grpc.StatusCode.INTERNAL,
}
FAILURE_SENTENCES = {
    EndReason.REFUSED: "the waiting queue is full",
    EndReason.DEADLINE: "the deadline passed",
    EndReason.BROKEN: "the pipeline broke",
    EndReason.NOT_FINITE: "the model's logits for this request held NaN or infinity",
}


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When a request came to the gateway and when it went on to its pipeline, in seconds of the event loop."""

    arrived_s: float
    submitted_s: float


class Completion:
    """Turns batches into events: the first says what was chosen for the request, the last how it ended."""

    def __init__(self, request: Request, model: ServedModel, clock: Clock) -> None:
        self._request = request
        self._version = model.version
        self._clock = clock
        self._text = CompletionText(
            model.tokenizer,
            stop_strings=request.stop_strings,
            stop_ids=request.stop_ids.tolist(),
            min_tokens=request.min_tokens,
        )
        self._first_s: float | None = None
        self.reason: pb.FinishReason | None = None
        """How it ended, once it has."""

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return self._text.tokens

    def advance(self, batch: Batch) -> pb.GenerateEvent:
        """The event that tells of this batch. What comes after the token that completes a stop string is dropped.

        Raises:
            CallError: the pipeline could not finish the request.
        """
        assert self.reason is None, f"a batch at offset {batch.offset} after the end"
        assert batch.offset == self.tokens, f"a batch at offset {batch.offset}, expected {self.tokens}"
        event, text = self._start(batch), []
        for token in batch.tokens:
            text.append(self._text.push(token))
            if self._text.stopped:
                break
        else:
            if batch.finished is not None and batch.finished.reason in FAILURES:
                raise _failure(batch.finished.reason, batch.finished.detail)
        count = self.tokens - batch.offset
        if self._text.stopped or batch.finished is not None:
            text.append(self._text.finish())
            self._finish(event, batch, count)
        if count or any(text):
            event.delta.text = "".join(text)
            event.delta.token_ids.extend(batch.tokens[:count])
            event.delta.offset = batch.offset
            event.delta.log_probabilities.extend(batch.log_probabilities[:count])
        return event

    def _start(self, batch: Batch) -> pb.GenerateEvent:
        if batch.offset or not batch.tokens:
            return pb.GenerateEvent()
        self._first_s = batch.arrived_s[0]
        started = pb.Started(
            request_id=self._request.request_id,
            seed=self._request.seed,
            version=self._version,
            prompt_tokens=len(self._request.tokens),
        )
        return pb.GenerateEvent(started=started)

    def _finish(self, event: pb.GenerateEvent, batch: Batch, count: int) -> None:
        if self._text.stopped:
            self.reason = pb.STOP_STRING
        else:
            assert batch.finished is not None, "an end without a reason"
            self.reason = FINISH_REASONS[batch.finished.reason]
        event.finished.reason = self.reason
        event.finished.usage.prompt_tokens = len(self._request.tokens)
        event.finished.usage.completion_tokens = self.tokens
        event.finished.timings.CopyFrom(self._timings(batch, count))

    def _timings(self, batch: Batch, count: int) -> pb.Timings:
        """The router's clock where it has ended the request; else the gateway's, which cannot tell queue from prefill.

        The time before the request was submitted is added to the queue's in both cases.
        """
        clock, finished = self._clock, batch.finished
        own_ms = (clock.submitted_s - clock.arrived_s) * 1e3
        if finished is not None and not self._text.stopped:
            return pb.Timings(
                queue_ms=own_ms + finished.queue_ms, prefill_ms=finished.prefill_ms, decode_ms=finished.decode_ms
            )
        assert self._first_s is not None, "a stop string before the first token"
        return pb.Timings(
            queue_ms=own_ms,
            prefill_ms=(self._first_s - clock.submitted_s) * 1e3,
            decode_ms=(batch.arrived_s[count - 1] - self._first_s) * 1e3,
        )


def _failure(reason: EndReason, detail: str) -> CallError:
    return CallError(
        FAILURES[reason],
        detail or FAILURE_SENTENCES[reason],
        retry_after_s=RETRY_AFTER_S if reason is EndReason.REFUSED else None,
    )
