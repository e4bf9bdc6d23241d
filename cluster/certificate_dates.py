"""The dates between which certificates are valid. Python's `ssl` tells them of authorities only.

A certificate is DER: each value is a tag, a length and its bytes. This module steps over the values before the two
dates without reading them:

    Certificate ::= SEQUENCE { tbsCertificate SEQUENCE { [0] version?, serialNumber, signature, issuer,
                               validity SEQUENCE { notBefore, notAfter }, ... }, ... }
"""

from __future__ import annotations

import binascii
import re
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

PEM = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
SEQUENCE, VERSION, UTC_TIME, GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


@dataclass(frozen=True)
class Validity:
    """The dates of one certificate, both inclusive."""

    not_before: datetime
    not_after: datetime

    def flaw(self, now: datetime) -> str:
        """What is wrong with the dates now, as a clause; empty where nothing is."""
        if now > self.not_after:
            return f"expired on {self.not_after:%Y-%m-%d at %H:%M} UTC"
        if now < self.not_before:
            return f"is not valid before {self.not_before:%Y-%m-%d at %H:%M} UTC"
        return ""


def validities(pem: bytes) -> list[Validity]:
    """The dates of each certificate in a PEM file, in order. Certificates that cannot be read are left out."""
    found = []
    for block in PEM.findall(pem.decode("ascii", "replace")):
        try:
            found.append(_validity(ssl.PEM_cert_to_DER_cert(block)))
        except (ValueError, IndexError, OverflowError, binascii.Error):
            continue
    return found


def _validity(der: bytes) -> Validity:
    certificate = _members(der)[0]
    fields = _members(_members(certificate[1])[0][1])
    validity = fields[4] if fields[0][0] == VERSION else fields[3]
    if validity[0] != SEQUENCE:
        raise ValueError(f"tag {validity[0]:#x} where the validity should be")
    not_before, not_after = (_time(tag, content) for tag, content in _members(validity[1]))
    return Validity(not_before, not_after)


def _members(content: bytes) -> list[tuple[int, bytes]]:
    """The values that follow one another in DER bytes, each with its tag."""
    members, start = [], 0
    while start < len(content):
        tag, size, begin = content[start], content[start + 1], start + 2
        if size >= 0x80:  # the low bits say how many bytes hold the length
            begin += size & 0x7F
            size = int.from_bytes(content[start + 2 : begin])
        start = begin + size
        if start > len(content):
            raise ValueError(f"a value ends {start - len(content)} bytes behind the last")
        members.append((tag, content[begin:start]))
    return members


def _time(tag: int, content: bytes) -> datetime:
    text = content.decode("ascii")
    if tag == UTC_TIME:  # years in two digits are 1950 to 2049
        text = ("20" if text < "5" else "19") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError(f"tag {tag:#x} where a time should be")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
