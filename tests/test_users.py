"""Which user a call counts for."""

from __future__ import annotations

import pytest

from tramontane.cluster.users import host_of


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:50123", "10.0.0.7"),
        ("ipv4:10.0.0.7:50124", "10.0.0.7"),
        ("ipv6:%5B2001:db8:0:1::7%5D:50123", "2001:db8:0:1::/64"),
        ("ipv6:[2001:db8:0:1:ffff::8]:50123", "2001:db8:0:1::/64"),
        ("ipv6:%5B2001:db8:0:2::7%5D:50123", "2001:db8:0:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50123", "fe80::/64"),
        ("ipv6:%5B::ffff:10.0.0.7%5D:50123", "10.0.0.7"),
        ("unix:", "unix:"),
        ("", ""),
    ],
)
def test_an_address_is_one_user_whatever_its_port(peer, host):
    assert host_of(peer) == host
