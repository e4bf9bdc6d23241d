"""A pipeline as the gateway sees it: requests go in, tokens come out.

`Pipeline` is the seam; `link_pipeline.py` has the real one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from tramontane.cluster.messages import EndReason, Finished, Submit


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What has come for one request since the last time somebody looked. N tokens, N may be 0 at the end."""

    offset: int
    """Place of the first token in the completion."""
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    arrived_s: tuple[float, ...]
    """When each token came, by the event loop's clock."""
    finished: Finished | None
    """The router's last word, after these tokens."""


class Arrivals:
    """The mailbox of one request: whatever its reader was too slow for is one batch, not a queue of messages.

    It holds at most the request's max_tokens tokens.
    """

    def __init__(self) -> None:
        self._offset = 0
        self._tokens: list[int] = []
        self._log_probabilities: list[float] = []
        self._arrived_s: list[float] = []
        self._finished: Finished | None = None
        self._news = asyncio.Event()

    def put(self, offset: int, token: int, log_probability: float) -> None:
        """The pipeline has sampled a token."""
        expected = self._offset + len(self._tokens)
        assert offset == expected, f"token at offset {offset}, expected {expected}"
        assert self._finished is None, f"token at offset {offset} after the end"
        self._tokens.append(token)
        self._log_probabilities.append(log_probability)
        self._arrived_s.append(asyncio.get_running_loop().time())
        self._news.set()

    def end(self, finished: Finished) -> None:
        """Nothing follows. Only the first end counts."""
        if self._finished is None:
            self._finished = finished
            self._news.set()

    async def take(self) -> Batch:
        """Wait until something has come, and take all of it."""
        await self._news.wait()
        self._news.clear()
        batch = Batch(
            offset=self._offset,
            tokens=tuple(self._tokens),
            log_probabilities=tuple(self._log_probabilities),
            arrived_s=tuple(self._arrived_s),
            finished=self._finished,
        )
        self._offset += len(self._tokens)
        for column in (self._tokens, self._log_probabilities, self._arrived_s):
            column.clear()
        return batch


class Pipeline(Protocol):
    """One router and its stages. All methods return at once and raise nothing; they belong to the event loop."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    @property
    def outstanding_tokens(self) -> int:
        """Tokens still to be computed for all its requests, as far as is known here."""
        ...

    @property
    def broken(self) -> asyncio.Future[str]:
        """Done, with the reason in one line, once the pipeline can serve no more; its requests have ended then."""
        ...

    def submit(self, request: Submit) -> Arrivals:
        """Send a request down. On a broken pipeline the arrivals are a `Finished` of reason BROKEN."""
        ...

    def cancel(self, request: int) -> None:
        """Free what a request holds; its arrivals get nothing more. Nothing happens where it has already ended."""
        ...

    def retire(self) -> None:
        """Take no new requests; close once the last one has ended."""
        ...

    async def close(self) -> None:
        """Close now; requests that are still open end as broken."""
        ...


def broken_end(request: int, detail: str) -> Finished:
    """The end of a request whose pipeline is gone."""
    return Finished(
        request=request, reason=EndReason.BROKEN, detail=detail, queue_ms=0.0, prefill_ms=0.0, decode_ms=0.0
    )
