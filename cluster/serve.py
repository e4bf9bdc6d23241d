"""`tramontane serve` and `tramontane down`: check the model, start or join Ray, follow the controller, end cleanly."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import threading
import time
from typing import Any

from tramontane.cluster.events import Events
from tramontane.cluster.exposure import check_entrance
from tramontane.cluster.following import ControllerGone, ServiceGone, follow, hold
from tramontane.cluster.gateway import check_port, resolve
from tramontane.cluster.planning import ServeOptions, fit_to, plan_service
from tramontane.cluster.polling import in_time
from tramontane.cluster.private_folder import SharedFolder, logs_folder, sockets_folder
from tramontane.cluster.ray_session import OwnSession
from tramontane.cluster.ray_start import leave, start_ray
from tramontane.cluster.ray_watch import RayGone, RayWatch
from tramontane.cluster.site import configured_secret
from tramontane.cluster.spec import ServiceSpec

STOP_TIMEOUT_S = 30.0
END_TIMEOUT_S = 60.0
LAST_TRY_S = 10.0
"""To end a service whose Ray is gone in part."""


def serve(options: ServeOptions) -> int:
    """Serve until Ctrl-C or SIGTERM (with `detach`: until ready). The process's exit status.

    Raises:
        ValueError: see `plan_service` and `check_entrance`, or the options contradict each other.
        OSError: the port is in use.
        ConnectionError: no Ray cluster at `address`.
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

    events, ending = Events.alone_on_stdout(as_json=options.as_json), threading.Event()
    for warning in (*warnings, *spec.remarks):
        events.tell("warning", warning)
    if options.address is None:
        events.tell("starting", "starting Ray")
    start_ray(options.address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    import ray

    from tramontane.cluster import ray_platform

    owns_ray = options.address is None
    session = OwnSession(ray_platform.session_dir()) if owns_ray else None
    controller, status = None, 1
    try:
        with RayWatch(ray_platform.servers(), ray_platform.ask_gcs, gcs_may_return=not owns_ray) as watch:
            spec = fit_to(spec, options, ray_platform.resources_of_nodes())
            _say_plan(spec, events)
            controller = ray_platform.create_controller(spec)
            if not follow(controller, spec, events, ending, watch, owns_ray=owns_ray):
                status = 0 if ending.is_set() else 1  # the user may end it before it is ready
            elif options.detach:
                controller, status = None, 0
            else:
                status = 0 if hold(controller, spec, events, ending, watch) else 1
    except (ServiceGone, ControllerGone) as gone:
        events.tell("broken", f"not serving: {gone}")
        if isinstance(gone, ServiceGone):
            controller = None
    except RayGone as gone:
        events.tell("broken", f"not serving: {gone}")
        if not owns_ray and controller is not None:
            with contextlib.suppress(Exception):
                in_time(lambda: _end(controller, spec.identity, events), LAST_TRY_S)
        _say_what_stays(session, events)
        leave(1)
    finally:
        if controller is not None:
            whole: list[bool] = []
            if not in_time(lambda: whole.append(_end(controller, spec.identity, events)), END_TIMEOUT_S):
                events.tell("warning", f"the service did not end within {END_TIMEOUT_S:.0f} s")
                _say_what_stays(session, events)
                leave(1)
            status = status if all(whole) else 1  # there is something to look into
        if session is not None:
            session.before_shutdown()
        ray.shutdown()
        if session is not None and not (status == 0 and session.remove()):
            _say_what_stays(session, events)
    return status


def _say_what_stays(session: OwnSession | None, events: Events) -> None:
    if session is not None:
        folder = str(session.folder)
        events.tell("left", f"Ray's files stay in {folder}", folder=folder)


def down(address: str, *, as_json: bool) -> int:
    """End the service on a Ray cluster. The process's exit status.

    Raises:
        ConnectionError: no Ray cluster at `address`.
    """
    events = Events.alone_on_stdout(as_json=as_json)
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
    capacity, chunk = spec.scheduler.layout.capacity_tokens(), spec.scheduler.layout.chunk
    events.tell(
        "kv",
        f"KV holds {capacity:,} tokens of short sequences; context {spec.context:,}, chunk {chunk}",
        capacity_tokens=capacity,
        context_tokens=spec.context,
        chunk_tokens=chunk,
    )
    logs, ray_logs = str(logs_folder(spec.identity)), str(ray_platform.session_dir() / "logs")
    events.tell("logs", f"logs in {logs} (Ray's own in {ray_logs})", folder=logs, ray=ray_logs)


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
