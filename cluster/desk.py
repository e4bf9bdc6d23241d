"""The router's side towards gateways: each request's ticket, its clocks, and the messages about it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from tramontane.cluster.admission import RefusalReason, Refused
from tramontane.cluster.async_link import AsyncLink
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.messages import Cancel, EndReason, Finished, Load, Submit, Tokens
from tramontane.cluster.scheduler import Emitted, Scheduler
from tramontane.cluster.sequence import Sequence
from tramontane.stages.microbatch import Microbatch

log = logging.getLogger(__name__)

LOAD_PERIOD_S = 0.05
OUTBOX_LIMIT = 4096
"""Messages that a gateway may be behind, one a step or a request's end; a gateway further behind is cut off."""


@dataclass(eq=False)
class Peer:
    """A linked gateway."""

    name: str
    link: AsyncLink
    outbox: asyncio.Queue[Tokens | Finished | Load | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX_LIMIT))
    tickets: dict[int, Ticket] = field(default_factory=dict)
    """By the gateway's request number."""

    def post(self, message: Tokens | Finished | Load | None) -> None:
        """Never waits: a gateway that does not read is cut off, and its requests end. After None the link is closed."""
        try:
            self.outbox.put_nowait(message)
        except asyncio.QueueFull:
            log.error("%s is %d messages behind; its link is closed", self.name, OUTBOX_LIMIT)
            self.link.close()


@dataclass(eq=False)
class Ticket:
    """A request at this router. Times are the event loop's, in seconds."""

    peer: Peer
    number: int
    request_id: str
    sequence: int
    arrived: float
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    timer: asyncio.TimerHandle | None = None

    def finished(self, reason: EndReason, detail: str, now: float, retry_after_s: float | None) -> Finished:
        """The last message about it."""
        started = now if self.started is None else self.started
        first = now if self.first_token is None else self.first_token
        last = first if self.last_token is None else self.last_token
        return Finished(
            request=self.number,
            reason=reason,
            detail=detail,
            queue_ms=(started - self.arrived) * 1e3,
            prefill_ms=(first - started) * 1e3,
            decode_ms=(last - first) * 1e3,
            retry_after_ms=None if retry_after_s is None else retry_after_s * 1e3,
        )


class Desk:
    """Turns gateways' messages into sequences, and the scheduler's results into messages."""

    def __init__(self, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._wake = wake
        self._peers: set[Peer] = set()
        self._tickets: dict[int, Ticket] = {}
        self._next_sequence = 0
        self.refused = dict.fromkeys(RefusalReason, 0)
        """Requests that were not taken, since the start."""
        self._broken: str | None = None

    async def serve(self, link: AsyncLink, name: str) -> None:
        """Serve one gateway until its link closes; its requests are freed then."""
        peer = Peer(name=name, link=link)
        self._peers.add(peer)
        writer = asyncio.get_running_loop().create_task(self._write(peer))
        try:
            while True:
                message = await link.receive()
                match message:
                    case Submit():
                        self._submit(peer, message)
                    case Cancel():
                        self._cancel(peer, message.request, completed=message.completed)
                    case _:
                        log.error("%s sent %s; its link is closed", name, type(message).__name__)
                        return
        except LinkClosed as error:
            log.info("%s left: %s", name, error)
        finally:
            self._peers.discard(peer)
            for number in list(peer.tickets):
                self._cancel(peer, number)
            writer.cancel()
            link.close()

    def mark_started(self, microbatch: Microbatch) -> None:
        """The pipeline now works for these sequences."""
        now = _now()
        for sequence in microbatch.sequence.tolist():
            ticket = self._tickets.get(sequence)
            if ticket is not None and ticket.started is None:
                ticket.started = now

    def deliver(self, emitted: Iterable[Emitted]) -> None:
        """Send the tokens of one step, one message a gateway, then the ends."""
        now = _now()
        batches: dict[Peer, list[tuple[int, Emitted]]] = {}
        ends: list[tuple[Ticket, EndReason]] = []
        for item in emitted:
            ticket = self._tickets[item.sequence]
            if item.token is not None:
                ticket.first_token = now if ticket.first_token is None else ticket.first_token
                ticket.last_token = now
                batches.setdefault(ticket.peer, []).append((ticket.number, item))
            if item.end is not None:
                ends.append((ticket, item.end))
        for peer, rows in batches.items():
            peer.post(_tokens(rows))
        for ticket, reason in ends:
            self._end(ticket, reason, "")

    def turn_away(self) -> None:
        """End those that waited and can no longer end in time."""
        for sequence, refusal in self._scheduler.turned_away():
            self._refuse(self._tickets[sequence], refusal)

    def break_all(self, reason: str) -> None:
        """The pipeline is gone: every request ends, and so will all that come."""
        self._broken = reason
        for ticket in list(self._tickets.values()):
            self._scheduler.cancel(ticket.sequence)
            self._end(ticket, EndReason.BROKEN, reason)
        for peer in self._peers:
            peer.post(None)  # a gateway learns from its closed link that this pipeline serves no more

    async def report_load(self) -> None:
        """Tell every gateway how busy the router is, when that has changed."""
        told: dict[Peer, int] = {}
        while True:
            outstanding = self._scheduler.outstanding_tokens
            told = {peer: told.get(peer, -1) for peer in self._peers}
            for peer, last in told.items():
                if last != outstanding:
                    peer.post(Load(outstanding_tokens=outstanding))
                    told[peer] = outstanding
            await asyncio.sleep(LOAD_PERIOD_S)

    def _submit(self, peer: Peer, submit: Submit) -> None:
        ticket = Ticket(
            peer=peer,
            number=submit.request,
            request_id=submit.request_id,
            sequence=self._next_sequence,
            arrived=_now(),
        )
        self._next_sequence += 1
        self._tickets[ticket.sequence] = peer.tickets[ticket.number] = ticket
        if self._broken is not None:
            self._end(ticket, EndReason.BROKEN, self._broken)
            return
        try:
            self._scheduler.add(Sequence.from_submit(ticket.sequence, submit, ticket.arrived), ticket.arrived)
        except Refused as refusal:
            self._refuse(ticket, refusal)
            return
        except ValueError as error:
            self._end(ticket, EndReason.IMPOSSIBLE, str(error))
            return
        if submit.remaining_ms is not None:
            delay_s = max(submit.remaining_ms, 0.0) / 1e3
            ticket.timer = asyncio.get_running_loop().call_later(delay_s, self._expire, ticket)
        log.info("request %s: accepted, %d prompt tokens", ticket.request_id, len(submit.tokens))
        self._wake()

    def _cancel(self, peer: Peer, number: int, *, completed: bool = False) -> None:
        ticket = peer.tickets.get(number)
        if ticket is not None:  # it may have ended while the Cancel was on its way
            self._scheduler.cancel(ticket.sequence, completed=completed)
            self._forget(ticket)
            log.info("request %s: cancelled", ticket.request_id)
            self._wake()

    def _expire(self, ticket: Ticket) -> None:
        self._scheduler.cancel(ticket.sequence)
        self._end(ticket, EndReason.DEADLINE, "")
        self._wake()

    def _refuse(self, ticket: Ticket, refusal: Refused) -> None:
        self.refused[refusal.reason] += 1
        self._end(ticket, EndReason.REFUSED, str(refusal), refusal.retry_after_s)

    def _end(self, ticket: Ticket, reason: EndReason, detail: str, retry_after_s: float | None = None) -> None:
        self._forget(ticket)
        ticket.peer.post(ticket.finished(reason, detail, _now(), retry_after_s))
        # Of a crowd that is refused, the gateways' lines are enough.
        level = logging.DEBUG if reason is EndReason.REFUSED else logging.INFO
        log.log(level, "request %s: %s %s", ticket.request_id, reason, detail)

    def _forget(self, ticket: Ticket) -> None:
        del self._tickets[ticket.sequence]
        del ticket.peer.tickets[ticket.number]
        if ticket.timer is not None:
            ticket.timer.cancel()

    async def _write(self, peer: Peer) -> None:
        try:
            while (message := await peer.outbox.get()) is not None:
                await peer.link.send(message)
            peer.link.close("the pipeline is broken")
        except LinkClosed:
            pass  # the reading side notices too, and frees what there is
        except Exception:  # a mistake of ours: the gateway's requests must not wait for messages that never come
            log.exception("cannot write to %s", peer.name)
            peer.link.close("cannot be written to")


def _tokens(rows: list[tuple[int, Emitted]]) -> Tokens:
    return Tokens(
        request=np.array([number for number, _ in rows], np.int64),
        offset=np.array([item.offset for _, item in rows], np.int32),
        token=np.array([item.token for _, item in rows], np.int32),
        log_probability=np.array([item.log_probability for _, item in rows], np.float32),
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
