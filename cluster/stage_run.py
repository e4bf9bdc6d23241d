"""One binding of a stage at work: from its upstream's link, through the stage, to its downstream's.

    upstream link ── receive thread ──▶ arrived ── step loop ──▶ leaving ── send thread ──▶ downstream link
                     rows into the stage's inbox   (caller of `run`)                        watched for its end

The stage computes while the next microbatch arrives and a large one leaves, so a neighbour that computes never blocks
a send. What is small leaves from the step loop itself: waking a thread for it would take longer than sending it.
Whichever part fails ends the whole, once, and both links with it: the break goes on to both neighbours.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias

from tramontane.cluster.channel import Channel, ChannelClosed
from tramontane.cluster.link import Link
from tramontane.cluster.link_errors import LinkClosed
from tramontane.cluster.reasons import one_line
from tramontane.stages.microbatch import Microbatch, StepResult

log = logging.getLogger(__name__)

SMALL_BYTES = 64 << 10
"""Rows that a socket takes at once, together with the few others that may be in flight."""
CHANNEL_LIMIT = 64
"""Microbatches between two threads. The router's credits keep far fewer in flight, so nothing waits here."""


class Steps(Protocol):
    """What a run asks of its stage."""

    @property
    def is_first(self) -> bool:
        """No rows arrive with its microbatches."""

    def inbox(self, tokens: int) -> memoryview:
        """Room for the rows of so many tokens; steps take them in the order in which they were handed out."""

    def step(self, microbatch: Microbatch) -> memoryview | StepResult:
        """The rows for the next stage or, on the last one, the result."""


Leaving: TypeAlias = tuple[Microbatch, memoryview | StepResult]


class StageRun:
    """Streams through one stage at one epoch until something ends it."""

    def __init__(self, name: str, epoch: int, stage: Steps) -> None:
        self.epoch = epoch
        self._name = name
        self._stage = stage
        self._arrived: Channel[Microbatch] = Channel(CHANNEL_LIMIT)
        self._leaving: Channel[Leaving] = Channel(CHANNEL_LIMIT)
        self._changed = threading.Condition()
        self._upstream: Link | None = None
        self._downstream: Link | None = None
        self._reason: str | None = None
        self.stepped = 0
        """Steps that the stage is done with."""
        self._handed_over = 0
        """Outputs given to the send thread, counted by the step loop; ..."""
        self._sent = 0
        """... and those of them that have left, counted by the send thread."""

    def join_upstream(self, link: Link) -> bool:
        """Take the upstream's link; False where there is one already, or the run has ended."""
        with self._changed:
            if self._upstream is not None or self._reason is not None:
                return False
            self._upstream = link
            self._changed.notify_all()
            return True

    def run(self, dial: Callable[[], Link]) -> str:
        """Dial downstream, wait for upstream, stream until the end; the reason as one line. To be called once."""
        threads: list[threading.Thread] = []
        try:
            downstream = self._join_downstream(dial())
            threads.append(self._start(self._watch, downstream))
            upstream = self._wait_upstream()
            threads.append(self._start(self._receive, upstream))
            threads.append(self._start(self._send, downstream))
            while True:
                self._step(self._arrived.get(), downstream)
        except ChannelClosed:
            pass
        except LinkClosed as error:
            self.end(f"downstream: {error}")
        except Exception as error:  # a mistake of ours; it is the run's reason, as it would be in the other threads
            log.exception("%s failed at epoch %d", self._name, self.epoch)
            self.end(one_line(error))
        finally:
            self.end("the step loop was interrupted")
            for thread in threads:
                thread.join()
        assert self._reason is not None, "a run that has ended has a reason"
        return self._reason

    def end(self, reason: str) -> None:
        """End the run, from any thread; the first reason counts."""
        with self._changed:
            if self._reason is not None:
                return
            self._reason = reason
            self._changed.notify_all()
        log.info("%s ends at epoch %d: %s", self._name, self.epoch, reason)
        self._arrived.close()
        self._leaving.close()
        for link in (self._upstream, self._downstream):
            if link is not None:
                link.close(reason)

    def _join_downstream(self, link: Link) -> Link:
        with self._changed:
            self._downstream = link
            ended = self._reason
        if ended is not None:
            link.close(ended)
            raise ChannelClosed
        return link

    def _wait_upstream(self) -> Link:
        with self._changed:
            while self._upstream is None and self._reason is None:
                self._changed.wait()
            if self._upstream is None or self._reason is not None:
                raise ChannelClosed
            return self._upstream

    def _step(self, microbatch: Microbatch, downstream: Link) -> None:
        try:
            output = self._stage.step(microbatch)
        except Exception as error:
            log.exception("%s failed at epoch %d, step %d", self._name, microbatch.epoch, microbatch.step)
            self.end(f"step {microbatch.step}: {one_line(error)}")
            raise ChannelClosed from None
        self.stepped += 1
        small = isinstance(output, StepResult) or output.nbytes <= SMALL_BYTES
        if small and self._sent == self._handed_over:  # nobody else sends, and nothing is overtaken
            _send_output(downstream, microbatch, output)
        else:
            self._handed_over += 1
            self._leaving.put((microbatch, output))

    def _receive(self, upstream: Link) -> None:
        try:
            while True:
                message = upstream.receive(None if self._stage.is_first else self._inbox)
                if not isinstance(message, Microbatch):
                    raise LinkClosed(f"it sent {type(message).__name__}")
                if message.epoch == self.epoch:
                    self._arrived.put(message)
                else:
                    log.warning(
                        "%s drops step %d of epoch %d at epoch %d", self._name, message.step, message.epoch, self.epoch
                    )
        except LinkClosed as error:
            self.end(f"upstream: {error}")

    def _inbox(self, microbatch: Microbatch, size: int) -> memoryview:
        """The stage's own buffer; it must not see rows of a microbatch that is dropped."""
        if microbatch.epoch == self.epoch:
            return self._stage.inbox(len(microbatch.tokens))
        return memoryview(bytearray(size))

    def _send(self, downstream: Link) -> None:
        try:
            while True:
                _send_output(downstream, *self._leaving.get())
                self._sent += 1
        except LinkClosed as error:
            self.end(f"downstream: {error}")

    def _watch(self, downstream: Link) -> None:
        """Nothing comes back on this link but its end."""
        try:
            message = downstream.receive()
            self.end(f"downstream: it sent {type(message).__name__}")
        except LinkClosed as error:
            self.end(f"downstream: {error}")

    def _start(self, job: Callable[[Link], None], link: Link) -> threading.Thread:
        def guarded() -> None:
            try:
                job(link)
            except ChannelClosed:
                pass
            except Exception as error:  # a mistake of ours must not leave the other threads waiting
                log.exception("%s failed at epoch %d", self._name, self.epoch)
                self.end(one_line(error))

        thread = threading.Thread(target=guarded, name=f"{self._name} {job.__name__.strip('_')}", daemon=True)
        thread.start()
        return thread


def _send_output(downstream: Link, microbatch: Microbatch, output: memoryview | StepResult) -> None:
    """To the router a result, to the next stage the microbatch with its rows."""
    if isinstance(output, StepResult):
        downstream.send(output)
    else:
        downstream.send(microbatch, output)
