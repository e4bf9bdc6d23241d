"""Any OpenAI-compatible server as a target: `/completions` (or `/chat/completions`), streamed as server-sent events.

Such a server says neither token ids nor how many tokens an event brings, so each event with content counts as one
message of one token, and the completion's length is what the server's usage says.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from tramontane.client.loadtest.generator.chunks import ERROR_LIMIT, Chunk, Refusal, error_message, read_chunk
from tramontane.client.loadtest.generator.server_sent_events import EVENT_LIMIT_BYTES, EventReader
from tramontane.client.loadtest.generator.target import OPTIONAL, Answer, Leave, OnTokens, TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import INCOMPLETE, LEFT, OK, UNREADABLE
from tramontane.client.loadtest.result import TargetInfo
from tramontane.client.target import is_local
from tramontane.client.types import Stats

_TAKEN_BY = {
    "vllm": OPTIONAL,
    "sglang": OPTIONAL,
    "llamacpp": OPTIONAL,
    "tramontane": OPTIONAL,
    "library": ("seed", "stream_options"),  # Ollama
    "openai": ("seed", "stream_options"),
    "openai-internal": ("seed", "stream_options"),
    "system": ("seed", "stream_options"),  # OpenAI's newer models
}
"""The optional fields that a server takes, by what its `/models` says in `owned_by`. Others may answer 422 to them."""
_NO_LIST = (404, 405, 501)
"""How servers without `/models` answer to it."""


class OpenAITarget:
    """A `Target` that speaks the HTTP API of OpenAI's completions."""

    def __init__(self, options: TargetOptions) -> None:
        self._base = options.address.rstrip("/")
        self._options = options
        token = options.read_token()
        url = urlsplit(self._base)
        if url.username or url.password:
            raise ValueError(
                "the target's address holds a user or password, which reports would show; use --token-file"
            )
        if options.encrypts and url.scheme == "http":
            raise ValueError(f"target is {options.address}, which is not encrypted; use https")
        if options.server_name:
            raise ValueError(f"server_name is {options.server_name!r}; over HTTP the name is the target's own")
        if token and url.scheme == "http" and not options.clear_token and not is_local(url.netloc):
            raise ValueError(f"the key would travel to {url.netloc} in clear; use https, or --clear-token")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._model = options.model
        self._sent: set[str] = set(options.send)
        self._session: aiohttp.ClientSession | None = None

    async def describe(self) -> TargetInfo:
        """The model that is asked for, or the first that the server lists. One without a list serves what is asked."""
        owners = await self._list_models()
        if not owners and self._model is not None:
            owners = {self._model: ""}
        if not owners or self._model not in (None, *owners):
            raise ConnectionError(f"{self._base} serves {', '.join(owners) or 'nothing'}, and model is {self._model!r}")
        self._model = self._model or next(iter(owners))
        self._sent = {*_TAKEN_BY.get(owners[self._model], ()), *self._options.send}
        unsent = tuple(name for name in OPTIONAL if name not in self._sent)
        return TargetInfo(kind="openai", address=self._base, model=self._model, unsent=unsent)

    async def _list_models(self) -> dict[str, str]:
        """Their names, each with its `owned_by`; empty where the server has no list."""
        try:
            async with self._open().get(f"{self._base}/models") as response:
                if response.status in _NO_LIST:
                    return {}
                response.raise_for_status()
                models = (await response.json(content_type=None))["data"]
                return {str(model["id"]): str(model.get("owned_by")) for model in models}
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConnectionError(f"{self._base}/models: {error or type(error).__name__}") from None

    async def send(self, ask: Ask, on_tokens: OnTokens) -> Answer:
        """One streamed completion, on a connection of its own where the ask's conduct says so."""
        if ask.conduct is not Conduct.CHURN:
            return await self._send(self._open(), ask, on_tokens)
        async with self._new_session(connections=1) as session:
            return await self._send(session, ask, on_tokens)

    async def _send(self, session: aiohttp.ClientSession, ask: Ask, on_tokens: OnTokens) -> Answer:
        reading = _Reading()
        path = "chat/completions" if self._options.chat else "completions"
        try:
            async with session.post(f"{self._base}/{path}", json=self._body(ask)) as response:
                if response.status != 200:
                    return reading.answer(f"HTTP_{response.status}", error_message(await _whole(response)))
                async for chunk in _chunks(response):
                    if reading.take(chunk):
                        await on_tokens(1)
        except Leave:
            return reading.answer(LEFT)
        except Refusal as refusal:
            return reading.answer(refusal.status, str(refusal))
        except TimeoutError:
            return reading.answer("DEADLINE_EXCEEDED", f"{self._options.timeout_s:g} s are over")
        except (aiohttp.ClientError, OSError) as error:
            return reading.answer("UNAVAILABLE", str(error) or type(error).__name__)
        except (ValueError, HttpProcessingError) as error:
            return reading.answer(UNREADABLE, str(error)[:ERROR_LIMIT])
        return reading.end()

    async def count_tokens(self, text: str) -> int | None:
        """It cannot say."""
        return None

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | None:
        """It cannot say."""
        return None

    async def stats(self) -> Stats | None:
        """It has none in our terms."""
        return None

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = self._new_session(connections=0)  # 0: as many as there are requests
        return self._session

    def _new_session(self, connections: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=connections, ssl=self._tls()),
            timeout=aiohttp.ClientTimeout(total=self._options.timeout_s),
        )

    def _tls(self) -> ssl.SSLContext | bool:
        """How https is checked; True is aiohttp's own way."""
        options = self._options
        if not (options.ca or options.cert):
            return True
        context = ssl.create_default_context(cafile=options.ca)
        if options.cert:
            context.load_cert_chain(options.cert, options.key)
        return context

    def _body(self, ask: Ask) -> dict[str, object]:
        prompt = ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)
        body: dict[str, object] = {
            "model": self._model,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "stream": True,
        }
        body |= {"messages": [{"role": "user", "content": prompt}]} if self._options.chat else {"prompt": prompt}
        if "seed" in self._sent:
            body["seed"] = ask.seed
        if "stream_options" in self._sent:
            body["stream_options"] = {"include_usage": True}
        if "ignore_eos" in self._sent and ask.ignore_eos:
            body["ignore_eos"] = True
        chosen = {"top_k": ask.top_k, "top_p": ask.top_p, "stop": list(ask.stop)}
        return body | {name: value for name, value in chosen.items() if value}


class _Reading:
    """What the chunks of one stream have brought so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._reason = ""
        self._usage: Mapping[str, Any] = {}
        self._done = False

    def take(self, chunk: Chunk | None) -> bool:
        """True where the chunk brings content; None is the word that there will be no more."""
        if chunk is None:
            self._done = True
            return False
        self._usage = chunk.usage or self._usage
        self._reason = chunk.finish_reason or self._reason
        if chunk.content:
            self._texts.append(chunk.content)
        return bool(chunk.content)

    def end(self) -> Answer:
        """The stream ended by itself."""
        if not (self._reason or self._done):
            return self.answer(INCOMPLETE, "the stream ended with neither a finish_reason nor [DONE]")
        return self.answer(OK)

    def answer(self, status: str, error: str = "") -> Answer:
        """With what was read until then."""
        return Answer(
            status=status,
            error=error,
            prompt_tokens=_count(self._usage.get("prompt_tokens")),
            completion_tokens=_count(self._usage.get("completion_tokens")),
            finish_reason=self._reason,
            text="".join(self._texts),
        )


def _count(told: object) -> int:
    return told if isinstance(told, int) and told >= 0 else 0


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[Chunk | None]:
    """What the server sends, to its end or `[DONE]`, for which None stands. A server that does not stream sends one.

    Raises:
        Refusal: the server says that the request failed.
        ValueError: something cannot be decoded.
    """
    if response.content_type == "application/json":
        yield read_chunk(await _whole(response))
        return
    reader = EventReader()
    async for piece in response.content.iter_any():
        for event, data in reader.feed(piece):
            if data.strip() == b"[DONE]":
                yield None
                return
            if data.strip():  # a relay's keep-alive may be empty
                yield read_chunk(data, event)
    for event, data in reader.end():
        if data.strip() == b"[DONE]":
            yield None
        with contextlib.suppress(ValueError):  # it was cut short
            yield read_chunk(data, event)


async def _whole(response: aiohttp.ClientResponse) -> bytes:
    """The body, as far as anybody would read it."""
    body = b""
    while len(body) < EVENT_LIMIT_BYTES and (piece := await response.content.read(EVENT_LIMIT_BYTES - len(body))):
        body += piece
    return body
