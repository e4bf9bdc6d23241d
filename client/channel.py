"""How a client reaches its servers: one dataclass of options, and what it means to gRPC.

A client keeps `connections` channels for generating and one more for everything else. The generating channels watch
the servers' health and send requests only to those that serve; a request that finds none waits, under its deadline. The
other channel asks any server that answers, since `health` and `models` matter most while nothing serves. Channels
connect at their first call.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import grpc

from tramontane import __version__
from tramontane.client.target import check, is_local

SERVICE = "tramontane.v1.Serving"

REQUEST_ID_KEY = "x-request-id"
"""The metadata that names a call whose request has no field for a name."""

GENERATE_TIMEOUT_S = 300.0
"""The default deadline of a generating call, waiting for a server included."""
ASK_TIMEOUT_S = 10.0
"""The default deadline of every other call."""

Arguments: TypeAlias = list[tuple[str, str | int]]

# Our gateways take a ping every 20 s. Half a minute keeps a silent connection alive in firewalls, which forget it after
# some minutes, and finds a dead server long before a call's deadline. Behind a proxy with gRPC's default policy, a ping
# every 5 minutes, it costs an idle client its connection once or twice: gRPC doubles the time when it is told so.
_KEEPALIVE_S = 30.0
# A service goes on after pauses of its parts, gateways included, up to `serve --link-silence`, 45 s. A ping may fall
# into a pause's first moment, so the client waits as long; a server that is gone is then found after 75 s at most.
_KEEPALIVE_TIMEOUT_S = 45.0
REACH_TIMEOUT_S = 30.0
"""How long a server that cannot be reached is tried, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encryption. `Tls()` trusts the roots that gRPC brings; with `cert` and `key` the client proves who it is too."""

    ca: Path | str | None = None
    """PEM file of the authorities to trust."""
    cert: Path | str | None = None
    """PEM file of the client's certificate chain."""
    key: Path | str | None = None
    """PEM file of its private key."""
    server_name: str | None = None
    """The name that the server's certificate must carry, where it is not the target's."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs both cert and key")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            ValueError: one cannot be read.
        """
        return grpc.ssl_channel_credentials(_read("ca", self.ca), _read("key", self.key), _read("cert", self.cert))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Everything about connections; the defaults suit one server or several behind one name."""

    connections: int = 1
    """Connections to each server for generating. One carries about 100 streams at once on many servers and proxies."""
    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    """Sent as `authorization: Bearer ...` with every call."""
    clear_token: bool = False
    """Allow the token to travel beyond this machine without TLS, where anyone on the way can read it."""
    wait: bool = True
    """Generating calls wait under their deadline for a server that serves; else they end with Unavailable after their
    `attempts`, which take about a second.
    Why they wait is told by the logger `tramontane.client` and by a stream's `waiting_for`."""
    reach_timeout_s: float = REACH_TIMEOUT_S
    """A generating call that waits ends with Unavailable when nobody could be reached for so long: no such name, nobody
    there, no connection. What cannot change by waiting, as a certificate that is not trusted, ends it at once."""
    retry_refused: bool = True
    """A request that a full server refuses is tried again when the server says, as long as its deadline allows; else
    ResourceExhausted is raised at once."""
    max_message_bytes: int = 64 * 1024 * 1024
    """Of one request or response."""
    attempts: int = 4
    """Tries of a call that fails with UNAVAILABLE before its first message, 1 to 5. 1 means no retry; `models` and
    `health` have none. Between them lie 0.2 to 2 s, or what the server's `grpc-retry-pushback-ms` says; after many
    failures all retries stop."""
    keepalive_s: float = _KEEPALIVE_S
    """Ping so long after the last sign of life, during calls only (watching a server's health is one). A server may
    close connections that ping more often than it allows: ours each 20 s, gRPC's default each 300 s."""
    keepalive_timeout_s: float = _KEEPALIVE_TIMEOUT_S
    """A connection is dead when a ping goes unanswered for so long. So a server that pauses for less loses no stream,
    and one that is gone without a word is noticed after `keepalive_s` and this, 75 s, at most."""

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= 1024:
            raise ValueError(f"connections is {self.connections}; it must lie in 1 .. 1024")
        if not 1 <= self.attempts <= 5:
            raise ValueError(f"attempts is {self.attempts}; it must lie in 1 .. 5")
        if not 1024 <= self.max_message_bytes < 1 << 31:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; it must lie in 1024 .. 2^31 - 1")
        for name in ("keepalive_s", "keepalive_timeout_s", "reach_timeout_s"):
            seconds: float = getattr(self, name)
            if not 0.001 <= seconds <= 86_400:
                raise ValueError(f"{name} is {seconds}; it must lie in 0.001 .. 86400")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ValueError("the token must be printable ASCII without spaces")

    def check_target(self, target: str) -> None:
        """Raises ValueError where the target cannot be one (`target.check`), or the token would travel in clear."""
        check(target, encrypted=self.tls is not None)
        if self.token is not None and self.tls is None and not self.clear_token and not is_local(target):
            raise ValueError(
                f"the token would travel to {target} in clear; give TLS, or clear_token (--clear-token) if the network "
                "is trusted"
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()

    def arguments(self, target: str, *, watch_health: bool) -> Arguments:
        """gRPC's channel arguments."""
        arguments: Arguments = [
            ("grpc.service_config", json.dumps(self.service_config(watch_health=watch_health))),
            # Without it all channels of a process to one address share one connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # A request that does not fit is sent without retry; gRPC's default is 256 KiB.
            ("grpc.per_rpc_retry_buffer_size", self.max_message_bytes),
            ("grpc.keepalive_time_ms", round(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", round(self.keepalive_timeout_s * 1000)),
            ("grpc.http2.ping_timeout_ms", round(self.keepalive_timeout_s * 1000)),  # gRPC 1.85 heeds only this one
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.max_pings_without_data", 0),  # else the third ping waits for data, or a minute
            # A server that comes up is found within 3 s; gRPC's default backs off up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 3000),
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.primary_user_agent", f"tramontane/{__version__}"),
        ]
        if is_local(target):
            arguments.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None and self.tls.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return arguments

    def service_config(self, *, watch_health: bool) -> dict[str, object]:
        """How calls are spread and retried, in gRPC's own terms (grpc/service_config.proto)."""
        config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
        if watch_health:
            config["healthCheckConfig"] = {"serviceName": SERVICE}
        if self.attempts > 1:
            config["methodConfig"] = [
                {
                    "name": [{"service": SERVICE}],
                    "retryPolicy": {
                        "maxAttempts": self.attempts,
                        "initialBackoff": "0.2s",
                        "maxBackoff": "2s",
                        "backoffMultiplier": 2,
                        "retryableStatusCodes": ["UNAVAILABLE"],
                    },
                },
                # Asked while nothing serves, to learn why: a failure is the answer, and must not count for others.
                {"name": [{"service": SERVICE, "method": "ListModels"}]},
            ]
            # A failure costs a token and a success gives half a one back; with half of them gone nothing is retried.
            config["retryThrottling"] = {"maxTokens": 20, "tokenRatio": 0.5}
        return config


def client_repr(kind: str, target: str, options: ClientOptions, *, closed: bool) -> str:
    """The `repr` of a client; it holds no secret.

    >>> client_repr("Client", "10.0.0.1:50051", ClientOptions(tls=Tls()), closed=False)
    '<Client 10.0.0.1:50051, TLS>'
    """
    return f"<{kind} {', '.join([target, *(['TLS'] if options.tls else []), *(['closed'] if closed else [])])}>"


def _read(name: str, path: Path | str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error.strerror}") from None
