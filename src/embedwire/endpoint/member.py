"""What a receiver leaves to its group of ranks: the seam between ``endpoint.receiver`` and ``embedwire.group``.

The methods are called on the driver's thread, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from embedwire.endpoint.event_loop import EventLoop
from embedwire.endpoint.reception import MakeAssembly, Receptions
from embedwire.memory.budget import Budget
from embedwire.memory.layout import Layout
from embedwire.protocol.actions import Address, Assemble, Finished
from embedwire.protocol.coordinator import Coordinator, Decision, LocalCoordinator
from embedwire.protocol.messages import Cause, RoomKey
from embedwire.protocol.topology import RankGroup


@dataclass(frozen=True, slots=True)
class ReceiverParts:
    """What a member uses of its receiver. The functions are called on the thread of ``loop``.

    ``open_now`` opens a room on this rank, with the content hash of an item or none, ``decide`` carries out what the coordinator has
    decided, ``end_all`` ends every room."""

    layout: Layout
    loop: EventLoop
    budget: Budget
    receptions: Receptions
    open_now: Callable[[RoomKey, Sequence[Address], bytes], None]
    decide: Callable[[Sequence[Decision]], None]
    end_all: Callable[[Cause, str], None]


class Member:
    """A receiver that is alone. A rank of a group overrides the methods (``group.member``)."""

    coordinator: Coordinator
    """That of the receiver's core."""
    steps_total = 0
    """Agreement steps so far."""

    def __init__(self, receiver: ReceiverParts) -> None:
        self._receiver = receiver
        self.coordinator = LocalCoordinator(receiver.budget, token_bytes=receiver.layout.token_bytes)

    def start(self) -> None:
        """The receiver's loop runs. Not on the driver's thread."""

    def check_open(self) -> None:
        """Raise UsageError or TransferError where no room may be opened."""

    def open(self, key: RoomKey, addresses: Sequence[Address], item: bytes) -> None:
        """Open a room, on every rank."""
        self._receiver.open_now(key, addresses, item)

    def withdraw(self, key: RoomKey) -> bool:
        """The room is no longer needed. False when it is open already, and has to be aborted."""
        return False

    def on_actions(self) -> None:
        """The core's actions were carried out."""

    def assembly_of(self, order: Assemble) -> MakeAssembly | None:
        """How to make the assembly of a room; None: as the caller of ``open`` chose."""
        return None

    def finish(self, finished: Finished) -> None:
        """Deliver a room."""
        self._receiver.receptions.deliver(finished)

    def fail(self, key: RoomKey) -> None:
        """A room has ended without its embedding."""

    def left(self, key: RoomKey) -> None:
        """The last array of a room was collected."""

    def close(self) -> None:
        """Leave the group. Not on the driver's thread. Idempotent."""


class RankPlace(Protocol):
    """The place of one rank in a group (``group.RankConfig``)."""

    @property
    def group(self) -> RankGroup: ...
    @property
    def rank(self) -> int: ...
    def join(self, receiver: ReceiverParts) -> Member:
        """Make the member of the group that the receiver is. It starts when the receiver runs."""
        ...
