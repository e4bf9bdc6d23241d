"""Checks the address of a server before anything is tried: what could never connect is refused. Pure."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address

_SCHEME = re.compile(r"^(?P<scheme>dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):(//[^/]*/)?(?P<rest>.*)$")
_URL = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
_LOOPBACK = re.compile(r"^(localhost|127(\.\d+){3}|\[::1\]|\[::ffff:127(\.\d+){3}\])(:\d+)?$", re.IGNORECASE)
_MOST_PORT = 65535


def check(target: str, *, encrypted: bool) -> None:
    """Refuse what gRPC could not connect to, or would read as something else (of port 70000 it makes 4464).

    Raises:
        TypeError: the target is no text.
        ValueError: the target is wrong; the message says how, and what it may be.
    """
    if not isinstance(target, str):
        raise TypeError(f"the target must be text such as '127.0.0.1:50051', not {type(target).__name__}")
    if not target.strip():
        raise ValueError("the target is empty; it is an address such as 127.0.0.1:50051")
    if re.search(r"\s", target):
        raise ValueError(f"the target {target!r} has a space in it")
    url = _URL.match(target)
    scheme, rest = _split(target)
    if url and url["scheme"] != scheme:
        hint = " and encrypt (Tls(), --tls)" if url["scheme"] == "https" else ""
        raise ValueError(f"the target {target!r} begins with {url['scheme']}://; give HOST:PORT alone{hint}")
    if rest.startswith("//"):
        raise ValueError(f"the target {target!r} names no host; write {scheme}:///HOST:PORT, with three slashes")
    if scheme in ("dns", "ipv4", "ipv6"):
        numeric = scheme != "dns"
        for address in rest.split(",") if numeric else [rest]:
            try:
                host = _check_address(address, port_needed=numeric or not encrypted)
                if numeric:
                    (IPv4Address if scheme == "ipv4" else IPv6Address)(host.partition("%")[0])
            except AddressValueError as error:
                raise ValueError(f"the target {target!r}: {error}") from None
            except ValueError as error:
                raise ValueError(f"the target {target!r} {error}") from None
    elif not rest:
        raise ValueError(f"the target {target!r} names nothing after {scheme}:")


def is_local(target: str) -> bool:
    """Whether every address of the target is on this machine. Names other than localhost are not looked up.

    >>> [is_local(target) for target in ("127.0.0.1:50051", "ipv4:127.0.0.1:1,10.0.0.2:1", "dns:///localhost:50051")]
    [True, False, True]
    """
    scheme, rest = _split(target)
    return scheme.startswith("unix") or all(_LOOPBACK.match(address) for address in rest.split(","))


def _split(target: str) -> tuple[str, str]:
    match = _SCHEME.match(target)
    return (match["scheme"], match["rest"]) if match else ("dns", target)


def _check_address(address: str, *, port_needed: bool) -> str:
    """The host of `HOST:PORT`. Raises ValueError with a predicate of which the target is the subject."""
    if "/" in address:
        raise ValueError("has a path; give HOST:PORT alone")
    if "," in address:
        raise ValueError("has several hosts; give their addresses, as ipv4:10.0.0.1:50051,10.0.0.2:50051")
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", address)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
    elif address.count(":") > 1 or "[" in address or "]" in address:
        raise ValueError("is no HOST:PORT; an IPv6 address stands in brackets, as [::1]:50051")
    else:
        host, colon, port = address.partition(":")
        port = port if colon else None
    if not host:
        raise ValueError("names no host; it is HOST:PORT")
    if port is None:
        if port_needed:
            raise ValueError("names no port; `tramontane serve` opens 50051 if it is not told otherwise")
    elif not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= _MOST_PORT:
        raise ValueError(f"has the port {port!r}; a port is a number in 1 .. {_MOST_PORT}")
    return host
