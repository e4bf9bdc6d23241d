"""Asks a Ray whether this process can join it, and says in one line why not.

Ray's own client tries for 20 s, prints a line for each try, and names no cause. The GCS answers `CheckAlive` with Ray's
version; one that asks for a token answers nothing without it. Import this module once RAY_AUTH_MODE is set: Ray reads
the variable when it is imported.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import (  # type: ignore[attr-defined]  # compiled
    AuthenticationMode,
    AuthenticationTokenLoader,
    get_authentication_mode,
)
from ray.core.generated import gcs_service_pb2 as pb
from ray.core.generated import gcs_service_pb2_grpc as services

from tramontane.cluster.spec import NAMESPACE, SPEC_KEY, names_in

MOST_PORT = 65535
REACH_TIMEOUT_S = 5.0
"""How long connecting may take, and each answer."""
NODE_TIMEOUT_S, NODE_PERIOD_S = 10.0, 0.1
"""How long, and how often, the node of this machine is looked for: a head listens before its own node is there."""
TOKEN_PLACES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"  # noqa: S105  (names)


class NoRay(ConnectionError):  # noqa: N818  (says what is the case)
    """There is certainly no Ray at the address. (One that cannot be reached in time may be there: ConnectionError.)"""


class TokenAsked(ConnectionError):  # noqa: N818
    """A call without a token was refused."""


def joinable_address(address: str) -> str:
    """The HOST:PORT of the Ray at `address`, which may be `auto`, after checking that this process can join it.

    Raises:
        ValueError: `address` is neither HOST:PORT nor auto.
        ConnectionError: this process cannot join it; the message says in one line what both sides need.
    """
    address = resolve(address)
    with Gcs(address) as gcs:
        asks = gcs.asks_for_token()
        mismatch = _token_mismatch(asks=asks, takes=get_authentication_mode() != AuthenticationMode.DISABLED)
        if mismatch:
            raise ConnectionError(f"the Ray at {address} {mismatch}")
        token = own_token(address) if asks else None
        version = gcs.version(token)
        if version != ray.__version__:
            raise ConnectionError(f"the Ray at {address} is version {version}, and here it is {ray.__version__}")
        end = time.monotonic() + NODE_TIMEOUT_S
        while not any(os.path.exists(path) for path in gcs.raylet_sockets(token)):
            if time.monotonic() >= end:
                raise ConnectionError(
                    f"no node of the Ray at {address} runs on this machine: `ray start --address {address}` starts one"
                )
            time.sleep(NODE_PERIOD_S)
    return address


def _token_mismatch(*, asks: bool, takes: bool) -> str:
    """A predicate about a Ray that `asks` for a token where this side `takes` none along, or the reverse, or empty."""
    if asks and not takes:
        return "asks for a token, and RAY_AUTH_MODE is disabled here: set it to token"
    if takes and not asks:
        return (
            "asks for no token, so whoever reaches it runs programs there: `ray get-auth-token --generate` makes one "
            "for the next `ray start`; RAY_AUTH_MODE=disabled joins it as it is"
        )
    return ""


def served_identity(address: str) -> str | None:
    """The identity of the service that the Ray at `address` runs, None where it runs none. The Ray is not joined.

    Raises:
        ConnectionError: the Ray cannot be asked; NoRay where there is none.
    """
    with Gcs(address) as gcs:
        record = gcs.value(SPEC_KEY, own_token(address) if gcs.asks_for_token() else None)
    return names_in(record)[0] if record else None


class Gcs:
    """A connection to the GCS of a Ray that is not joined; a context manager."""

    def __init__(self, address: str) -> None:
        """Connect to `address`, HOST:PORT.

        Raises:
            ConnectionError: it cannot be reached; NoRay where nobody listens there.
        """
        self._address = address
        self._channel = _channel(_reach(address))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def asks_for_token(self) -> bool:
        """Whether calls without a token are refused."""
        try:
            self.version(None)
        except TokenAsked:
            return True
        return False

    def version(self, token: str | None) -> str:
        """The version of the Ray."""
        ask = services.NodeInfoGcsServiceStub(self._channel).CheckAlive
        return str(self._answer(ask, pb.CheckAliveRequest(), token).ray_version)

    def raylet_sockets(self, token: str | None) -> list[str]:
        """The socket paths of all living raylets, by which programs on their nodes reach them.

        Ray aborts a program that finds none on its node.
        """
        ask = services.NodeInfoGcsServiceStub(self._channel).GetAllNodeInfo
        nodes = self._answer(ask, pb.GetAllNodeInfoRequest(), token).node_info_list
        return [node.raylet_socket_name for node in nodes if node.state == node.ALIVE]

    def value(self, key: bytes, token: str | None) -> bytes:
        """The value of a key in our namespace of Ray's key-value store; empty where there is none."""
        ask = services.InternalKVGcsServiceStub(self._channel).InternalKVGet
        return bytes(self._answer(ask, pb.InternalKVGetRequest(namespace=NAMESPACE.encode(), key=key), token).value)

    def _answer(self, ask: Callable[..., Any], request: object, token: str | None) -> Any:
        metadata = None if token is None else [("authorization", f"Bearer {token}")]
        try:
            return ask(request, timeout=REACH_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.UNAUTHENTICATED if token is None:
                    raise TokenAsked(f"the Ray at {self._address} asks for a token") from None
                case grpc.StatusCode.UNAUTHENTICATED:
                    raise ConnectionError(f"the Ray at {self._address} has another token than {_place()}") from None
                case grpc.StatusCode.DEADLINE_EXCEEDED:
                    said = f"what listens there has not answered for {REACH_TIMEOUT_S:g} s"
                    raise ConnectionError(f"no Ray cluster at {self._address}: {said}") from None
                case _:
                    raise NoRay(f"no Ray cluster at {self._address}: what listens there is no Ray's GCS") from None


def resolve(address: str) -> str:
    """HOST:PORT of an address. `auto` stands for RAY_ADDRESS, or else for the Ray that runs on this machine.

    Raises:
        ValueError: `address` is neither HOST:PORT nor auto.
        ConnectionError: no Ray runs on this machine.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    if address == "auto":
        try:
            return str(canonicalize_bootstrap_address(address))
        except ConnectionError:
            raise ConnectionError("no Ray cluster runs on this machine; --address names one elsewhere") from None
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or int(port) > MOST_PORT:
        raise ValueError(f"address is {address}; it takes HOST:PORT, where a Ray's GCS listens, or auto")
    return address


def _reach(address: str) -> str:
    """Check that somebody listens. Returns HOST:PORT as Ray dials it: this node's address instead of loopback's."""
    try:
        target = str(canonicalize_bootstrap_address(address))
        host, _, port = target.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except ConnectionRefusedError as error:
        raise NoRay(f"no Ray cluster at {address}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise ConnectionError(f"no Ray cluster at {address}: {reason}") from None
    return target


def _channel(target: str) -> grpc.Channel:
    """A channel to the GCS, with TLS where RAY_USE_TLS asks for it, as Ray's own clients connect."""
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(target, options)
    certificate, key, authority = load_certs_from_env()
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(authority, key, certificate), options)


def own_token(address: str) -> str:
    """The token that Ray's client finds on this side.

    Raises:
        ConnectionError: there is none, or none that can be sent to `address`.
    """
    loader = AuthenticationTokenLoader.instance()
    try:
        token = str(loader.get_raw_token(ignore_auth_mode=True)) if loader.has_token(ignore_auth_mode=True) else ""
        flaw = "" if token.isascii() and token.isprintable() else f"that of {_place()} is no printable ASCII text"
    except ray.exceptions.AuthenticationError as error:
        token, flaw = "", error.message
    except UnicodeDecodeError:
        token, flaw = "", f"that of {_place()} is no text"
    if not token:
        flaw = flaw or f"there is none here: its own comes from {TOKEN_PLACES}"
    if flaw:
        raise ConnectionError(f"the Ray at {address} asks for a token, and {flaw}")
    return token


def _place() -> str:
    """The place where Ray's client found the token: the first of `TOKEN_PLACES` that holds one."""
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
