"""The keyword arguments of `generate` and `stream`, and the request that they make. Pure: both clients share it."""

from __future__ import annotations

import difflib
import inspect
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, TypeVar

from tramontane.client import checked
from tramontane.protos import serving_pb2

_Method = TypeVar("_Method", bound=Callable[..., object])

Prompt: TypeAlias = str | Sequence[int]
"""Text, which the server tokenizes after a BOS; or token ids, which it takes as they are."""

SEED_BITS = 53
"""The length of seeds that the client chooses. Programs that read JSON numbers as doubles keep such seeds exactly."""


ARGUMENTS = """\
Keyword arguments; None is the server's default:
    max_tokens   Tokens to generate at most. 256, or what the context leaves if that is less.
    min_tokens   Until so many tokens nothing ends the completion. 0.
    temperature  0 takes the likeliest token each time. 1.
    top_k        Choose among the k likeliest tokens. 0, which is off.
    top_p        Choose among the likeliest tokens that reach this sum. 1, which is all.
    min_p        Drop tokens below this share of the likeliest. 0.
    seed         Equal seeds give equal tokens. The client chooses one; the result says which.
    stop         Text, or several, that ends the completion and is left out of it.
    stop_ids     Token ids that end the completion, besides the model's EOS.
    ignore_eos   Go on after EOS as after any other token.
    model        Which model. The only one that is served.
    request_id   Names the request in the server's log and in errors. The client chooses one.
"""
"""What `help` shows of `GenerateArguments`."""


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
    stop: str | Sequence[str] | None
    """Text, or several, that ends the completion and is left out of it. Default: none."""
    stop_ids: Sequence[int] | None
    """Token ids that end the completion, besides the model's EOS. Default: none."""
    ignore_eos: bool
    """Go on after EOS as after any other token. Default: False."""
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
    stop: str | Sequence[str] | None = None,
    stop_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    model: str | None = None,
    request_id: str | None = None,
) -> serving_pb2.GenerateRequest:
    """A request that always names its id and its seed.

    Only what cannot be put into the message is refused here; what makes sense is the server's to judge.

    Raises:
        TypeError: a value is of the wrong kind: the prompt is neither text nor whole numbers, say.
        ValueError: a number is negative or too large for its field, or a text cannot be encoded.
    """
    request = serving_pb2.GenerateRequest(
        request_id=checked.text("request_id", request_id if request_id is not None else new_request_id()),
        model=checked.model_name(model),
        sampling=serving_pb2.Sampling(
            temperature=checked.real("temperature", temperature),
            top_k=checked.unsigned("top_k", top_k),
            top_p=checked.real("top_p", top_p),
            min_p=checked.real("min_p", min_p),
            seed=checked.unsigned("seed", secrets.randbits(SEED_BITS) if seed is None else seed, bits=64),
        ),
        stopping=serving_pb2.Stopping(
            max_tokens=checked.unsigned("max_tokens", max_tokens),
            min_tokens=checked.unsigned("min_tokens", min_tokens),
            strings=checked.texts("stop", stop),
            token_ids=checked.token_ids("stop_ids", () if stop_ids is None else stop_ids),
            ignore_eos=checked.flag("ignore_eos", ignore_eos),
        ),
    )
    if isinstance(prompt, str):
        request.text = checked.text("prompt", prompt)
    else:
        # Chosen even when there are no ids, so that the server can say that the prompt is empty.
        request.tokens.CopyFrom(serving_pb2.TokenIds(ids=checked.token_ids("prompt", prompt)))
    return request


def generate_request_of(method: str, prompt: Prompt, arguments: Mapping[str, Any]) -> serving_pb2.GenerateRequest:
    """`generate_request` on behalf of a method, which the errors name.

    Raises:
        TypeError, ValueError: as `generate_request`; TypeError also for an argument that does not exist.
    """
    for name in arguments.keys() - GenerateArguments.__annotations__.keys():
        near = difflib.get_close_matches(name, GenerateArguments.__annotations__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")
    with checked.naming(method):
        return generate_request(prompt, **arguments)


def shows_generate_arguments(method: _Method) -> _Method:
    """Decorate a method so that `help` and editors show its `**arguments` one by one, with their defaults."""
    own = inspect.signature(method)
    named = [each for each in inspect.signature(generate_request).parameters.values() if each.kind is each.KEYWORD_ONLY]
    kept = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    method.__signature__ = own.replace(parameters=[*kept, *named])  # type: ignore[attr-defined]
    if method.__doc__ is not None:
        method.__doc__ = f"{inspect.cleandoc(method.__doc__)}\n\n{ARGUMENTS}"
    return method


def new_request_id() -> str:
    """A new name for a request, as the server's log and errors tell it."""
    return uuid.uuid4().hex
