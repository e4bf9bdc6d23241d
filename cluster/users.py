"""Who a call comes from, as far as shares are concerned: one user, one share, whatever the number of connections."""

from __future__ import annotations

import functools
import hashlib
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc

from tramontane.cluster.tokens import bearer_token

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class Users:
    """Tells users apart: by their bearer tokens where those are checked, else by the address that they call from.

    A user's name is a digest or an address. It is never logged.
    """

    def __init__(self) -> None:
        self._by_token = False

    def go_by_tokens(self) -> None:
        """Tokens are checked. (Where they are not, anybody could be as many users as it makes up tokens.)"""
        self._by_token = True

    def of(self, context: Context) -> str:
        """The user of a call whose token, if tokens are checked, has been found good."""
        token = None
        if self._by_token:
            token = bearer_token(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        return host_of(context.peer()) if token is None else hashlib.sha256(token.encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def host_of(peer: str) -> str:
    """gRPC's name for a peer without its port. Of IPv6 the first 64 bits, since who has one address has 2^64 of them.

    >>> [host_of(peer) for peer in ("ipv4:10.0.0.7:50123", "ipv6:%5B2001:db8::7%5D:50123", "unix:")]
    ['10.0.0.7', '2001:db8::/64', 'unix:']
    """
    place = unquote(peer).partition(":")[2]
    try:
        address = ip_address(place.rpartition(":")[0].strip("[]").partition("%")[0])
    except ValueError:
        return peer
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(IPv6Network((address, 64), strict=False) if mapped is None else mapped)
    return str(address)
