"""The orders that the cores give to their drivers. A driver carries them out in order; results come back as events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from embedwire.protocol.messages import Cause, Hello, Message, RoomKey

if TYPE_CHECKING:
    from embedwire.protocol.receiver_core import Room

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
    """Write ``round``, but not its first ``landed_tokens``. Report with ``on_landed`` and, always, once, ``on_written``."""

    peer: Peer
    key: RoomKey
    round: Round
    landed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CancelWrites:
    """Begin no further slice of this room. Writes under way return as soon as they can; ``on_written`` is still called for each."""

    key: RoomKey


@dataclass(frozen=True, slots=True)
class Want:
    """A receiver asks for what is kept under the content hash ``item``, as the room ``key``: offer it, or fail the room."""

    key: RoomKey
    item: bytes


@dataclass(frozen=True, slots=True)
class Release:
    """The room is over and nothing reads its source any more: free it, and tell whoever offered it why."""

    key: RoomKey
    cause: Cause
    detail: str
    rounds: tuple[int, ...]


# Orders of a receiver's core


@dataclass(frozen=True, slots=True)
class Send:
    """Send ``message`` to the sender at ``address``."""

    address: Address
    message: Message


@dataclass(frozen=True, slots=True)
class Assemble:
    """The room's assembly is reserved: make it, of ``total_tokens`` rows."""

    key: RoomKey
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Permit:
    """A grant is about to be sent: let writes under the round's ticket reach its blocks."""

    address: Address
    round: Round


@dataclass(frozen=True, slots=True)
class Revoke:
    """End the permission of a ticket."""

    address: Address
    ticket: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Copy tokens ``from_token`` .. ``to_token`` (counted in the room) of ``round`` into the assembly; answer with ``on_drained``."""

    key: RoomKey
    round: Round
    from_token: int
    to_token: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The embedding is whole in its assembly, every byte checked, on every rank of the group. ``room`` is its story."""

    key: RoomKey
    room: Room | None = field(default=None, compare=False, repr=False)


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
