"""Which network addresses a user may make us connect to. Pure: knows no socket and no request."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

PROTOCOL_V4 = IPv4Network("192.0.0.0/24")
"""IETF protocol assignments (RFC 6890), which older Pythons know in part only."""
GLOBAL_UNICAST = IPv6Network("2000::/3")
EMBEDS_V4_LAST = (IPv6Network("::/96"), IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""IPv6 addresses that stand for the IPv4 address in their last 32 bits: IPv4-compatible (RFC 4291) and NAT64
(RFC 6052, RFC 8215)."""


def is_public(address: str) -> bool:
    """Whether an address, in the form that ``getaddrinfo`` gives, belongs to the public internet.

    Not public: private, shared, loopback, link-local, multicast, reserved, unspecified and documentation
    addresses, and every IPv6 address that leads to such an IPv4 one. Raises ValueError when it is no address.
    """
    found = ip_address(address)
    if isinstance(found, IPv6Address):
        embedded = _embedded_v4(found)
        if embedded is None:
            return found in GLOBAL_UNICAST and found.is_global and not found.is_reserved
        found = embedded
    return found.is_global and not (found.is_multicast or found.is_reserved or found in PROTOCOL_V4)


def _embedded_v4(address: IPv6Address) -> IPv4Address | None:
    if address.ipv4_mapped:
        return address.ipv4_mapped
    if address.sixtofour:
        return address.sixtofour
    if any(address in network for network in EMBEDS_V4_LAST):
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return None
