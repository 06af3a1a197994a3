"""The numbers by which ranks agree: what each packs, and what the minimum over all of them means.

In an agreement step every rank packs its facts about the same rooms, in the same order, into WIDTH numbers, and the elementwise minimum
over all ranks is what they act on:

    step, -step, rooms, -rooms    equal on every rank; else the minimum shows that they differ
    free_bytes                    of assembly memory, MIN: what one rank lacks, no rank uses
    poll                          MIN: the slowest decides, one failure fails all
    -total_tokens                 so that MIN is MAX: 0 on a rank that has not seen it, or is a dummy rank
    landed_tokens                 MIN over the ranks that receive data
    cause                         the same one on every rank, whichever failed first

The facts of a dummy rank change no minimum. Where no rank but one has facts of its own, these are the agreed ones, and no collective
takes place. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedwire.errors import EmbedwireError
from embedwire.limits import SLOTS_MAX, TOKENS_MAX
from embedwire.protocol.coordinator import RoomFacts
from embedwire.protocol.messages import Cause
from embedwire.protocol.states import Poll

NO_LIMIT = 2**62
"""The neutral element of free bytes."""
_HEADER = 5
_WORDS = 4
WIDTH = _HEADER + _WORDS * SLOTS_MAX
"""Numbers (int64) in one step, whatever the number of rooms."""
_CAUSES = tuple(Cause)
_NO_CAUSE = len(_CAUSES)
_EMPTY = (Poll.SUCCESS, 0, TOKENS_MAX, _NO_CAUSE)


class DisagreementError(EmbedwireError):
    """The ranks are at different steps, or have different rooms: the group ends."""


NEUTRAL = RoomFacts(Poll.SUCCESS, 0, TOKENS_MAX)
"""A dummy rank's facts of a room."""


@dataclass(frozen=True, slots=True)
class Facts:
    """One rank's facts in a step, or the agreed ones. ``rooms``: at most SLOTS_MAX, in the group's order."""

    step: int
    free_bytes: int
    rooms: tuple[RoomFacts, ...]


def pack(facts: Facts) -> list[int]:
    """WIDTH numbers."""
    count = len(facts.rooms)
    assert count <= SLOTS_MAX
    words = [facts.step, -facts.step, count, -count, facts.free_bytes]
    for room in facts.rooms:
        cause = _NO_CAUSE if room.cause is None else _CAUSES.index(room.cause)
        words += (room.poll, -room.total_tokens, room.landed_tokens, cause)
    for _ in range(SLOTS_MAX - count):
        words += _EMPTY
    return words


def agree(packed: Iterable[Sequence[int]]) -> list[int]:
    """The result of a MIN-collective over what all ranks have packed."""
    return [min(column) for column in zip(*packed, strict=True)]


def unpack(words: Sequence[int]) -> Facts:
    """The agreed facts. Raises DisagreementError."""
    step, count = words[0], words[2]
    if words[1] != -step or words[3] != -count:
        raise DisagreementError(
            f"ranks are at steps {step} to {-words[1]}, with {count} to {-words[3]} rooms"
        )
    rooms = []
    for at in range(_HEADER, _HEADER + _WORDS * count, _WORDS):
        poll, total, landed, cause = words[at : at + _WORDS]
        rooms.append(RoomFacts(Poll(poll), -total, landed, _CAUSES[cause] if cause < _NO_CAUSE else None))
    return Facts(step, words[4], tuple(rooms))
