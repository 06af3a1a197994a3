"""What the ranks of a group say to each other about their turns. MessagePack, over a socket of their own; any thread.

rank r → rank 0                                    rank 0 → rank r
join      I am here                                turn   the next one begins; rooms that were opened
news      I want a turn                            go     all are there: enter the collective, or what is agreed; assemblies
present   I have opened them; assemblies made      end    the group is closed, or lost
leave     I close, or have failed; why
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct

from embedwire.memory.shared import Handle
from embedwire.protocol.messages import RoomKey


class Opened(Struct, frozen=True, array_like=True):
    """A room that rank 0 was asked for: ``addresses`` of each encoder rank."""

    room: int
    attempt: int
    addresses: tuple[str, ...]

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class Mapped(Struct, frozen=True, array_like=True):
    """The assembly of a room on the host of ``rank``, for the dummy ranks there."""

    room: int
    attempt: int
    rank: int
    handle: Handle

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class Left(Struct, frozen=True, array_like=True):
    """Rank ``rank`` has no array of a room any more."""

    room: int
    attempt: int
    rank: int

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt)


class Aside(Struct, frozen=True, array_like=True):
    """What ranks tell each other in a turn beside the facts: assemblies made since the last one, and assemblies left."""

    made: tuple[Mapped, ...] = ()
    left: tuple[Left, ...] = ()

    def __add__(self, other: Aside) -> Aside:
        return Aside(self.made + other.made, self.left + other.left)


class Said(Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    rank: int


class Join(Said, frozen=True, tag="join"):
    pass


class News(Said, frozen=True, tag="news"):
    turn: int


class Present(Said, frozen=True, tag="present"):
    turn: int
    aside: Aside
    is_silent: bool


class Leave(Said, frozen=True, tag="leave"):
    detail: str


class Turn(Struct, frozen=True, tag_field="type", tag="turn"):
    number: int
    opened: tuple[Opened, ...]


class Go(Struct, frozen=True, tag_field="type", tag="go"):
    aside: Aside
    words: tuple[int, ...] = ()


class End(Struct, frozen=True, tag_field="type", tag="end"):
    detail: str
    is_lost: bool


FromRank: TypeAlias = Join | News | Present | Leave
FromLeader: TypeAlias = Turn | Go | End
decode_of_rank = msgspec.msgpack.Decoder(FromRank).decode
decode_of_leader = msgspec.msgpack.Decoder(FromLeader).decode
