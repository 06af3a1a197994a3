"""The bytes of the tcp wire: building them and reading them. Knows no socket, no thread and no region.

All numbers are little-endian. A connection begins with the sender's greeting (``transports.sockets``, magic "EWh1"), answered by WELCOME.
Then the sender sends frames, each answered by one ACK in the same order::

    WELCOME  "EWw1"
    frame    "EWf1"  ticket: u64  number: u32  pieces: u32   then per piece  offset: u64  length: u64   then the bytes
    ACK      "EWa1"  ticket: u64  number: u32  verdict: u8   (1 landed, 2 refused: the ticket is not open)

Used by both halves of the wire; nothing here blocks.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from typing import Annotated

import msgspec

from embedwire.errors import ProtocolViolation, TransportError
from embedwire.transports.contract import Slice
from embedwire.transports.sockets import NONCE_BYTES

PIECES_MAX = 1024
FRAME_BYTES_MAX = 16 * 2**20
HELLO, WELCOME = b"EWh1", b"EWw1"
LANDED, REFUSED = 1, 2

_HEADER = struct.Struct("<4sQII")
_PIECE = struct.Struct("<QQ")
_ACK = struct.Struct("<4sQIB")
HEADER_BYTES, PIECE_BYTES, ACK_BYTES = _HEADER.size, _PIECE.size, _ACK.size

Run = tuple[memoryview, int]
"""Bytes to send, as a flat view, and the offset in the region where they go."""


class Descriptor(msgspec.Struct, array_like=True, frozen=True, tag="tcp/1"):
    """What a sender needs: where to connect, the secret to show there, and the size of the region."""

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, lt=2**16)]
    nonce: Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


def decode_descriptor(data: bytes) -> Descriptor:
    """Raises TransportError when ``data`` is not a whole descriptor of this wire and version."""
    try:
        return msgspec.msgpack.decode(data, type=Descriptor)
    except msgspec.MsgspecError as error:
        raise TransportError(f"not a descriptor of the tcp wire: {error}") from error


def split(pieces: Slice) -> Iterator[list[Run]]:
    """Cut a slice into what fits in one frame each: at least one, possibly empty. Empty pieces are left
    out."""
    batch: list[Run] = []
    room = FRAME_BYTES_MAX
    for piece in pieces:
        left, offset = memoryview(piece.source), piece.offset
        if not left.nbytes:
            continue
        left = left.cast("B")
        while left:
            if len(batch) == PIECES_MAX or not room:
                yield batch
                batch, room = [], FRAME_BYTES_MAX
            run, left = left[:room], left[room:]
            batch.append((run, offset))
            offset += len(run)
            room -= len(run)
    yield batch


def encode_frame(ticket: int, number: int, runs: list[Run]) -> list[memoryview]:
    """The buffers of a frame in the order in which they are sent. Copies no payload."""
    head = bytearray(_HEADER.pack(b"EWf1", ticket, number, len(runs)))
    for source, offset in runs:
        head += _PIECE.pack(offset, len(source))
    return [memoryview(head), *(source for source, _ in runs)]


def decode_header(data: bytes) -> tuple[int, int, int]:
    """(ticket, number, pieces). Raises ProtocolViolation for another magic or too many pieces."""
    magic, ticket, number, pieces = _HEADER.unpack(data)
    if magic != b"EWf1":
        raise ProtocolViolation(f"a frame began with {magic!r}")
    if pieces > PIECES_MAX:
        raise ProtocolViolation(f"a frame announced {pieces} pieces, the limit is {PIECES_MAX}")
    return ticket, number, pieces


def decode_table(data: bytes) -> list[tuple[int, int]]:
    """(offset, length) of each piece. Raises ProtocolViolation for an empty piece or too many bytes in
    all."""
    table: list[tuple[int, int]] = list(_PIECE.iter_unpack(data))
    total = sum(length for _, length in table)
    if total > FRAME_BYTES_MAX:
        raise ProtocolViolation(f"a frame announced {total} bytes, the limit is {FRAME_BYTES_MAX}")
    if not all(length for _, length in table):
        raise ProtocolViolation("a frame announced an empty piece")
    return table


def encode_ack(ticket: int, number: int, *, verdict: int) -> bytes:
    return _ACK.pack(b"EWa1", ticket, number, verdict)


def decode_ack(data: bytes) -> tuple[int, int, bool]:
    """(ticket, number, whether it landed)."""
    magic, ticket, number, verdict = _ACK.unpack(data)
    if magic != b"EWa1" or verdict not in (LANDED, REFUSED):
        raise ProtocolViolation(f"an answer reads {data!r}")
    return ticket, number, verdict == LANDED


def advance(buffers: deque[memoryview], nbytes: int) -> None:
    """Drop the first ``nbytes`` bytes of ``buffers``: they have been sent, or filled."""
    while nbytes:
        first = buffers.popleft()
        if nbytes < len(first):
            buffers.appendleft(first[nbytes:])
            return
        nbytes -= len(first)
