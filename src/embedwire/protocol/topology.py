"""Who sends what to whom, for any number of encoder ranks and any number of language ranks. Pure arithmetic.

Some ranks of a language group read from the wire: the *readers*. Delivery ``replicate`` makes every rank one; ``share`` only the first
rank of each host, whose assembly the others on that host map. The ranks that are no readers are *dummy ranks*, by topology alone.

Put the encoder ranks side by side on a line from 0 to 1, and the readers on another. Whoever overlaps there is joined by a *lane*. So
every reader has a sender and every encoder rank a reader, whichever number is larger and whether one divides the other or not, and nobody
is spare. The senders of one reader share its room out among themselves, in contiguous parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from embedwire.errors import ConfigurationError
from embedwire.limits import LANES_MAX

Delivery = Literal["replicate", "share"]


@dataclass(frozen=True, slots=True)
class Lane:
    """The way of a room from encoder rank ``sender`` to the reader of index ``reader``: part ``part`` of ``parts``."""

    number: int
    sender: int
    reader: int
    part: int
    parts: int

    def share(self, total_tokens: int) -> range:
        """The tokens of a room that take this way. Never none: where there are fewer tokens than parts, two lanes carry the same one."""
        start = total_tokens * self.part // self.parts
        return range(start, max(start + 1, total_tokens * (self.part + 1) // self.parts))


ONLY_LANE = Lane(0, 0, 0, 0, 1)
"""Where each side is a single rank."""


def lanes(*, senders: int, readers: int) -> Iterator[Lane]:
    """All lanes between so many encoder ranks and so many readers, reader by reader. Raises ConfigurationError for none or too many."""
    if senders < 1 or readers < 1 or senders * readers > LANES_MAX:
        raise ConfigurationError(
            f"{senders} encoder ranks and {readers} readers: each at least 1, their product at most {LANES_MAX}"
        )
    for reader in range(readers):
        first, last = reader * senders // readers, -(-(reader + 1) * senders // readers)
        for sender in range(first, last):
            yield Lane(sender * readers + reader, sender, reader, sender - first, last - first)


@lru_cache
def lanes_of_sender(sender: int, *, senders: int, readers: int) -> tuple[Lane, ...]:
    """The lanes that begin at one encoder rank, in order of readers."""
    return tuple(lane for lane in lanes(senders=senders, readers=readers) if lane.sender == sender)


@lru_cache
def lanes_of_reader(reader: int, *, senders: int, readers: int) -> tuple[Lane, ...]:
    """The lanes that end at one reader, in order of parts."""
    return tuple(lane for lane in lanes(senders=senders, readers=readers) if lane.reader == reader)


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks of one language server. ``hosts`` names each rank's host."""

    hosts: tuple[str, ...]
    delivery: Delivery = "share"

    @classmethod
    def on_one_host(cls, size: int, *, delivery: Delivery = "share") -> RankGroup:
        """``size`` ranks on this host. Raises ConfigurationError for none."""
        if size < 1:
            raise ConfigurationError(f"a group of {size} ranks; it has to be at least 1")
        return cls(("",) * size, delivery)

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def readers(self) -> tuple[int, ...]:
        """The ranks that receive from the wire, in order."""
        return tuple(rank for rank in range(self.size) if self.source_of(rank) == rank)

    def source_of(self, rank: int) -> int:
        """The rank whose assembly this one reads: itself, or the first rank of its host."""
        return rank if self.delivery == "replicate" else self.hosts.index(self.hosts[rank])

    def is_dummy(self, rank: int) -> bool:
        """Whether a rank receives nothing from the wire."""
        return self.source_of(rank) != rank

    def lanes_to(self, rank: int, *, senders: int) -> tuple[Lane, ...]:
        """The lanes that end at a rank: none for a dummy rank."""
        return _lanes_to(self, rank, senders)


@lru_cache
def _lanes_to(group: RankGroup, rank: int, senders: int) -> tuple[Lane, ...]:
    if group.is_dummy(rank):
        return ()
    readers = group.readers
    return lanes_of_reader(readers.index(rank), senders=senders, readers=len(readers))


ALONE = RankGroup(("",))
"""A language server of one rank."""


def delivery_table(pairs: Sequence[tuple[int, int]]) -> list[tuple[str, str, str]]:
    """For the docs: (encoder ranks, readers) and who sends which part to whom, and how many lanes an encoder rank has at most."""
    rows = []
    for senders, readers in pairs:
        all_lanes = list(lanes(senders=senders, readers=readers))
        words = [
            f"{reader} ← "
            + ", ".join(
                f"{lane.sender}" + (f" ({lane.part + 1}/{lane.parts})" if lane.parts > 1 else "")
                for lane in all_lanes
                if lane.reader == reader
            )
            for reader in range(readers)
        ]
        busiest = max(sum(lane.sender == sender for lane in all_lanes) for sender in range(senders))
        rows.append((f"{senders} → {readers}", "; ".join(words), str(busiest)))
    return rows
