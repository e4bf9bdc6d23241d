"""Tramontane itself as a target, through the asyncio client that everyone uses.

Retries are off: a refused request is counted as refused, not sent again behind the measurement's back. So is waiting
for a server that does not serve.
"""

from __future__ import annotations

from tramontane.client.aio import AsyncClient
from tramontane.client.arguments import GenerateArguments
from tramontane.client.channel import ClientOptions, Tls
from tramontane.client.errors import InvalidArgument, ProtocolError, ResourceExhausted, StatusError
from tramontane.client.loadtest.generator.target import Answer, Leave, OnTokens, TargetOptions
from tramontane.client.loadtest.plan import Ask, Conduct
from tramontane.client.loadtest.record import LEFT, OK, PROTOCOL, ServerTimings
from tramontane.client.loadtest.result import TargetInfo
from tramontane.client.types import ModelInfo, Stats


class GrpcTarget:
    """A `Target` that speaks `tramontane.v1.Serving`."""

    def __init__(self, options: TargetOptions) -> None:
        self._address = options.address
        self._model = options.model
        self._timeout_s = options.timeout_s
        self._options = ClientOptions(
            retry_refused=False,  # a refusal is an answer, and is reported as such
            connections=options.connections,
            tls=_tls(options) if options.encrypts else None,
            token=options.read_token(),
            clear_token=options.clear_token,
            # Nothing is sent twice behind the measurement's back: no retry, no waiting.
            attempts=1,
            wait=False,
        )
        self._client = AsyncClient(self._address, self._options)

    async def describe(self) -> TargetInfo:
        """The model that is asked for, or the only one."""
        try:
            models = await self._client.models()
        except StatusError as error:
            raise self._no_service(error) from None
        info = self._choose(models)
        return TargetInfo(
            kind="grpc",
            address=self._address,
            model=info.name,
            version=info.version,
            dtype=info.dtype,
            stages=info.stages,
            context_tokens=info.context_tokens,
            vocabulary_tokens=info.vocabulary_tokens,
            has_tokenizer=info.has_tokenizer,
            row_invariant=info.row_invariant,
        )

    async def send(self, ask: Ask, on_tokens: OnTokens) -> Answer:
        """One stream, on a connection of its own where the ask's conduct says so."""
        if ask.conduct is not Conduct.CHURN:
            return await self._send(self._client, ask, on_tokens)
        async with AsyncClient(self._address, self._options) as client:
            return await self._send(client, ask, on_tokens)

    async def _send(self, client: AsyncClient, ask: Ask, on_tokens: OnTokens) -> Answer:
        token_ids: list[int] = []
        texts: list[str] = []

        def ended(status: str, error: str = "", **facts: object) -> Answer:
            return Answer(
                status=status,
                error=error,
                completion_tokens=len(token_ids),
                token_ids=tuple(token_ids),
                text="".join(texts),
                **facts,  # type: ignore[arg-type]
            )

        try:
            async with client.stream(ask.prompt, timeout_s=self._timeout_s, **self._arguments(ask)) as stream:
                async for delta in stream:
                    token_ids += delta.token_ids
                    texts.append(delta.text)
                    if delta.token_ids:
                        await on_tokens(len(delta.token_ids))
                timings = stream.timings
                return ended(
                    OK,
                    prompt_tokens=stream.usage.prompt_tokens,
                    finish_reason=stream.finish_reason.value,
                    server=ServerTimings(
                        queue_ms=timings.queue_ms, prefill_ms=timings.prefill_ms, decode_ms=timings.decode_ms
                    ),
                )
        except Leave:
            return ended(LEFT)
        except StatusError as error:
            return ended(error.code.name, error.message)
        except ProtocolError as error:
            return ended(PROTOCOL, error.message)

    async def count_tokens(self, text: str) -> int | None:
        """By the model's own tokenizer."""
        try:
            return len(await self._client.tokenize(text, model=self._model))
        except (InvalidArgument, ResourceExhausted):
            return None  # longer than the server reads
        except StatusError as error:
            raise self._no_service(error) from None

    async def detokenize(self, token_ids: tuple[int, ...]) -> str | None:
        """As the continuation of some text."""
        try:
            return await self._client.detokenize(token_ids, continuation=True, model=self._model)
        except StatusError:
            return None

    async def stats(self) -> Stats | None:
        """`GetStats`."""
        try:
            return await self._client.stats()
        except StatusError:
            return None

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._client.close()

    def _no_service(self, error: StatusError) -> ConnectionError:
        said = str(error)
        return ConnectionError(said if self._address in said else f"{self._address}: {said}")

    def _arguments(self, ask: Ask) -> GenerateArguments:
        return {
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_k": ask.top_k,
            "top_p": ask.top_p,
            "seed": ask.seed,
            "stop": ask.stop,
            "ignore_eos": ask.ignore_eos,
            "model": self._model,
        }

    def _choose(self, models: tuple[ModelInfo, ...]) -> ModelInfo:
        names = [info.name for info in models]
        if self._model is None and len(models) == 1:
            (info,) = models
        elif self._model in names:
            info = models[names.index(self._model)]
        else:
            raise ConnectionError(f"{self._address} serves {', '.join(names)}, and model is {self._model!r}")
        if not info.serving:
            raise ConnectionError(f"{self._address} does not serve {info.name} at the moment")
        return info


def _tls(options: TargetOptions) -> Tls:
    return Tls(ca=options.ca, cert=options.cert, key=options.key, server_name=options.server_name)
