"""Follows a service through its controller: how it comes up, and until when it can serve."""

from __future__ import annotations

import math
import threading
from typing import Any, cast

from tramontane.cluster.address import host_port
from tramontane.cluster.controller import ServicePhase, Status
from tramontane.cluster.events import Events
from tramontane.cluster.polling import Poll
from tramontane.cluster.ray_watch import RayWatch
from tramontane.cluster.reasons import one_line
from tramontane.cluster.service_records import RecordFile
from tramontane.cluster.spec import ServiceSpec

POLL_S = 0.2
HOLD_POLL_S = 1.0
ANSWER_TIMEOUT_S = 10.0
SILENCE_S = 60.0
"""A controller that has said nothing for so long is worth a warning. The pipeline serves on without it."""


class ServiceGone(ConnectionError):  # noqa: N818  (an event as much as an error)
    """The service was ended by somebody else."""


class ControllerGone(ConnectionError):  # noqa: N818
    """The controller cannot live; the reason as one line."""


def follow(
    controller: Any,
    spec: ServiceSpec,
    events: Events,
    ending: threading.Event,
    watch: RayWatch,
    record: RecordFile,
    *,
    owns_ray: bool,
) -> bool:
    """Show how the service comes up. True once it is ready, False when it cannot be or the user ended it.

    The port goes into `record` once it is open. Raises as `_status` and `watch.check` do.
    """
    said, listening, kernels = "", False, ""
    with Poll(lambda: _status(controller, spec), POLL_S) as statuses:
        while not ending.wait(POLL_S):
            watch.check()
            status = statuses.latest()
            if status is None:
                continue
            if status.port and not listening:
                target = host_port(spec.entrance.host, status.port)
                events.tell("listening", f"listening on {target}, not serving yet", target=target)
                record.add(target=target)
                listening = True
            if status.kernels and not kernels:
                kernels = status.kernels
                for warning in status.warnings:
                    events.tell("warning", warning)
                events.tell("kernels", f"kernels: {kernels}", kernels=kernels)
            event, line, facts = news(status, spec)
            if line and line != said:
                events.tell(event, line, **facts)
                said = line
            if status.phase is ServicePhase.READY:
                return True
            if status.phase is ServicePhase.BROKEN:
                return False
            if status.phase is ServicePhase.WAITING and status.detail and owns_ray:
                return False
    return False


def news(status: Status, spec: ServiceSpec) -> tuple[str, str, dict[str, str | float]]:
    """An event's name, message and facts; the message is empty where there is nothing to say."""
    match status.phase:
        case ServicePhase.WAITING:
            return "waiting", status.detail, {}
        case ServicePhase.LOADING if status.detail:
            return "compiling", status.detail, {}
        case ServicePhase.LOADING:
            percent = math.floor(status.fraction * 10) * 10
            return "loading", f"loading, {percent} %", {"percent": percent}
        case ServicePhase.READY:
            target = host_port(spec.entrance.host, status.port)
            lowered = f" (context lowered to {spec.context:,} tokens, which fit)" if spec.context_lowered else ""
            facts: dict[str, str | float] = {
                "target": target,
                "version": status.version,
                "context_tokens": spec.context,
            }
            return "ready", f"ready: {spec.name} on {target}{lowered}", facts
        case ServicePhase.DEGRADED:
            return "degraded", f"degraded: {status.detail}", {}
        case ServicePhase.BROKEN:
            return "broken", f"not serving: {status.detail}", {}
    return "", "", {}


def hold(controller: Any, spec: ServiceSpec, events: Events, ending: threading.Event, watch: RayWatch) -> bool:
    """Wait for the user's end, True, or for a service that can no longer serve, False. Lost links are said each time.

    Raises as `_status` and `watch.check` do.
    """
    warned, linked, lost_links = False, True, 0
    with Poll(lambda: _status(controller, spec), HOLD_POLL_S) as statuses:
        while not ending.wait(HOLD_POLL_S):
            watch.check()
            status = statuses.latest()
            if status is not None and status.phase is ServicePhase.BROKEN:
                events.tell("broken", f"not serving: {status.detail}")
                return False
            if status is not None and status.lost_links > lost_links:
                events.tell("degraded", f"degraded: {status.detail}")
                linked, lost_links = False, status.lost_links
            if status is not None and status.phase is ServicePhase.READY and not linked:
                events.tell("recovered", "serving again")
                linked = True
            if statuses.silent_s() >= SILENCE_S and not warned:
                events.tell("warning", f"the controller has not answered for {SILENCE_S:.0f} s")
                warned = True
    return True


def _status(controller: Any, spec: ServiceSpec) -> Status | None:
    """What the controller says; None while Ray restarts it.

    Raises:
        ServiceGone: somebody else has ended the service.
        ControllerGone: the controller cannot live.
    """
    import ray

    from tramontane.cluster import ray_platform

    try:
        return cast(Status, ray.get(controller.status.remote(), timeout=ANSWER_TIMEOUT_S))
    except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
        return None
    except ray.exceptions.RayActorError as error:
        if ray_platform.served_identity() != spec.identity:
            raise ServiceGone("the service was ended from elsewhere") from None
        raise ControllerGone(f"the controller cannot run: {one_line(error)}") from None
