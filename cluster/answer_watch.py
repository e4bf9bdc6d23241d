"""Whether a part answers at all: one that is stopped closes nothing, and Ray never tells of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tramontane.cluster.reasons import one_line

log = logging.getLogger(__name__)

ASK_EVERY_S, ANSWER_TIMEOUT_S = 1.0, 2.0
LATE_AFTER_S = 5.0
STOPPED_S = 3 * (ASK_EVERY_S + ANSWER_TIMEOUT_S)
"""A look that comes so long after the one before shows that the watcher itself was stopped."""


async def watch_answers(ask: Callable[[], Awaitable[object]], on_silence: Callable[[float], Awaitable[bool]]) -> None:
    """Ask a part again and again. `on_silence` hears for how long it has not answered, 0 once it does.

    A question that fails counts as one without an answer, since Ray's own trouble may pass. (A part that is gone is
    noticed elsewhere.) Ends when `on_silence` returns False.
    """
    loop = asyncio.get_running_loop()
    answered_s = looked_s = loop.time()
    while True:
        try:
            await asyncio.wait_for(ask(), ANSWER_TIMEOUT_S)
            answered_s = loop.time()
        except Exception as error:
            log.debug("no answer: %s", one_line(error))
        now = loop.time()
        if now - looked_s > STOPPED_S:
            answered_s = now
        looked_s = now
        silent_s = now - answered_s
        if not await on_silence(silent_s if silent_s > LATE_AFTER_S else 0.0):
            return
        await asyncio.sleep(ASK_EVERY_S)
