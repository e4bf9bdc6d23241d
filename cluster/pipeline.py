"""A pipeline as the gateway sees it: requests go in, tokens come out.

`Pipeline` is the seam; `link_pipeline.py` has the real one.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from tramontane.cluster.messages import EndReason, Finished, Submit


class Receiver(Protocol):
    """Hears what a pipeline says of one request, on the event loop. It may cancel the request while it hears."""

    def put(self, offset: int, token: int, log_probability: float) -> None:
        """A token was sampled; offsets count up from 0 without gaps."""
        ...

    def end(self, finished: Finished) -> None:
        """Nothing follows."""
        ...


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

    def submit(self, request: Submit, receiver: Receiver) -> None:
        """Send a request down. A broken pipeline ends it at once, with reason BROKEN."""
        ...

    def cancel(self, request: int, *, completed: bool = False) -> None:
        """Free what a request holds; its receiver hears nothing more. Nothing happens where it has already ended.

        `completed` where its text has come to its end.
        """
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
