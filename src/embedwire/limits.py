"""Bounds, defaults and time-outs, with their units in their names, and the relations between them.

Everything that says "at most", "at least" or "after how long" in this package stands here once. The relations at the
bottom are checked at import, so that a changed number can not silently contradict another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from embedwire.errors import ConfigurationError

PROTOCOL_VERSION = 4

AUX_WORDS = 16
"""int32 words of a room's aux row: [0] total tokens, [1] mrope position delta, the rest reserved (zero)."""
AUX_BYTES = AUX_WORDS * 4
AUX_TOTAL_TOKENS = 0
AUX_POSITION_DELTA = 1

ROOM_MAX = 2**63 - 1
ATTEMPT_MAX = 2**31 - 1
CONTENT_HASH_BYTES_MAX = 64
INCARNATION_MAX = 2**62 - 1
TOKENS_MAX = 2**31 - 1
"""The total travels in an int32 of aux."""

MESSAGE_BYTES_MAX = 4 * 2**20
"""A control message; a grant of a million blocks still fits."""
BLOCKS_MAX = 2**19
"""Blocks of one pool, so that a grant of all of them fits into a message (at most 5 bytes an index)."""
DETAIL_CHARS_MAX = 500
"""A cause's text for people is cut to this."""

LANES_MAX = 4096
"""Ways that one room takes at most: encoder ranks times language ranks that read from the wire."""
RANKS_MAX = 64
"""Ranks of one server."""
SLOTS_MAX = 256
"""Rooms that a group of ranks agrees on in one step; more take turns. It fixes the width of the collective."""
OPEN_ROUNDS_MAX = 16
"""Grants of one room that a sender keeps in mind at a time, whatever window the receiver chose."""

DEFAULT_BLOCK_SIZE = 128
DEFAULT_NUM_BLOCKS = 128
DEFAULT_ALLOCATE_TOKENS = 8192
DEFAULT_SOURCE_BYTES = 4 * 2**30
DEFAULT_ASSEMBLY_BYTES = 4 * 2**30

SLICE_BYTES = 3 * 2**18
"""A write goes out, is acknowledged and is drained in slices of about this size: the two sides overlap, and an abort waits for one. Less
than a megabyte, from where on glibc 2.36 copies in another way on AMD Zen, one that takes a fifth longer."""

RANK_START_S = 300.0
"""The ranks of a group have found each other and read their weights within this."""
RANK_STEP_S = 60.0
"""Within a step, no rank of a group waits longer than this for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Time-outs in seconds and bounds on queues. Both sides of a transfer need not use equal ones."""

    retry_s: float = 0.25
    """A receiver without an answer sends its current message again after this."""
    peer_silence_s: float = 5.0
    """A peer that has said nothing for this long, although it was asked, is lost."""
    open_wait_s: float = 30.0
    """An ``open`` for a room that nobody has offered yet, and an offer that nobody has opened yet, wait this long."""
    source_wait_s: float = 120.0
    """An announced room's source is ready within this."""
    blocks_wait_s: float = 120.0
    """A room gets its assembly, and then its blocks, within this."""
    round_s: float = 60.0
    """A round is written and drained within this of its last progress."""
    close_s: float = 30.0
    """A finished room tries to tell its peer so for this long; then it is forgotten (its quarantined blocks are not)."""
    write_timeout_s: float = 20.0
    """A write without progress for this long has an unknown outcome."""
    write_attempts_max: int = 3
    """A write that was lost is tried again under the same grant, up to this many times in all."""
    rooms_max: int = 4096
    """Rooms of one endpoint at a time; one more is refused."""
    sessions_max: int = 1024
    """Receivers that one sender talks to at a time."""
    pending_opens_max: int = 4096
    """``open`` messages that wait for their room to be offered."""
    tombstones_max: int = 16384
    """Ended rooms whose end is remembered, to answer a late message."""
    window_rounds: int = 2
    """Grants of one room that may be open at a time. 1 is stop-and-wait."""

    def __post_init__(self) -> None:
        for name, value in ((n, getattr(self, n)) for n in self.__dataclass_fields__):
            if value <= 0:
                raise ConfigurationError(f"{name} is {value}; it has to be above 0")
        if self.window_rounds > OPEN_ROUNDS_MAX:
            raise ConfigurationError(
                f"window_rounds is {self.window_rounds}; a sender keeps at most {OPEN_ROUNDS_MAX} in mind"
            )
        relations = (
            ("retry_s", "peer_silence_s", 4),  # several losses in a row are not a lost peer
            ("peer_silence_s", "round_s", 1),  # who is lost is found before the round's own deadline
            (
                "write_timeout_s",
                "round_s",
                1,
            ),  # a write has ended before its round does, so no lease ends under a write
            ("retry_s", "open_wait_s", 4),
            ("retry_s", "close_s", 4),
        )
        for small, large, times in relations:
            if getattr(self, small) * times > getattr(self, large):
                raise ConfigurationError(
                    f"{large} is {getattr(self, large)}; it has to be at least {times} × {small} ({getattr(self, small)})"
                )


DEFAULT_LIMITS = Limits()

assert BLOCKS_MAX * 5 + 4096 < MESSAGE_BYTES_MAX
assert AUX_BYTES == 64
