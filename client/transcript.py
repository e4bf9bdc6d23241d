"""What one stream has said so far: every event is checked, counted and kept. Pure: both kinds of streams share it."""

from __future__ import annotations

from tramontane.client.errors import ProtocolError
from tramontane.client.types import Completion, Delta, FinishReason, Timings, Usage
from tramontane.protos import serving_pb2

_REASONS = {
    serving_pb2.STOP_TOKEN: FinishReason.STOP_TOKEN,
    serving_pb2.STOP_STRING: FinishReason.STOP_STRING,
    serving_pb2.LENGTH: FinishReason.LENGTH,
}


class Transcript:
    """Takes the events of one request in order and gives its deltas, then its completion.

    A stream of three tokens, the last one a stop id:

        started + delta(offset 0, ids [7])  ->  Delta
        delta(offset 1, ids [8, 2])         ->  Delta
        finished(STOP_TOKEN, usage 3)       ->  None; now `completion` can be read
    """

    def __init__(self, request: serving_pb2.GenerateRequest) -> None:
        self.request_id = request.request_id
        self.seed = request.sampling.seed
        self.token_ids: list[int] = []
        self.log_probabilities: list[float] = []
        self._texts: list[str] = []
        self._started: serving_pb2.Started | None = None
        self._finished: serving_pb2.Finished | None = None

    @property
    def begun(self) -> bool:
        """An event has come."""
        return self._started is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def version(self) -> str:
        """Raises RuntimeError before the first event."""
        if self._started is None:
            raise RuntimeError("the version is known with the first delta, and none has been read yet")
        return self._started.version

    @property
    def ids_only(self) -> bool:
        """Raises RuntimeError before the first event."""
        if self._started is None:
            raise RuntimeError("whether there is text is known with the first delta, and none has been read yet")
        return self._started.ids_only

    @property
    def state(self) -> str:
        """How far the request is, for people."""
        if self._finished is not None:
            return f"{len(self.token_ids)} tokens, ended by {self.finish_reason}"
        return f"{len(self.token_ids)} tokens so far" if self.begun else "nothing yet"

    @property
    def completion(self) -> Completion:
        """Raises RuntimeError before the end."""
        finished = self._end("completion")
        return Completion(
            text=self.text,
            token_ids=tuple(self.token_ids),
            log_probabilities=tuple(self.log_probabilities),
            finish_reason=_REASONS[finished.reason],
            usage=self.usage,
            timings=self.timings,
            request_id=self.request_id,
            seed=self.seed,
            version=self.version,
        )

    @property
    def finish_reason(self) -> FinishReason:
        """Raises RuntimeError before the end."""
        return _REASONS[self._end("finish reason").reason]

    @property
    def usage(self) -> Usage:
        """Raises RuntimeError before the end."""
        usage = self._end("usage").usage
        return Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)

    @property
    def timings(self) -> Timings:
        """Raises RuntimeError before the end."""
        timings = self._end("timings").timings
        return Timings(queue_ms=timings.queue_ms, prefill_ms=timings.prefill_ms, decode_ms=timings.decode_ms)

    def feed(self, event: serving_pb2.GenerateEvent | None) -> Delta | None:
        """Take the next event; None where it brings neither ids nor text.

        grpc.aio gives None for a message that it cannot decode.

        Raises:
            ProtocolError: the event does not follow from the request and the events before it.
        """
        if event is None:
            raise self._broken("a message could not be decoded")
        if self._finished is not None:
            raise self._broken("an event came after the last one")
        if event.HasField("started"):
            self._start(event.started)
        elif self._started is None:
            raise self._broken("the first event did not say what was started")
        delta = self._extend(event.delta) if event.HasField("delta") else None
        if event.HasField("finished"):
            self._finish(event.finished)
        return delta

    def close(self) -> None:
        """The server ended the call with OK: raises ProtocolError if its last event is missing."""
        if self._finished is None:
            raise self._broken(f"the stream ended after {len(self.token_ids)} tokens without its last event")

    def _start(self, started: serving_pb2.Started) -> None:
        if self._started is not None:
            raise self._broken("the stream was started twice")
        if (started.request_id, started.seed) != (self.request_id, self.seed):
            raise self._broken(
                f"the answer is for request {started.request_id!r} with seed {started.seed}, "
                f"and seed {self.seed} was asked for"
            )
        self._started = started

    def _extend(self, delta: serving_pb2.Delta) -> Delta | None:
        # An event that brings text alone may leave the offset out.
        if delta.token_ids and delta.offset != len(self.token_ids):
            raise self._broken(f"tokens came with offset {delta.offset} after {len(self.token_ids)} tokens")
        if len(delta.log_probabilities) != len(delta.token_ids):
            raise self._broken(
                f"{len(delta.token_ids)} tokens came with {len(delta.log_probabilities)} log probabilities"
            )
        if not delta.token_ids and not delta.text:
            return None
        result = Delta(
            text=delta.text,
            token_ids=tuple(delta.token_ids),
            offset=len(self.token_ids),
            log_probabilities=tuple(delta.log_probabilities),
        )
        self.token_ids += result.token_ids
        self.log_probabilities += result.log_probabilities
        self._texts.append(result.text)
        return result

    def _finish(self, finished: serving_pb2.Finished) -> None:
        if finished.reason not in _REASONS:
            raise self._broken(f"the stream finished for no known reason ({finished.reason})")
        if finished.usage.completion_tokens != len(self.token_ids):
            raise self._broken(
                f"the server counts {finished.usage.completion_tokens} tokens, and {len(self.token_ids)} came"
            )
        self._finished = finished

    def _end(self, what: str) -> serving_pb2.Finished:
        if self._finished is None:
            raise RuntimeError(f"the {what} is known at the end of the stream, which has not been read yet")
        return self._finished

    def _broken(self, message: str) -> ProtocolError:
        return ProtocolError(message, request_id=self.request_id)


class TranscriptView:
    """What can be read from a stream beside its deltas.

    `request_id` and `seed` are known at once, `version` and `ids_only` with the first delta, the rest at the end;
    reading them earlier raises RuntimeError.
    """

    def __init__(self, transcript: Transcript) -> None:
        self._transcript = transcript

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of request {self.request_id}: {self._transcript.state}>"

    @property
    def request_id(self) -> str:
        """The request's name in the server's log."""
        return self._transcript.request_id

    @property
    def seed(self) -> int:
        """The seed in use."""
        return self._transcript.seed

    @property
    def version(self) -> str:
        """The version of model and numerics."""
        return self._transcript.version

    @property
    def ids_only(self) -> bool:
        """The model has no tokenizer: deltas carry ids, and never text."""
        return self._transcript.ids_only

    @property
    def finish_reason(self) -> FinishReason:
        """Why the completion ended."""
        return self._transcript.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens in and out."""
        return self._transcript.usage

    @property
    def timings(self) -> Timings:
        """Where the server's time went."""
        return self._transcript.timings

    @property
    def completion(self) -> Completion:
        """All deltas as one."""
        return self._transcript.completion
