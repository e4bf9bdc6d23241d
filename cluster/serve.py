"""`tramontane serve` and `tramontane down`: check the model, start or join Ray, follow the controller, end cleanly."""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import signal
import threading
import time
from typing import Any, cast

from tramontane.cluster.controller import ServicePhase, Status
from tramontane.cluster.doors import host_port
from tramontane.cluster.events import Events
from tramontane.cluster.exposure import check_entrance
from tramontane.cluster.gateway import check_port, resolve
from tramontane.cluster.planning import ServeOptions, fit_to, plan_service
from tramontane.cluster.private_folder import SharedFolder, logs_folder, sockets_folder
from tramontane.cluster.ray_session import OwnSession
from tramontane.cluster.ray_start import start_ray
from tramontane.cluster.reasons import one_line
from tramontane.cluster.site import configured_secret
from tramontane.cluster.spec import ServiceSpec

POLL_S = 0.2
ANSWER_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 30.0


class ServiceGone(ConnectionError):  # noqa: N818  (an event as much as an error)
    """The service was ended by somebody else."""


def serve(options: ServeOptions) -> int:
    """Serve until Ctrl-C or SIGTERM (with `detach`: until ready). The process's exit status.

    Raises:
        ValueError: see `plan_service` and `check_entrance`, or the options contradict each other.
        OSError: the port is in use.
        ConnectionError: no Ray cluster at `address`, or the service was ended from elsewhere.
    """
    if options.detach and options.address is None:
        raise ValueError("detach needs --address: without it, the service's Ray ends with this command")
    # What is wrong with the entrance, the model, the port, or this node, is said before Ray starts.
    asyncio.run(resolve(options.host, options.port))
    warnings = check_entrance(options.entrance, insecure=options.insecure)
    spec = plan_service(options, [])
    if options.address is None:
        asyncio.run(check_port(options.host, options.port))
    sockets = SharedFolder(sockets_folder(spec.identity))
    atexit.register(sockets.leave)
    if configured_secret(os.environ) is None:
        sockets.secret()

    events, ending = Events(as_json=options.as_json), threading.Event()
    for warning in warnings:
        events.tell("warning", warning)
    if options.address is None:
        events.tell("starting", "starting Ray")
    start_ray(options.address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    from tramontane.cluster import ray_platform

    controller, status = None, 1
    session = OwnSession(ray_platform.session_dir()) if options.address is None else None
    try:
        spec = fit_to(spec, options, ray_platform.resources_of_nodes())
        _say_plan(spec, events)
        controller = ray_platform.create_controller(spec)
        if not _follow(controller, spec, events, ending, owns_ray=options.address is None):
            status = 0 if ending.is_set() else 1  # the user may end it before it is ready
        elif options.detach:
            controller, status = None, 0
        else:
            status = 0 if _hold(controller, spec, events, ending) else 1
        return status
    except ServiceGone:
        controller = None
        raise
    finally:
        if controller is not None and not _end(controller, spec.identity, events):
            status = 1  # there is something to look into
        _leave_ray(session, events, well=status == 0)


def _leave_ray(session: OwnSession | None, events: Events, *, well: bool) -> None:
    """Leave a Ray that others run, or end our own with its files; where it did not go well, say where they stay."""
    import ray

    if session is not None:
        session.before_shutdown()
    ray.shutdown()
    if session is not None and not (well and session.remove()):
        folder = str(session.folder)
        events.tell("left", f"Ray's files stay in {folder}", folder=folder)


def down(address: str, *, as_json: bool) -> int:
    """End the service on a Ray cluster. The process's exit status.

    Raises:
        ConnectionError: no Ray cluster at `address`.
    """
    events = Events(as_json=as_json)
    start_ray(address)
    import ray

    from tramontane.cluster import actors, ray_platform

    try:
        controller = actors.find_controller()
        if controller is not None:
            return 0 if _end(controller, ray_platform.served_identity(), events) else 1
        if ray_platform.end_parts():
            events.tell("ended", "ended what was left of a service without a controller")
            return 0
        events.tell("nothing", "nothing is served there")
        return 1
    finally:
        ray.shutdown()


def _say_plan(spec: ServiceSpec, events: Events) -> None:
    from tramontane.cluster import ray_platform

    layers = " + ".join(str(last - first) for first, last in spec.spans)
    resources = ", ".join(f"{amount:g} {name}" for name, amount in spec.stage_resources().items())
    weights = f" with {spec.quantize} weights" if spec.quantize else ""
    events.tell(
        "model",
        f"model {spec.name}: {layers} layers, {spec.dtype}{weights} on {spec.device}, {resources} a stage",
        name=spec.name,
        stages=spec.stages,
        dtype=spec.dtype,
        weights=spec.quantize or spec.dtype,
        device=spec.device,
    )
    capacity, chunk = spec.layout.capacity_tokens(), spec.layout.chunk
    events.tell(
        "kv",
        f"KV holds {capacity:,} tokens of short sequences; context {spec.context:,}, chunk {chunk}",
        capacity_tokens=capacity,
        context_tokens=spec.context,
        chunk_tokens=chunk,
    )
    logs, ray_logs = str(logs_folder(spec.identity)), str(ray_platform.session_dir() / "logs")
    events.tell("logs", f"logs in {logs} (Ray's own in {ray_logs})", folder=logs, ray=ray_logs)


def _follow(controller: Any, spec: ServiceSpec, events: Events, ending: threading.Event, *, owns_ray: bool) -> bool:
    """Show how the service comes up. True once it is ready, False when it cannot be or the user ended it."""
    said, listening = "", False
    while not ending.wait(POLL_S):
        status = _status(controller, spec)
        if status is None:
            continue
        if status.port and not listening:
            target = host_port(spec.entrance.host, status.port)
            events.tell("listening", f"listening on {target}, not serving yet", target=target)
            listening = True
        event, line, facts = _news(status, spec)
        if line and line != said:
            events.tell(event, line, **facts)
            said = line
        if status.phase is ServicePhase.READY:
            return True
        if status.phase is ServicePhase.BROKEN or (status.phase is ServicePhase.WAITING and status.detail and owns_ray):
            return False
    return False


def _news(status: Status, spec: ServiceSpec) -> tuple[str, str, dict[str, str | float]]:
    """An event's name, message and facts; the message is empty where there is nothing to say."""
    match status.phase:
        case ServicePhase.WAITING:
            return "waiting", status.detail, {}
        case ServicePhase.LOADING:
            percent = math.floor(status.fraction * 10) * 10
            return "loading", f"loading, {percent} %", {"percent": percent}
        case ServicePhase.READY:
            target = host_port(spec.entrance.host, status.port)
            return "ready", f"ready: {spec.name} on {target}", {"target": target, "version": status.version}
        case ServicePhase.DEGRADED:
            return "degraded", f"degraded: {status.detail}", {}
        case ServicePhase.BROKEN:
            return "broken", f"not serving: {status.detail}", {}
    return "", "", {}


def _hold(controller: Any, spec: ServiceSpec, events: Events, ending: threading.Event) -> bool:
    """Wait for the user's end; a service that breaks is said once, a lost link each time. True if it was whole."""
    whole, linked, lost_links = True, True, 0
    while not ending.wait(POLL_S * 5):
        status = _status(controller, spec)
        if status is None:
            continue
        if status.phase is ServicePhase.BROKEN:
            if whole:
                events.tell("broken", f"not serving: {status.detail}")
            whole = False
        elif status.lost_links > lost_links:
            events.tell("degraded", f"degraded: {status.detail}")
            linked, lost_links = False, status.lost_links
        if status.phase is ServicePhase.READY and not linked:
            events.tell("recovered", "serving again")
            linked = True
    return whole


def _status(controller: Any, spec: ServiceSpec) -> Status | None:
    """What the controller says; None while Ray restarts it.

    Raises:
        ServiceGone: somebody else has ended the service.
        ConnectionError: the controller cannot live; the reason as one line.
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
        raise ConnectionError(f"the controller cannot run: {one_line(error)}") from None


def _end(controller: Any, identity: str | None, events: Events) -> bool:
    """End the service of this identity. False where its controller, or a part, was hung and had to be swept away.

    The controller goes last: as long as its name is taken, nobody starts another service here.
    """
    import ray

    from tramontane.cluster import ray_platform

    events.tell("ending", "ending")
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
