"""Where a process of the service listens, and how it is reached from another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """A listener's two addresses: a unix socket for its own node, TCP for others."""

    node: str
    unix_path: str
    """The unix socket; empty where there is none."""
    host: str
    port: int
    """TCP's port; 0 where the listener has no TCP."""

    def way_from(self, node: str) -> str | tuple[str, int]:
        """What a dialler on `node` connects to: the unix socket's path on the same node, else host and port.

        Raises:
            OSError: the listener cannot be reached from this node.
        """
        if self.unix_path and self.node == node:
            return self.unix_path
        if not self.port:
            raise OSError(f"node {self.node} has no TCP door for node {node}")
        return self.host, self.port


def host_port(host: str, port: int) -> str:
    """A host and a port as one text, IPv6 in brackets.

    >>> host_port("::1", 50051)
    '[::1]:50051'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
