"""What an endpoint tells about itself: frozen snapshots, taken on its driver's thread. Counters only rise."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SenderStats:
    """``rooms`` counts rooms by state, ``ended`` by cause since the start; ``sessions`` are receivers attached."""

    rooms: Mapping[str, int]
    ended: Mapping[str, int]
    sessions: int
    rounds_total: int
    bytes_total: int
    memory_reserved_bytes: int
    memory_limit_bytes: int
    frames_refused_total: int


@dataclass(frozen=True, slots=True)
class ReceiverStats:
    """``rooms`` counts rooms by state, ``ended`` by cause since the start; ``waiting`` the queues for assembly and for blocks."""

    rooms: Mapping[str, int]
    ended: Mapping[str, int]
    waiting: Mapping[str, int]
    sessions: int
    rounds_total: int
    bytes_total: int
    blocks_total: int
    blocks_free: int
    blocks_granted: int
    blocks_quarantined: int
    memory_reserved_bytes: int
    memory_limit_bytes: int
    frames_refused_total: int
    turns_total: int = 0
    """Agreement steps of this rank's group, each with at most one collective."""


@dataclass(frozen=True, slots=True)
class SendReport:
    """How a room went, as its sender saw it. ``rounds`` are tokens a round."""

    total_tokens: int
    rounds: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class ReceiveReport:
    """How a room went, as its receiver saw it. ``rounds`` are tokens a round, ``bytes`` those that came to this rank over the wire.
    A dummy rank, which maps another one's assembly, sees none of either. ``readers``: ranks of the group that have received as much.

    ``source_ms`` is how long the sender needed to make the source;
    ``transfer_ms`` goes from the first grant to the last byte checked, ``wait_ms`` from the announced source to the first grant."""

    total_tokens: int
    rounds: tuple[int, ...] = ()
    bytes: int = 0
    transport: str = ""
    source_ms: float = 0.0
    wait_ms: float = 0.0
    transfer_ms: float = 0.0
    content_hash: builtins.bytes = b""
    readers: int = 1
