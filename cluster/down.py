"""`tramontane down`: ends the service that this user's `serve` has recorded on this node, or the one on a given Ray."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence

from tramontane.cluster.ending import end_service
from tramontane.cluster.events import Events
from tramontane.cluster.private_folder import services_folder
from tramontane.cluster.ray_start import start_ray, take_a_token
from tramontane.cluster.service_records import FoundRecord, holder_of, read_records

SERVE_TIMEOUT_S = 90.0
"""How long `serve` may take to end; it gives its service 60 s."""


def down(service: str | None, address: str | None, *, as_json: bool) -> int:
    """End one service. Returns the process's exit status: 0 where the service has ended as it should.

    Raises:
        ValueError: `service` names none, or several; the message lists them.
        ConnectionError: the service's Ray cannot be joined.
    """
    events = Events.alone_on_stdout(as_json=as_json)
    if address is not None:
        return end_on_ray(address, events, service)
    folder = services_folder()
    records, flaws = read_records(folder)
    for flaw in flaws:
        events.tell("warning", flaw)
    living = []
    for found in records:
        if found.holder is None and has_ended(found):
            found.path.unlink(missing_ok=True)
            events.tell("over", f"{found.record} is over; its record is removed", identity=found.record.identity)
        else:
            living.append(found)
    if not living:
        events.tell("nothing", f"no service is recorded in {folder}; --address names the Ray of one that is not")
        return 1
    chosen = choose(living, service)
    if chosen.holder is not None:
        return end_serve(chosen, chosen.holder, events)
    status = end_on_ray(chosen.record.ray, events, chosen.record.identity)
    if status == 0:
        chosen.path.unlink(missing_ok=True)
    return status


def choose(living: Sequence[FoundRecord], service: str | None) -> FoundRecord:
    """The record that `service` names by identity, model or the HOST:PORT that clients dial. None is the only one.

    Raises:
        ValueError: no record or several have that name; the message lists them.
    """
    named = [
        found for found in living if service in (None, found.record.identity, found.record.name, found.record.target)
    ]
    if len(named) == 1:
        return named[0]
    there = "; ".join(str(found.record) for found in named or living)
    if named:
        raise ValueError(f"{len(named)} services run here, say which by `tramontane down ID`: {there}")
    raise ValueError(f"no service {service} runs here; there is {there}")


def end_on_ray(address: str, events: Events, service: str | None = None) -> int:
    """End the service that a Ray runs, if it is `service`; None is any. Returns the exit status.

    Raises:
        ValueError: the Ray runs another service, or none.
        ConnectionError: the Ray cannot be joined.
    """
    start_ray(address)
    import ray

    from tramontane.cluster import actors, ray_platform

    try:
        names = ray_platform.served_names()
        if service is not None and (names is None or service not in names):
            raise ValueError(f"the Ray at {address} does not serve {service}")
        controller = actors.find_controller()
        if controller is not None:
            identity, name = names or (None, "a service")
            return 0 if end_service(controller, identity, events, f"{name} on the Ray at {address}") else 1
        if ray_platform.end_parts():
            events.tell("ended", "ended what was left of a service without a controller")
            return 0
        events.tell("nothing", "nothing is served there")
        return 1
    finally:
        ray.shutdown()


def has_ended(found: FoundRecord) -> bool:
    """Whether the service is gone, too, where its `serve` has ended. A Ray that cannot be asked may still run it."""
    if found.record.owns_ray:
        return True
    take_a_token()
    from tramontane.cluster import ray_joining

    try:
        return ray_joining.served_identity(found.record.ray) != found.record.identity
    except ray_joining.NoRay:
        return True
    except ConnectionError:
        return False


def end_serve(found: FoundRecord, holder: int, events: Events) -> int:
    """Do what Ctrl-C does to the `serve` that holds the record, and wait for its end.

    Raises:
        ConnectionError: that process cannot be reached from here.
    """
    with _process(holder) as process:
        # It held the record before and after its descriptor was opened, so the descriptor is of no other process.
        if process is None or holder_of(found.path) != holder:
            raise ConnectionError(f"the `serve` of {found.record}, process {found.record.pid}, is not to be seen here")
        events.tell("ending", f"ending {found.record}", identity=found.record.identity)
        started = time.monotonic()
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not select.select([process], [], [], SERVE_TIMEOUT_S)[0]:
            events.tell("warning", f"process {holder} has not ended within {SERVE_TIMEOUT_S:.0f} s")
            return 1
    seconds = round(time.monotonic() - started, 1)
    events.tell("ended", f"ended in {seconds:.1f} s", seconds=seconds)
    return 0


@contextlib.contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """A descriptor that becomes readable when that process ends; None where there is no such process."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # or the number is 0: the process is in another namespace
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
