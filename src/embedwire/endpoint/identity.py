"""The routing ids under which receivers' sockets are known to senders, and the keys and transports that both endpoints accept. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import ATTEMPT_MAX, ROOM_MAX
from embedwire.transports import built_in


def identity_of(incarnation: int, address: str) -> bytes:
    """The routing id of a receiver's socket: it begins with the receiver's incarnation, and differs for each ``address`` that the
    receiver knows a sender by, since one sender may have several."""
    return _prefix(incarnation) + hashlib.blake2b(address.encode(), digest_size=8).digest()


def is_of(identity: bytes, incarnation: int) -> bool:
    """Whether a routing id is one of that receiver's."""
    return identity.startswith(_prefix(incarnation))


def _prefix(incarnation: int) -> bytes:
    return b"R" + incarnation.to_bytes(8, "big")


def check_key(room: int, attempt: int) -> None:
    """Raise UsageError for what no message can name."""
    if not 0 <= room <= ROOM_MAX or not 0 <= attempt <= ATTEMPT_MAX:
        raise UsageError(
            f"room {room} attempt {attempt}: rooms go from 0 to {ROOM_MAX}, attempts from 0 to {ATTEMPT_MAX}"
        )


def chosen(transports: Sequence[str] | None) -> tuple[str, ...]:
    """The transports to offer, best first: the built-in ones where none are given. Raises ConfigurationError for an empty list."""
    names = built_in() if transports is None else tuple(transports)
    if not names:
        raise ConfigurationError("an endpoint needs at least one transport")
    return names
