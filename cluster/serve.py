"""`tramontane serve` and `tramontane down`: check the model, start or join Ray, follow the controller, end cleanly."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ipaddress
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from typing import Any, cast

import click

from tramontane.cluster.controller import ServicePhase, Status
from tramontane.cluster.doors import host_port
from tramontane.cluster.gateway import check_port
from tramontane.cluster.planning import ServeOptions, fit_to, plan_service
from tramontane.cluster.reasons import one_line
from tramontane.cluster.spec import NAMESPACE, ServiceSpec

POLL_S = 0.2
ANSWER_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 30.0
OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing of ours goes through Ray's object store; this is near its least size."""


class ServiceGone(ConnectionError):  # noqa: N818  (an event as much as an error)
    """The service was ended by somebody else."""


def serve(options: ServeOptions) -> int:
    """Serve until Ctrl-C or SIGTERM (with `detach`: until ready). The process's exit status.

    Raises:
        ValueError: see `plan_service`, or the options contradict each other.
        OSError: the port is in use.
        ConnectionError: no Ray cluster at `address`, or the service was ended from elsewhere.
    """
    _check_reach(options)
    spec = plan_service(options, {})  # what is wrong with the model, or the port, is said before Ray starts
    if options.address is None:
        asyncio.run(check_port(options.host, options.port))

    ending = threading.Event()
    _start_ray(options.address)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ending.set())
    from tramontane.cluster import ray_platform

    controller = None
    import ray

    try:
        spec = fit_to(spec, options, ray.cluster_resources())
        _say_plan(spec)
        controller = ray_platform.create_controller(spec)
        if not _follow(controller, spec, ending, owns_ray=options.address is None):
            return 0 if ending.is_set() else 1  # the user may end it before it is ready
        if options.detach:
            controller = None
            return 0
        return 0 if _hold(controller, spec, ending) else 1
    except ServiceGone:
        controller = None
        raise
    finally:
        if controller is not None:
            _end(controller, spec.identity)
        ray.shutdown()


def down(address: str) -> int:
    """End the service on a Ray cluster. The process's exit status.

    Raises:
        ConnectionError: no Ray cluster at `address`.
    """
    _start_ray(address)
    import ray

    from tramontane.cluster import actors, ray_platform

    try:
        controller = actors.find_controller()
        if controller is not None:
            return 0 if _end(controller, ray_platform.served_identity()) else 1
        if ray_platform.end_parts():
            click.echo("ended what was left of a service without a controller")
            return 0
        click.echo("nothing is served there")
        return 1
    finally:
        ray.shutdown()


def _check_reach(options: ServeOptions) -> None:
    if options.detach and options.address is None:
        raise ValueError("detach needs --address: without it, the service's Ray ends with this command")
    host = options.host
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):  # another name: not known to be loopback
        loopback = loopback or ipaddress.ip_address(host).is_loopback
    if not loopback and not options.insecure:
        raise ValueError(f"host is {host}, beyond loopback: there is no authentication; --insecure allows it")


def _start_ray(address: str | None) -> None:
    """Start a Ray of our own, or join one. Ray reads its environment when it is imported, so that is set first."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    else:
        # As `ray start` does; the token is that of the environment, or of the file that Ray keeps.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    quiet: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
    if address is None:
        click.echo("starting Ray")
        _start_reaper()
        quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=address or "local", **quiet)
    except ConnectionError as error:
        raise ConnectionError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from None


def _start_reaper() -> None:
    """See `reaper.py`; the pipe to it stays open as long as this process lives."""
    command = [sys.executable, "-m", "tramontane.cluster.reaper", str(os.getpid())]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603  (our own)
    atexit.register(reaper.communicate)


def _say_plan(spec: ServiceSpec) -> None:
    from tramontane.cluster import actors

    layers = " + ".join(str(last - first) for first, last in spec.spans)
    resources = ", ".join(f"{amount:g} {name}" for name, amount in spec.stage_resources().items())
    click.echo(f"model {spec.name}: {layers} layers, {spec.dtype} on {spec.device}, {resources} a stage")
    click.echo(
        f"KV holds {spec.layout.capacity_tokens():,} tokens of short sequences; context {spec.context:,}, "
        f"chunk {spec.layout.chunk}"
    )
    click.echo(f"logs in {actors.session_dir() / 'logs'}")


def _follow(controller: Any, spec: ServiceSpec, ending: threading.Event, *, owns_ray: bool) -> bool:
    """Show how the service comes up. True once it is ready, False when it cannot be or the user ended it."""

    said, listening = "", False
    while not ending.wait(POLL_S):
        status = _status(controller, spec)
        if status is None:
            continue
        if status.port and not listening:
            click.echo(f"listening on {host_port(spec.host, status.port)}, not serving yet")
            listening = True
        line = _line(status, spec)
        if line and line != said:
            click.echo(line, err=status.phase is ServicePhase.BROKEN)
            said = line
        if status.phase is ServicePhase.READY:
            return True
        if status.phase is ServicePhase.BROKEN or (status.phase is ServicePhase.WAITING and status.detail and owns_ray):
            return False
    return False


def _line(status: Status, spec: ServiceSpec) -> str:
    match status.phase:
        case ServicePhase.WAITING:
            return status.detail
        case ServicePhase.LOADING:
            return f"loading, {math.floor(status.fraction * 10) * 10} %"
        case ServicePhase.READY:
            return f"ready: {spec.name} on {host_port(spec.host, status.port)}"
        case ServicePhase.BROKEN:
            return f"not serving: {status.detail}"
    return ""


def _hold(controller: Any, spec: ServiceSpec, ending: threading.Event) -> bool:
    """Wait for the user's end; a service that breaks is said once. True if it was whole until then."""
    whole = True
    while not ending.wait(POLL_S * 5):
        status = _status(controller, spec)
        if status is not None and status.phase is ServicePhase.BROKEN and whole:
            click.echo(f"not serving: {status.detail}", err=True)
            whole = False
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


def _end(controller: Any, identity: str | None) -> bool:
    """End the service of this identity. False where its controller, or a part, was hung and had to be swept away.

    The controller goes last: as long as its name is taken, nobody starts another service here.
    """
    import ray

    from tramontane.cluster import ray_platform

    click.echo("ending")
    sys.stdout.flush()
    started, whole = time.monotonic(), True
    try:
        ray.get(controller.stop.remote(), timeout=STOP_TIMEOUT_S)
    except Exception as error:
        click.echo(f"the controller did not end by itself: {type(error).__name__}", err=True)
        whole = False
        if identity is not None:
            ray_platform.end_parts(identity)
    ray.kill(controller)
    click.echo(f"ended in {time.monotonic() - started:.1f} s")
    return whole
