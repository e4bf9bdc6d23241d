"""Ends the service on the Ray that this process has joined."""

from __future__ import annotations

import time
from typing import Any

from tramontane.cluster.events import Events

STOP_TIMEOUT_S = 30.0


def end_service(controller: Any, identity: str | None, events: Events, what: str = "") -> bool:
    """End the service of this identity. Returns False where the controller or a part was hung and had to be killed.

    The controller ends last: as long as its name is taken, nobody can start another service on this Ray.
    """
    import ray

    from tramontane.cluster import ray_platform

    events.tell("ending", f"ending {what}".rstrip())
    started, whole = time.monotonic(), True
    try:
        ray.get(controller.stop.remote(), timeout=STOP_TIMEOUT_S)
    except Exception as error:
        events.tell("warning", f"the controller did not end by itself: {type(error).__name__}")
        whole = False
        if identity is not None:
            ray_platform.end_parts(identity)
    ray.kill(controller)
    seconds = round(time.monotonic() - started, 1)
    events.tell("ended", f"ended in {seconds:.1f} s", seconds=seconds)
    return whole
