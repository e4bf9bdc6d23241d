"""Any OpenAI-compatible server as a target: `/completions` (or `/chat/completions`), streamed as server-sent events.

Such a server says neither token ids nor how many tokens an event brings, so each event with content counts as one
message of one token, and the completion's length is what the server's usage says.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from tramontane.client.channel import is_local
from tramontane.client.loadtest.generator.target import Answer, Leave, OnTokens, TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import LEFT, OK, PROTOCOL
from tramontane.client.loadtest.result import TargetInfo
from tramontane.client.types import Stats

ERROR_LIMIT = 300
"""Bytes of a server's error that are read, and characters that are kept."""
LINE_LIMIT_BYTES = 2**20
"""Of one event."""


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
        self._session: aiohttp.ClientSession | None = None

    async def describe(self) -> TargetInfo:
        """The model that is asked for, or the first that the server lists."""
        try:
            async with self._open().get(f"{self._base}/models") as response:
                response.raise_for_status()
                names = [str(model["id"]) for model in (await response.json())["data"]]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ConnectionError(f"{self._base}/models: {error or type(error).__name__}") from None
        if not names or self._model not in (None, *names):
            raise ConnectionError(f"{self._base} serves {', '.join(names) or 'nothing'}, and model is {self._model!r}")
        self._model = self._model or names[0]
        return TargetInfo(kind="openai", address=self._base, model=self._model)

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
                    body = await response.content.read(ERROR_LIMIT)
                    return reading.answer(f"HTTP_{response.status}", body.decode(errors="replace"))
                async for event in _events(response):
                    if reading.take(event):
                        await on_tokens(1)
        except Leave:
            return reading.answer(LEFT)
        except TimeoutError:
            return reading.answer("DEADLINE_EXCEEDED", f"{self._options.timeout_s:g} s are over")
        except (aiohttp.ClientError, OSError) as error:
            return reading.answer("UNAVAILABLE", str(error) or type(error).__name__)
        except (ValueError, HttpProcessingError) as error:
            return reading.answer(PROTOCOL, str(error)[:ERROR_LIMIT])
        return reading.end()

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
            read_bufsize=LINE_LIMIT_BYTES,
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
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {"messages": [{"role": "user", "content": prompt}]} if self._options.chat else {"prompt": prompt}
        optional = {"top_k": ask.top_k, "top_p": ask.top_p, "stop": list(ask.stop), "ignore_eos": ask.ignore_eos}
        return body | {name: value for name, value in optional.items() if value}


class _Reading:
    """What the events of one stream have brought so far."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._reason = ""
        self._usage: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> bool:
        """True where the event brings content. Raises ValueError where it is none of a completion's."""
        if "error" in event:
            raise ValueError(f"the server ended the stream: {event['error']}")
        self._usage = event.get("usage") or self._usage
        content = ""
        for choice in event.get("choices") or ():
            content += choice.get("text") or _said(choice.get("delta") or {})
            self._reason = choice.get("finish_reason") or self._reason
        self._texts.append(content)
        return bool(content)

    def end(self) -> Answer:
        """The stream ended by itself."""
        if not self._reason:
            return self.answer(PROTOCOL, "the stream ended without a finish_reason")
        return self.answer(OK)

    def answer(self, status: str, error: str = "") -> Answer:
        """With what was read until then."""
        messages = sum(map(bool, self._texts))
        return Answer(
            status=status,
            error=error,
            prompt_tokens=_count(self._usage.get("prompt_tokens"), 0),
            completion_tokens=_count(self._usage.get("completion_tokens"), messages),
            finish_reason=str(self._reason),
            text="".join(self._texts),
        )


def _said(delta: dict[str, Any]) -> str:
    """A chat's words. What a model thinks before it answers was waited for just as well."""
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _count(told: object, otherwise: int) -> int:
    return told if isinstance(told, int) and told >= 0 else otherwise


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, to `[DONE]` or the end.

    Raises:
        ValueError: an event is longer than the limit, or no JSON object.
    """
    async for line in response.content:
        field, _, value = line.partition(b":")
        if field.strip() != b"data":
            continue  # blank lines part events; comments keep connections alive
        if value.strip() == b"[DONE]":
            return
        event = msgspec.json.decode(value)
        if not isinstance(event, dict):
            raise ValueError(f"an event is no JSON object: {value[:ERROR_LIMIT]!r}")
        yield event
