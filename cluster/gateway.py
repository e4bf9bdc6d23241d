"""The gateway: where users come in. A gRPC server whose state is pushed in by its owner.

    start -> port open, NOT_SERVING, "loading, 43 %" -> set_model, set_routes -> SERVING -> drain, close

What each call does stands in `servicer.py`; what is offered, and what is said when nothing is, in `offer.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tramontane.cluster.address import Address, host_port
from tramontane.cluster.entrance import Entrance
from tramontane.cluster.health import Health
from tramontane.cluster.interceptors import OPEN_CALLS, RequestGuard, receive_limit_bytes
from tramontane.cluster.offer import Offer
from tramontane.cluster.request_size import request_limit_bytes
from tramontane.cluster.routes import Dial, LinkNews
from tramontane.cluster.served_model import ServedModel
from tramontane.cluster.servicer import Servicer
from tramontane.cluster.stalls import LoopWatch
from tramontane.cluster.stats import GatewayCounters, ServiceStats
from tramontane.cluster.tls import server_credentials
from tramontane.cluster.tokens import TokenGuard, Tokens
from tramontane.cluster.users import Users
from tramontane.protos import serving_pb2 as pb
from tramontane.protos import serving_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

Place: TypeAlias = tuple[int, int, int, str, Any]
"""An address as `getaddrinfo` gives it."""

SERVICE = pb.DESCRIPTOR.services_by_name["Serving"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
NOT_THIS_MACHINES = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""A name may have addresses that this machine lacks (`::1` where IPv6 is off); one that can be bound is enough."""
MIN_PING_INTERVAL_S = 20.0
"""A third ping that comes sooner than this after another costs a client its connection."""
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 60.0, 60.0
"""After so long without a sign of life a client is pinged; so long it may take to answer. In a gateway that was stopped
and goes on, this is up before it has read any answer; so it is longer than the pauses that the service survives."""
LAST_WORDS_S = 1.0
"""How long statuses may take to reach their clients once the grace is over."""
STREAMS_OF_A_CONNECTION = OPEN_CALLS // 2 + OPEN_CALLS // 8
"""One user's share of open calls, and a quarter more for calls that are ending. gRPC refuses further streams by itself.
It counts a stream that was reset until the event loop has come to it, which bounds what resets in a row can pile up."""
ENDING_STREAMS = STREAMS_OF_A_CONNECTION // 2
"""How many streams beyond these may have ended while their calls are still in memory. Without this room gRPC itself
refuses honest calls: 2,286 of 10,000 on one connection."""
PENDING_CALLS = 4 * STREAMS_OF_A_CONNECTION
"""Calls of one method that have come in and wait for the event loop. gRPC cancels further ones, in silence."""
WINDOW_BYTES = 1 << 16
"""A stream may bring so much before its request is read; it is HTTP/2's own default."""
METADATA_BYTES = 16 << 10
"""A call's metadata, which comes in before a token is checked."""


class Gateway:
    """One gateway. Its methods belong to one event loop."""

    def __init__(
        self,
        name: str,
        model_name: str,
        *,
        context: int,
        fetch_stats: Callable[[], Awaitable[ServiceStats]],
        dial: Dial,
    ) -> None:
        self._name = name
        self._request_limit_bytes = request_limit_bytes(context)
        self._offer = Offer(model_name, dial, self._on_change)
        self._health = Health(self._statuses)
        self._users = Users()
        self._guard = RequestGuard(context, self._users)
        self._servicer = Servicer(self._offer, self._users, fetch_stats)
        self._watch = LoopWatch()
        self._server: grpc.aio.Server | None = None

    async def start(self, entrance: Entrance) -> int:
        """Open the port, and say which it is; port 0 takes a free one.

        Raises:
            OSError: names host and port: in use, or not this machine's.
            ValueError: a file of the entrance is not right.
        """
        assert self._server is None, "a gateway starts once"
        host, port = entrance.host, entrance.port
        await check_port(host, port)
        guards: list[Any] = [self._guard]
        if entrance.token_file is not None:
            guards.insert(0, TokenGuard(Tokens(entrance.token_file)))
            self._users.go_by_tokens()
            self._health.be_discreet()
        options = server_options(self._request_limit_bytes, entrance.max_connection_age_s)
        server = grpc.aio.server(interceptors=guards, options=options)
        pb_grpc.add_ServingServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME], server)
        try:
            if entrance.tls_cert is None:
                bound = server.add_insecure_port(host_port(host, port))
            else:
                assert entrance.tls_key is not None, "a certificate comes with its key"
                credentials = server_credentials(entrance.tls_cert, entrance.tls_key, entrance.client_ca)
                bound = server.add_secure_port(host_port(host, port), credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {host_port(host, port)}: {error}") from error
        await server.start()
        self._server = server
        self._watch.start()
        log.info("%s listens on %s", self._name, host_port(host, bound))
        return bound

    @property
    def generation(self) -> int:
        """Of the route table; below 0 before there is one."""
        return self._offer.routes.generation

    @property
    def model(self) -> ServedModel | None:
        """What it was told by `set_model`."""
        return self._offer.model

    def stats(self) -> GatewayCounters:
        """How it fares."""
        all_stalls, own_stalls, now_s = self._watch.all, self._watch.own, asyncio.get_running_loop().time()
        return GatewayCounters(
            name=self._name.removeprefix("gateway-"),
            open_calls=self._guard.open,
            refused_calls=self._guard.refused,
            refusal_counts=tuple(self._guard.refusal_counts),
            tokenizing_bytes=self._servicer.tokenizing_bytes,
            longest_stall_ms=1e3 * all_stalls.ever_s,
            recent_stall_ms=1e3 * all_stalls.recent_s(now_s),
            longest_own_stall_ms=1e3 * own_stalls.ever_s,
            recent_own_stall_ms=1e3 * own_stalls.recent_s(now_s),
        )

    def set_loading(self, fraction: float) -> None:
        """How far the model is loaded, 0 to 1."""
        self._offer.set_reason(f"loading, {int(100 * fraction)} %")

    def set_model(self, model: ServedModel) -> None:
        """The model is loaded. It serves as soon as there are routes."""
        self._offer.set_model(model)

    async def set_routes(self, generation: int, routers: Sequence[tuple[str, Address]]) -> None:
        """A new table of routers, by name; see `Routes.set`."""
        await self._offer.routes.set(generation, routers)

    async def link_news(self, seen: int) -> LinkNews:
        """See `Routes.news`."""
        return await self._offer.routes.news(seen)

    def set_unavailable(self, reason: str) -> None:
        """Nothing serves until newer routes come; users hear the reason."""
        self._offer.withdraw(reason)

    def drain(self) -> None:
        """Take no new requests, for good; those in flight go on."""
        self._offer.drain()

    async def close(self, grace_s: float) -> None:
        """Drain, give what is in flight `grace_s` to end by itself, end the rest with UNAVAILABLE, and stop."""
        self.drain()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._servicer.wait_idle(), grace_s)
        self._servicer.end_all(self._offer.reason)
        self._health.close()
        if self._server is not None:
            await self._server.stop(LAST_WORDS_S)
        self._servicer.close()
        self._watch.stop()
        await self._offer.routes.close()
        log.info("%s closed", self._name)

    def _statuses(self) -> Mapping[str, bool]:
        serving = self._offer.serving
        return {"": serving, SERVICE: serving, f"{SERVICE}/{self._offer.model_name}": serving}

    def _on_change(self) -> None:
        log.info("%s is %s", self._name, "serving" if self._offer.serving else f"not serving: {self._offer.reason}")
        self._health.changed()


def server_options(request_limit_bytes: int, max_connection_age_s: float) -> list[tuple[str, int]]:
    """gRPC's arguments for a gateway's server."""
    options = [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", receive_limit_bytes(request_limit_bytes)),
        ("grpc.max_concurrent_streams", STREAMS_OF_A_CONNECTION),
        ("grpc.http2.max_deallocating_streams", ENDING_STREAMS),
        # At its defaults, 1000 and 3000, gRPC cancels honest calls long before we would refuse them.
        ("grpc.server.max_pending_requests", PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", PENDING_CALLS),
        # With its probe of the network on, gRPC lets each stream bring 4 MiB unread.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        # A client may ping each 20 s, with or without calls. (gRPC's default of 5 minutes is longer than most firewalls
        # and address translators keep a silent connection.)
        ("grpc.http2.min_ping_interval_without_data_ms", round(MIN_PING_INTERVAL_S * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # The gateway pings too: a client whose machine is gone closes nothing, and its requests go on until then.
        ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),  # gRPC 1.85 heeds only this one
        ("grpc.http2.max_pings_without_data", 0),  # else the third ping waits for data
    ]
    if max_connection_age_s:
        # The grace is gRPC's default, without end: streams that run on an old connection are never cut.
        options.append(("grpc.max_connection_age_ms", max(1, round(max_connection_age_s * 1000))))
    return options


async def check_port(host: str, port: int) -> None:
    """Try the port first: grpc says of a port in use only that it failed, after a line of its own on stderr.

    Raises:
        OSError: names host and port: in use, or not this machine's.
    """
    places = await resolve(host, port)
    troubles = [trouble for place in places if (trouble := _trouble(*place)) is not None]
    serious = [error for error in troubles if error.errno not in NOT_THIS_MACHINES]
    if serious or len(troubles) == len(places):
        raise _no_listening(host, port, (serious or troubles)[0])


async def resolve(host: str, port: int) -> Sequence[Place]:
    """The addresses of a host's name.

    Raises:
        OSError: names host and port: there is no such host.
    """
    try:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter of a name that is too long for one
        raise _no_listening(host, port, error) from None


def _no_listening(host: str, port: int, error: Exception) -> OSError:
    return OSError(f"cannot listen on {host_port(host, port)}: {getattr(error, 'strerror', None) or error}")


def _trouble(family: int, kind: int, protocol: int, _name: str, address: Any) -> OSError | None:
    """What keeps us from binding this address, if anything."""
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error
    return None
