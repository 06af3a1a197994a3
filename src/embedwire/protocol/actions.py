"""The orders that the cores give to their drivers. A driver carries them out in order; results come back as events.

An order carries all that its execution needs, and nothing that the core still changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from embedwire.protocol.messages import Cause, Hello, Message, RoomKey, in_short

Peer: TypeAlias = int
"""A receiver as its sender knows it: its incarnation."""
Address: TypeAlias = str
"""A sender as its receivers know it: its control address."""


@dataclass(frozen=True, slots=True)
class Round:
    """One grant, as both sides know it: ``tokens`` tokens of the room, from ``start_token`` on, go into these blocks, in this order."""

    number: int
    start_token: int
    tokens: int
    block_indices: tuple[int, ...]
    ticket: int

    @property
    def end_token(self) -> int:
        return self.start_token + self.tokens

    def __repr__(self) -> str:
        tokens, blocks = f"{self.start_token}..{self.end_token}", in_short(self.block_indices)
        return f"<Round {self.number} tokens={tokens} blocks={blocks} ticket={self.ticket}>"


# Orders of a sender's core


@dataclass(frozen=True, slots=True)
class Reply:
    """Send ``message`` to a receiver."""

    peer: Peer
    message: Message


@dataclass(frozen=True, slots=True)
class Attach:
    """Reach the receiver's memory over the first of its wires that works; answer with ``on_attached`` or ``on_attach_failed``."""

    peer: Peer
    hello: Hello


@dataclass(frozen=True, slots=True)
class Detach:
    """The session is over: end its writes, close its wire."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Write:
    """Write ``round`` of the lane ``key``, but not its first ``landed_tokens``. Token 0 of the lane is row ``first_row`` of the room's
    source. Report with ``on_landed`` and, always, once, ``on_written``."""

    peer: Peer
    key: RoomKey
    round: Round
    landed_tokens: int = 0
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class CancelWrites:
    """Begin no further slice of this lane. Writes under way return as soon as they can; ``on_written`` is still called for each."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class Want:
    """A receiver asks for what is kept under the content hash ``item``, as the room ``key``: offer it, or fail the room."""

    key: RoomKey
    item: bytes


@dataclass(frozen=True, slots=True)
class LaneReport:
    """A lane of a sender's room that has ended. ``rounds`` are the tokens of each round."""

    key: RoomKey
    rounds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """The room has ended, with all its lanes, and nothing reads its source any more: free it, and report the end to its owner. ``lanes``
    are in the order in which they ended."""

    key: RoomKey
    cause: Cause
    detail: str
    lanes: tuple[LaneReport, ...]


# Orders of a receiver's core


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``message`` to the sender at ``address``."""

    address: Address
    message: Message


@dataclass(frozen=True, slots=True)
class Assemble:
    """The room's assembly is reserved: make it, of ``total_tokens`` rows. ``aux`` is the room's."""

    key: RoomKey
    total_tokens: int
    aux: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True, slots=True)
class Permit:
    """A grant of the lane ``key`` is about to be sent: let writes under the round's ticket reach its blocks, over the wire ``wire``."""

    key: RoomKey
    wire: str
    round: Round


@dataclass(frozen=True, slots=True)
class Revoke:
    """End the permission of a ticket: its round is drained, or its lane has failed."""

    key: RoomKey
    ticket: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Copy tokens ``from_token`` .. ``to_token`` (counted in the lane) of ``round`` into the assembly, where token 0 of the lane is row
    ``first_row``; answer with ``on_drained``. ``is_last``: no token of the lane comes after these. Void once the round's ticket is
    revoked."""

    key: RoomKey
    round: Round
    from_token: int
    to_token: int
    first_row: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class RoomReport:
    """How a room arrived at this rank. ``rounds`` are the tokens of each round, ``lane_tokens`` those of all lanes together. A dummy rank,
    which has no lanes, reports the total alone."""

    total_tokens: int
    aux: tuple[int, ...] = ()
    content_hash: bytes = b""
    rounds: tuple[int, ...] = ()
    lane_tokens: int = 0
    wire: str = ""
    source_ms: float = 0.0
    ready_at: float = 0.0
    granted_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The embedding is whole in its assembly, every byte checked, on every rank of the group. Its memory stays reserved until
    ``on_assembly_released(reservation)``. A key may recur, a reservation does not."""

    key: RoomKey
    report: RoomReport = field(compare=False, repr=False)
    reservation: int = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Failed:
    """The room ended without its embedding; its assembly is no longer written to."""

    key: RoomKey
    cause: Cause
    detail: str


@dataclass(frozen=True, slots=True)
class Heard:
    """The sender at ``address``, to which this receiver subscribes, keeps an item of ``tokens`` tokens now."""

    address: Address
    content_hash: bytes
    tokens: int


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Nothing was heard from ``address`` for long: the connection may be what is dead, and not the sender."""

    address: Address


@dataclass(frozen=True, slots=True)
class Hangup:
    """No room needs the connection to ``address`` any more."""

    address: Address


SenderAction: TypeAlias = Reply | Attach | Detach | Write | CancelWrites | Want | Release
ReceiverAction: TypeAlias = (
    Send | Assemble | Permit | Revoke | Drain | Finished | Failed | Heard | Reconnect | Hangup
)


# Events of a lane, for the room that it belongs to


@dataclass(frozen=True, slots=True)
class LaneAnnounced:
    """Its facts are new, or its source has become ready."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class LaneWhole:
    """All its tokens are in the assembly."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class LaneFailed:
    """It ended without."""

    key: RoomKey
    cause: Cause
    detail: str


LaneEvent: TypeAlias = LaneAnnounced | LaneWhole | LaneFailed
