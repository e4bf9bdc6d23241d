"""Which targets are accepted and which refused, before anything is connected."""

from __future__ import annotations

import pytest

from tramontane.client import AsyncClient, Client, ClientOptions, Tls
from tramontane.client.target import is_local


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("", "the target is empty"),
        ("  ", "the target is empty"),
        ("a host:1", "has a space in it"),
        ("http://127.0.0.1:50051", r"begins with http://; give HOST:PORT alone$"),
        ("https://a.example:443", r"begins with https://; give HOST:PORT alone and encrypt \(Tls\(\), --tls\)"),
        ("grpc://a.example:443", r"begins with grpc://"),
        ("dns://a.example:1", "write dns:///HOST:PORT, with three slashes"),
        ("127.0.0.1:70000", r"has the port '70000'; a port is a number in 1 \.\. 65535"),
        ("127.0.0.1:0", "has the port '0'"),
        ("127.0.0.1:-1", "has the port '-1'"),
        ("127.0.0.1:http", "has the port 'http'"),
        ("127.0.0.1:", "has the port ''"),
        ("127.0.0.1", "names no port; `tramontane serve` opens 50051"),
        (":50051", "names no host"),
        ("[]:50051", "names no host"),
        ("::1:50051", r"an IPv6 address stands in brackets, as \[::1\]:50051"),
        ("[::1:50051", "brackets"),
        ("127.0.0.1:50051/v1", "has a path"),
        ("a.example:1,b.example:1", "give their addresses, as ipv4:"),
        ("ipv4:a.example:1", "'a.example'|a.example|Expected 4 octets"),
        ("ipv4:127.0.0.1", "names no port"),
        ("ipv6:[::1]:1,[nonsense]:2", "At least 3 parts expected"),
        ("unix:", "names nothing after unix:"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_could_never_be_connected_is_refused(kind, target, says):
    with pytest.raises(ValueError, match=says):
        kind(target)


@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1:50051", "a.example:1", "[::1]:65535", "dns:///a.example:1", "dns://10.0.0.53/a.example:1"),
        *("dns:a.example:1", "ipv4:10.0.0.1:1,10.0.0.2:2", "ipv6:[fe80::1%eth0]:1", "unix:/run/t.sock", "xds:///a"),
    ],
)
def test_what_may_be_connected_is_taken(target):
    Client(target)


def test_encrypted_the_port_may_be_that_of_https():
    Client("a.example", ClientOptions(tls=Tls()))


def test_a_target_is_text():
    with pytest.raises(TypeError, match=r"the target must be text such as '127\.0\.0\.1:50051', not int"):
        Client(50051)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("127.0.0.1:50051", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("ipv6:[::1]:1,[::1]:2", True),
        ("dns:///localhost:1", True),
        ("unix:/run/t.sock", True),
        ("127.0.0.1.example:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.2:1", False),
        ("dns:///tramontane.example:1", False),
        ("0.0.0.0:1", False),
    ],
)
def test_what_is_local(target, local):
    assert is_local(target) is local
