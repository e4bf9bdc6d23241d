"""`tramontane serve`: check the model, start or join Ray, follow the controller, end cleanly."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import threading
from dataclasses import replace

from tramontane.cluster.ending import end_service
from tramontane.cluster.events import Events
from tramontane.cluster.exposure import check_entrance
from tramontane.cluster.following import ControllerGone, ServiceGone, follow, hold
from tramontane.cluster.gateway import check_port, resolve
from tramontane.cluster.node_facts import this_machine
from tramontane.cluster.planning import ServeOptions, plan_service, read_model
from tramontane.cluster.polling import in_time
from tramontane.cluster.private_folder import SharedFolder, logs_folder, services_folder, sockets_folder
from tramontane.cluster.ray_session import OwnSession
from tramontane.cluster.ray_start import check_temporary_folder, leave, start_ray
from tramontane.cluster.ray_watch import RayGone, RayWatch
from tramontane.cluster.service_records import RecordFile, ServiceRecord, remove_ended
from tramontane.cluster.site import configured_secret
from tramontane.cluster.spec import NAMESPACE, ServiceSpec

END_TIMEOUT_S = 60.0
LAST_TRY_S = 10.0
"""To end a service whose Ray is gone in part."""


def serve(options: ServeOptions) -> int:
    """Serve until Ctrl-C or SIGTERM (with `detach`: until ready). The process's exit status.

    Raises:
        ValueError: see `plan_service` and `check_entrance`, or the options contradict each other.
        OSError: the port is in use.
        ConnectionError: the Ray at `address` cannot be joined.
    """
    if options.detach and options.address is None:
        raise ValueError("detach needs --address: without it, the service's Ray ends with this command")
    # What is wrong with the entrance, the model, the port, or this node, is said before Ray starts.
    asyncio.run(resolve(options.host, options.port))
    warnings = check_entrance(options.entrance, insecure=options.insecure)
    owns_ray = options.address is None
    here = this_machine(with_gpus=options.device != "cpu") if owns_ray else None
    model = read_model(options)
    spec = plan_service(options, model, [here] if here is not None else [])
    if owns_ray:
        check_temporary_folder(os.environ)
        asyncio.run(check_port(options.host, options.port))
    sockets = SharedFolder(sockets_folder(spec.identity))
    atexit.register(sockets.leave)
    if configured_secret(os.environ) is None:
        sockets.secret()
    services = services_folder()
    remove_ended(services)

    events, ending = Events.alone_on_stdout(as_json=options.as_json), threading.Event()
    for warning in (*warnings, *model.remarks):
        events.tell("warning", warning)
    if owns_ray:
        events.tell("starting", "starting Ray")
    start_ray(options.address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    import ray

    from tramontane.cluster import ray_platform

    session = OwnSession(ray_platform.session_dir()) if owns_ray else None
    record = RecordFile(
        services,
        ServiceRecord(
            identity=spec.identity,
            name=spec.name,
            ray=ray_platform.gcs_address(),
            owns_ray=owns_ray,
            namespace=NAMESPACE,
            pid=os.getpid(),
        ),
    )
    atexit.register(record.close, remove=owns_ray)
    controller, status, detached = None, 1, False
    try:
        with RayWatch(ray_platform.servers(), ray_platform.ask_gcs, gcs_may_return=not owns_ray) as watch:
            nodes = ray_platform.facts_of_nodes()
            if here is not None:  # what is free here was measured before Ray took its part
                nodes = [replace(here, cpus=node.cpus, gpus=node.gpus) for node in nodes]
            spec = plan_service(options, model, nodes, identity=spec.identity)
            _say_plan(spec, events)
            controller = ray_platform.create_controller(spec)
            if not follow(controller, spec, events, ending, watch, record, owns_ray=owns_ray):
                status = 0 if ending.is_set() else 1  # the user may end it before it is ready
            elif options.detach:
                controller, status, detached = None, 0, True
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
                in_time(lambda: end_service(controller, spec.identity, events), LAST_TRY_S)
        _say_what_stays(session, events)
        leave(1)
    finally:
        if controller is not None:
            whole: list[bool] = []
            if not in_time(lambda: whole.append(end_service(controller, spec.identity, events)), END_TIMEOUT_S):
                events.tell("warning", f"the service did not end within {END_TIMEOUT_S:.0f} s")
                _say_what_stays(session, events)
                leave(1)
            status = status if all(whole) else 1  # there is something to look into
        record.close(remove=not detached)
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
    if spec.memory_sum:
        events.tell("memory", f"memory: {spec.memory_sum}")
    if spec.context_lowered:
        events.tell("warning", f"the context is {spec.context:,} tokens: {spec.context_lowered}")
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
