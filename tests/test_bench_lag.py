"""The instrument that watches the generator itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

from tramontane.client.loadtest.generator.lag import EVERY_S, LagSampler


async def sampled(during) -> list[float]:
    loop = asyncio.get_running_loop()
    with LagSampler(loop.time) as lag:
        await asyncio.sleep(3 * EVERY_S)
        during()
        await asyncio.sleep(3 * EVERY_S)
    return [late_s for _, late_s in lag.samples]


async def test_a_busy_loop_is_late():
    """It computes for 0.5 s: whoever knocks meanwhile waits for up to 0.5 s, evenly."""
    late_s = await sampled(lambda: time.sleep(0.5))
    assert max(late_s) > 0.4
    assert sum(each > 0.2 for each in late_s) >= 0.3 / EVERY_S * 0.8


def test_a_process_that_stood_still_was_late():
    """Stopped as a whole, with the thread that knocks: as a quota on CPU time does."""
    code = (
        "import asyncio\n"
        "from tramontane.client.loadtest.generator.lag import LagSampler\n"
        "async def main():\n"
        "    with LagSampler(asyncio.get_running_loop().time) as lag:\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.sleep(2)\n"
        "    print(sum(late_s > 0.2 for _, late_s in lag.samples), flush=True)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    # 20 knocks were due in the first 0.4 s of the stop.
    assert int(out) >= 0.8 * 0.4 / EVERY_S
