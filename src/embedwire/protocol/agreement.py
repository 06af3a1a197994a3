"""What the ranks of a group tell each other, and what they all conclude from it: ``poll_and_all_reduce`` as numbers.

A *turn* is one collective of fixed width. Every rank packs its facts about the same rooms in the same order into WIDTH numbers, and the
elementwise minimum over all ranks is what everybody goes by:

    turn, -turn, rooms, -rooms    they agree on what they talk about; else the minimum betrays it
    free_bytes                    of assembly memory, MIN: what any rank has not, none has
    poll                          MIN: the slowest decides, one failure fails all
    -total_tokens                 so that MIN is MAX: 0 on a rank that has not seen it, or is a dummy
    landed_tokens                 MIN over the ranks that receive data
    cause                         the same one on every rank, whoever failed first

A dummy rank contributes what changes no minimum. Where a rank is alone, or no other has anything to say, its own facts are the agreed
ones and no collective takes place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedwire.errors import EmbedwireError
from embedwire.limits import SLOTS_MAX, TOKENS_MAX
from embedwire.protocol.messages import Cause
from embedwire.protocol.states import Poll

NO_LIMIT = 2**62
"""The neutral element of free bytes."""
_HEADER = 5
_WORDS = 4
WIDTH = _HEADER + _WORDS * SLOTS_MAX
"""Numbers (int64) in one turn, whatever the number of rooms."""
_CAUSES = tuple(Cause)
_NO_CAUSE = len(_CAUSES)
_EMPTY = (Poll.SUCCESS, 0, TOKENS_MAX, _NO_CAUSE)


class DisagreementError(EmbedwireError):
    """The ranks were not at the same turn, or not with the same rooms: the group can not go on."""


@dataclass(frozen=True, slots=True)
class RoomFacts:
    """One room as one rank sees it, or as all do. ``cause`` is set when it has failed."""

    poll: Poll
    total_tokens: int
    landed_tokens: int
    cause: Cause | None = None


NEUTRAL = RoomFacts(Poll.SUCCESS, 0, TOKENS_MAX)
"""What a dummy rank says of a room."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one rank says in a turn, or what all agreed on. ``rooms``: at most SLOTS_MAX, in the group's order."""

    turn: int
    free_bytes: int
    rooms: tuple[RoomFacts, ...]


def pack(facts: Facts) -> list[int]:
    """WIDTH numbers."""
    count = len(facts.rooms)
    assert count <= SLOTS_MAX
    words = [facts.turn, -facts.turn, count, -count, facts.free_bytes]
    for room in facts.rooms:
        cause = _NO_CAUSE if room.cause is None else _CAUSES.index(room.cause)
        words += (room.poll, -room.total_tokens, room.landed_tokens, cause)
    for _ in range(SLOTS_MAX - count):
        words += _EMPTY
    return words


def agree(packed: Iterable[Sequence[int]]) -> list[int]:
    """What a MIN-collective makes of what all ranks have packed."""
    return [min(column) for column in zip(*packed, strict=True)]


def unpack(words: Sequence[int]) -> Facts:
    """The agreed facts. Raises DisagreementError."""
    turn, count = words[0], words[2]
    if words[1] != -turn or words[3] != -count:
        raise DisagreementError(
            f"ranks are at turns {turn} to {-words[1]}, with {count} to {-words[3]} rooms"
        )
    rooms = []
    for at in range(_HEADER, _HEADER + _WORDS * count, _WORDS):
        poll, total, landed, cause = words[at : at + _WORDS]
        rooms.append(RoomFacts(Poll(poll), -total, landed, _CAUSES[cause] if cause < _NO_CAUSE else None))
    return Facts(turn, words[4], tuple(rooms))
