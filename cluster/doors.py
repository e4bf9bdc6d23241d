"""Where links begin: the sockets that listen, and those that dial.

Unix sockets lie in a folder that only their owner may enter (abstract ones would be open to every user of the node).
TCP is for links between nodes.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from pathlib import Path

from tramontane.cluster.address import Address
from tramontane.cluster.private_folder import check_private

MAX_PATH_BYTES = 107
"""`sun_path` has 108 bytes, the last one zero."""
BACKLOG = 128
PEER = struct.Struct("iII")
"""The kernel's `struct ucred`: process, user and group."""
HEARTBEAT_PERIOD_S = 0.5
"""An idle link carries a heartbeat this often."""


def listen_unix(path: Path) -> socket.socket:
    """A listening unix socket. The folder is created if it is not there; what a dead process left behind is replaced.

    Raises:
        ValueError: the path is too long, its folder is not private, or somebody listens there.
    """
    name = os.fsencode(path)
    if len(name) > MAX_PATH_BYTES:
        raise ValueError(f"socket path {path} has {len(name)} bytes; the limit is {MAX_PATH_BYTES}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(path.parent)
    if path.is_socket():
        if not _is_dead(path):
            raise ValueError(f"somebody listens at {path} already")
        path.unlink()
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.bind(name)
        door.listen(BACKLOG)
    except BaseException:
        door.close()
        raise
    return door


def listen_tcp(host: str, port: int = 0) -> socket.socket:
    """A listening TCP socket on one of this node's addresses; port 0 takes a free one.

    Raises:
        ValueError: the host is not the address of one interface.
        OSError: the port is in use, or the address is not this node's.
    """
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        raise ValueError(f"link host is {host}; it must be the address of one interface, which others can dial")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def open_all(path: Path, host: str | None) -> list[socket.socket]:
    """The unix door and, where a host is given, the TCP one; see `listen_unix` and `listen_tcp`."""
    opened = [listen_unix(path)]
    try:
        if host is not None:
            opened.append(listen_tcp(host))
    except BaseException:
        path.unlink()
        opened[0].close()
        raise
    return opened


def address_of(opened: list[socket.socket], node: str) -> Address:
    """Where others dial these doors of `open_all`."""
    host, port = opened[1].getsockname()[:2] if len(opened) > 1 else ("", 0)
    return Address(node=node, unix_path=opened[0].getsockname(), host=host, port=port)


def dial(address: Address, node: str, timeout_s: float) -> socket.socket:
    """A connected socket with the time-out set.

    Raises:
        OSError: nobody listens there, or there is no door for this node.
    """
    way = address.way_from(node)
    if not isinstance(way, str):
        return socket.create_connection(way, timeout_s)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.settimeout(timeout_s)
        line.connect(way)
    except BaseException:
        line.close()
        raise
    return line


def check_peer(line: socket.socket) -> None:
    """Whoever is at the other end of a unix socket must be this process's user; of TCP the kernel cannot tell.

    Raises:
        PermissionError: it is another one; names both.
    """
    if is_tcp(line):
        return
    _pid, user, _group = PEER.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    if user != os.geteuid():
        raise PermissionError(f"the other end is user {user}, this one {os.geteuid()}")


def is_tcp(line: socket.socket) -> bool:
    """Whether it is a TCP socket, not a unix one."""
    return line.family != socket.AF_UNIX


def tune(line: socket.socket, silence_s: float) -> None:
    """Options of a connected TCP socket; nothing to do for a unix one.

    TCP itself must not give up a peer before we do: one that is stopped leaves its window shut, and after the kernel's
    own limit that would end the link.
    """
    if is_tcp(line):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(silence_s * 1000))


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fsencode(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:  # a full backlog, for one
            return False
        return False
