"""The bytes beside a one-sided transport: its descriptor, and the answer on the connection that proves a sender's presence.

All numbers are little-endian. The sender greets (``transports.sockets``, magic "EWo1"), the receiver answers with the address of an engine
made for this session, and nothing else is ever sent. The sender's end of stream ends the session; the receiver's proves that it has ended::

    WELCOME  "EWp1"  nbytes: u32      then the engine's address

Used by both halves; nothing here blocks.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.sockets import NONCE_BYTES

HELLO = b"EWo1"
ADDRESS_BYTES_MAX = 32 * 1024
_WELCOME = struct.Struct("<4sI")
WELCOME_BYTES = _WELCOME.size
CPU = "cpu"


class Descriptor(msgspec.Struct, array_like=True, frozen=True, tag="onesided/1"):
    """Where the session listener is, its nonce, and the region behind it. ``device`` is "cpu", so far."""

    wire: str
    host: Annotated[str, msgspec.Meta(max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    device: Annotated[str, msgspec.Meta(max_length=64)]


def decode_descriptor(data: bytes, *, wire: str) -> Descriptor:
    """Raises TransportError when ``data`` is not a whole descriptor of that wire, or its memory is of a kind that we can not write."""
    try:
        found = msgspec.msgpack.decode(data, type=Descriptor)
    except msgspec.MsgspecError as error:
        raise TransportError(f"not a descriptor of the {wire} wire: {error}") from error
    if found.wire != wire:
        raise TransportError(f"a descriptor of the {found.wire!r} wire, not of {wire}")
    if found.device != CPU:
        raise TransportError(f"the region is on device {found.device!r}, and only {CPU!r} can be written")
    return found


def encode_welcome(address: bytes) -> bytes:
    return _WELCOME.pack(b"EWp1", len(address)) + address


def decode_welcome(data: bytes) -> int:
    """The bytes of the address that follows."""
    magic, nbytes = _WELCOME.unpack(data)
    if magic != b"EWp1" or nbytes > ADDRESS_BYTES_MAX:
        raise ProtocolViolation(f"an answer to a greeting reads {data!r}")
    return int(nbytes)
