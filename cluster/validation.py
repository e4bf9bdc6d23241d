"""Wire messages into validated requests: every limit and its message in one place.

Inner code never checks again what has passed here. All refusals are `InvalidField`, and name field, limit and value;
they never quote a text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tramontane.cluster.log_lines import quoted
from tramontane.cluster.messages import Sampling, Stopping, Submit
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.steps import Steps
from tramontane.cluster.tokenizer import TooLong
from tramontane.protos import serving_pb2 as pb
from tramontane.stages.microbatch import Int32Array

DEFAULT_MAX_TOKENS = 256
MAX_TEMPERATURE = 100.0
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_IDS = 64
REQUEST_ID_KEY = "x-request-id"
"""The metadata that names a call whose request has no field for a name."""
REQUEST_ID = re.compile(r"[\x20-\x7e]{1,128}")
"""Printable ASCII."""


class InvalidField(ValueError):  # noqa: N818  (what it says, not what it is)
    """The user's mistake."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        """Its path in the wire message: `sampling.top_p`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A generation request with nothing left to check or to default."""

    request_id: str
    tokens: Int32Array
    """The prompt, BOS included. [1 .. context)"""
    sampling: Sampling
    stopping: Stopping
    stop_strings: tuple[str, ...]

    def submit(self, number: int, remaining_ms: float | None) -> Submit:
        """For a router, under the gateway's number; text stays here."""
        return Submit(
            request=number,
            request_id=quoted(self.request_id),
            tokens=self.tokens,
            sampling=self.sampling,
            stopping=self.stopping,
            remaining_ms=remaining_ms,
        )


def choose_request_id(message: pb.GenerateRequest) -> str:
    """The client's name for its request where it gave a fit one, else a new one."""
    if message.HasField("request_id") and REQUEST_ID.fullmatch(message.request_id):
        return message.request_id
    return secrets.token_hex(8)


def name_of_call(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The name of such a call (`REQUEST_ID_KEY`); None where the client gave none, or no valid one."""
    name = dict(metadata or ()).get(REQUEST_ID_KEY)
    return name if isinstance(name, str) and REQUEST_ID.fullmatch(name) else None


def validate_in_steps(message: pb.GenerateRequest, model: ServedModel, request_id: str) -> Steps[Request]:
    """Check everything, tokenize, fill in what is unset. The first step tokenizes nothing.

    Raises:
        InvalidField: the first mistake found.
    """
    if message.HasField("request_id") and message.request_id != request_id:
        length = len(message.request_id)
        raise InvalidField("request_id", f"must be 1 to 128 printable ASCII characters; it has {length} characters")
    sampling = _sampling(message.sampling, model.vocabulary.rows)
    stopping = message.stopping
    stop_strings = _stop_strings(stopping.strings, model)
    stop_ids = _stop_ids(stopping, model)
    if stopping.HasField("max_tokens") and stopping.max_tokens < 1:
        raise InvalidField("stopping.max_tokens", "must be at least 1; it is 0")
    tokens = yield from _prompt(message, model)
    max_tokens = _max_tokens(stopping, len(tokens), model.context)
    if stopping.min_tokens > max_tokens:
        raise InvalidField(
            "stopping.min_tokens", f"must be at most max_tokens, {max_tokens}; it is {stopping.min_tokens}"
        )
    return Request(
        request_id=request_id,
        tokens=tokens,
        sampling=sampling,
        stopping=Stopping(max_tokens=max_tokens, min_tokens=stopping.min_tokens, token_ids=stop_ids),
        stop_strings=stop_strings,
    )


def validate_ids(field: str, ids: Sequence[int], rows: int) -> Int32Array:
    """Token ids of a user, each below the model's `rows`. [N] -> [N]

    Raises:
        InvalidField: names the first id out of range and its place.
    """
    values = np.array(ids, np.int64)
    wrong = np.flatnonzero(values >= rows)  # unsigned on the wire
    if len(wrong):
        place = int(wrong[0])
        raise InvalidField(f"{field}[{place}]", f"must be below {rows}; it is {values[place]}")
    return values.astype(np.int32)


def _sampling(sampling: pb.Sampling, rows: int) -> Sampling:
    """The checked options, with defaults. Comparisons are written so that NaN fails them."""
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0.0 <= temperature <= MAX_TEMPERATURE:
        raise InvalidField("sampling.temperature", f"must be from 0 to {MAX_TEMPERATURE:g}; it is {temperature:.7g}")
    if not 0.0 < top_p <= 1.0:
        raise InvalidField("sampling.top_p", f"must be above 0 and at most 1; it is {top_p:.7g}")
    if not 0.0 <= sampling.min_p <= 1.0:
        raise InvalidField("sampling.min_p", f"must be from 0 to 1; it is {sampling.min_p:.7g}")
    return Sampling(
        temperature=temperature,
        top_k=min(sampling.top_k, rows),
        top_p=top_p,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
    )


def _stop_strings(strings: Sequence[str], model: ServedModel) -> tuple[str, ...]:
    field = "stopping.strings"
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidField(field, f"may hold {MAX_STOP_STRINGS} strings; it holds {len(strings)}")
    if strings and model.tokenizer is None:
        raise InvalidField(field, f"needs a tokenizer, and model {model.name!r} has none; use stopping.token_ids")
    for place, string in enumerate(strings):
        size = len(string.encode())
        if not 1 <= size <= MAX_STOP_STRING_BYTES:
            raise InvalidField(f"{field}[{place}]", f"must be 1 to {MAX_STOP_STRING_BYTES} bytes; it is {size}")
    return tuple(dict.fromkeys(strings))


def _stop_ids(stopping: pb.Stopping, model: ServedModel) -> tuple[int, ...]:
    """The ids that end the completion, ascending; EOS is among them unless the user ignores it."""
    field = "stopping.token_ids"
    if len(stopping.token_ids) > MAX_STOP_IDS:
        raise InvalidField(field, f"may hold {MAX_STOP_IDS} ids; it holds {len(stopping.token_ids)}")
    ids = validate_ids(field, stopping.token_ids, model.vocabulary.rows)
    eos_ids = () if stopping.ignore_eos else model.vocabulary.eos_ids
    return tuple(sorted({*ids.tolist(), *eos_ids}))


def _prompt(message: pb.GenerateRequest, model: ServedModel) -> Steps[Int32Array]:
    """The prompt's ids: tokenized with BOS before them, or as given."""
    kind = message.WhichOneof("prompt")
    if kind == "tokens":
        field = "tokens.ids"
        if not message.tokens.ids:
            raise InvalidField(field, "is empty; a prompt needs at least 1 token")
        if len(message.tokens.ids) >= model.context:
            raise _too_long(field, len(message.tokens.ids), model.context)
        return validate_ids(field, message.tokens.ids, model.vocabulary.rows)
    if kind != "text":
        raise InvalidField("prompt", "is missing: set text or tokens")
    if not message.text:
        raise InvalidField("text", "is empty; a prompt needs at least 1 character")
    if model.tokenizer is None:
        raise InvalidField("text", f"needs a tokenizer, and model {model.name!r} has none; send tokens")
    try:
        tokens = yield from model.tokenizer.encode_in_steps(message.text, add_bos=True, most=model.context - 1)
    except TooLong as error:
        raise _too_long("text", error.tokens, model.context) from None
    if not len(tokens):
        raise InvalidField("text", "has no token after normalisation; a prompt needs at least 1")
    return tokens


def _too_long(field: str, tokens: int | str, context: int) -> InvalidField:
    return InvalidField(
        field, f"may be {context - 1} tokens, so that the context of {context} leaves room for one; it is {tokens}"
    )


def _max_tokens(stopping: pb.Stopping, prompt: int, context: int) -> int:
    left = context - prompt
    if not stopping.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, left)
    if stopping.max_tokens > left:
        raise InvalidField(
            "stopping.max_tokens",
            f"may be {left}, what a prompt of {prompt} tokens leaves of the context of {context}; "
            f"it is {stopping.max_tokens}",
        )
    return stopping.max_tokens
