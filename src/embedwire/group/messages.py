"""The messages between the ranks of a group. MessagePack, over a socket of their own; any thread.

rank r → rank 0                                      rank 0 → rank r
join          the rank is there                      begin_step  a step begins; the rooms to open before it
request_step  the rank has news                      reduce      every rank is ready: enter the collective, or take these words
ready         the rooms are open; its records        end         the group was closed, or a rank is lost
leave         the rank closes or has failed; why
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct

from embedwire.memory.shared import Handle
from embedwire.protocol.messages import RoomKey


class OfRoom(Struct, frozen=True, array_like=True):
    room: int
    attempt: int

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class Opened(OfRoom, frozen=True, array_like=True):
    """A room that was requested on rank 0: ``addresses`` of each encoder rank."""

    addresses: tuple[str, ...]


class Mapped(OfRoom, frozen=True, array_like=True):
    """The assembly of a room on the host of ``rank``, for the dummy ranks there."""

    rank: int
    handle: Handle


class Left(OfRoom, frozen=True, array_like=True):
    """Rank ``rank`` has no array of a room any more."""

    rank: int


class Records(Struct, frozen=True, array_like=True):
    """What ranks add to a step beside their facts: assemblies made since the last step, and assemblies left."""

    made: tuple[Mapped, ...] = ()
    left: tuple[Left, ...] = ()

    def __add__(self, other: Records) -> Records:
        return Records(self.made + other.made, self.left + other.left)


class OfRank(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    rank: int


class Join(OfRank, frozen=True, tag="join"):
    pass


class RequestStep(OfRank, frozen=True, tag="request_step"):
    """``step``: the last one that this rank has contributed to."""

    step: int


class Ready(OfRank, frozen=True, tag="ready"):
    """``is_neutral``: the rank's facts would change no minimum."""

    step: int
    records: Records
    is_neutral: bool


class Leave(OfRank, frozen=True, tag="leave"):
    detail: str


class BeginStep(Struct, frozen=True, tag_field="type", tag="begin_step"):
    step: int
    opened: tuple[Opened, ...]


class Reduce(Struct, frozen=True, tag_field="type", tag="reduce"):
    """``records`` of all ranks. ``words``: the agreed facts where rank 0's are, else empty, and a collective takes place."""

    records: Records
    words: tuple[int, ...] = ()


class End(Struct, frozen=True, tag_field="type", tag="end"):
    detail: str
    is_lost: bool


FromRank: TypeAlias = Join | RequestStep | Ready | Leave
FromLeader: TypeAlias = BeginStep | Reduce | End
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
decode_from_leader = msgspec.msgpack.Decoder(FromLeader).decode
