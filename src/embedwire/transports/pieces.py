"""Checks on what a caller hands to a wire, the same for every wire. Knows no wire. Called on the caller's
thread."""

from __future__ import annotations

from collections.abc import Sequence

from embedwire.errors import UsageError
from embedwire.transports.contract import Slice


def check_slice(pieces: Slice, region_bytes: int) -> None:
    """Raise UsageError unless every piece is contiguous and lies within a region of ``region_bytes``."""
    for piece in pieces:
        if not piece.source.c_contiguous:
            raise UsageError(
                f"the source for offset {piece.offset} is not contiguous: strides {piece.source.strides}"
            )
        check_span(piece.offset, piece.source.nbytes, region_bytes=region_bytes)


def check_spans(spans: Sequence[tuple[int, int]], region_bytes: int) -> None:
    """Raise UsageError unless every (offset, length) lies within a region of ``region_bytes``."""
    for offset, length in spans:
        check_span(offset, length, region_bytes=region_bytes)


def check_span(offset: int, length: int, *, region_bytes: int) -> None:
    if offset < 0 or length < 0 or offset + length > region_bytes:
        raise UsageError(f"bytes {offset} to {offset + length} are outside the region of {region_bytes}")


def check_ticket(ticket: int) -> None:
    """Raise UsageError for a number that can not name a permission."""
    if not 1 <= ticket < 2**63:
        raise UsageError(f"ticket {ticket} is outside 1 .. 2**63-1")


def check_sender_token(sender_token: int) -> None:
    """Raise UsageError for a number that can not name a sender."""
    if not 1 <= sender_token <= 2**62:
        raise UsageError(f"sender_token {sender_token} is outside 1 .. 2**62")
