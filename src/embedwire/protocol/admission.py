"""Who gets blocks, in which order. Pure bookkeeping over first-in, first-out queues.

The order in which a room takes things is what keeps any number of rooms from waiting for each other in a ring: the encoder's memory first,
then the whole assembly (``receiver_core``; a room without one is not here), then blocks. A room in the block queue holds no block, and one
that was granted blocks can always drain, since its assembly is there. So a pool of one block moves any number of rooms of any length.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from embedwire.protocol.actions import Address, Round
from embedwire.protocol.messages import RoomKey
from embedwire.protocol.receiver import ReceiverTransfer


class Blocks(Protocol):
    """The allocator of the receive pool (``memory.allocator``)."""

    @property
    def block_size(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_free(self) -> int: ...
    def blocks_for(self, tokens: int) -> int: ...
    def alloc_blocks(self, n: int) -> tuple[int, ...] | None: ...
    def free(self, indices: Sequence[int]) -> None: ...
    def quarantine(self, indices: Sequence[int], *, peer: int) -> None: ...
    def release_quarantine(self, indices: Sequence[int]) -> None: ...


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Rounds of a failed room that ``incarnation`` may still write to."""

    address: Address
    incarnation: int
    rounds: list[Round]


class Admission:
    """The queues for blocks, the blocks that each peer holds, and the rounds in quarantine."""

    def __init__(
        self,
        blocks: Blocks,
        *,
        default_allocate_tokens: int,
        window_rounds: int,
    ) -> None:
        self.blocks = blocks
        self.default_allocate_tokens = default_allocate_tokens
        self.window_rounds = window_rounds
        self.for_blocks: deque[ReceiverTransfer] = deque()
        self.for_more: deque[ReceiverTransfer] = deque()
        self.held: Counter[Address] = Counter()
        self.in_quarantine: Counter[Address] = Counter()
        self.quarantined: dict[RoomKey, Quarantined] = {}

    def join(self, room: ReceiverTransfer) -> None:
        """Queue a room whose assembly is there."""
        self.for_blocks.append(room)

    def leave(self, room: ReceiverTransfer) -> None:
        """The room waits for nothing any more."""
        for queue in (self.for_blocks, self.for_more):
            if room in queue:
                queue.remove(room)

    def rejoin(self, room: ReceiverTransfer) -> None:
        """A partial room, holding no block, wants more."""
        if room in self.for_more:
            self.for_more.remove(room)
        self.for_blocks.append(room)

    def next_grant(self, *, peers: int) -> tuple[ReceiverTransfer, tuple[int, ...]] | None:
        """The next room in turn with the blocks for its next round: as many as it wants or, if fewer are free, those."""
        for queue in (self.for_blocks, self.for_more):
            for room in queue:
                count = min(self._wanted(room), self._available(room.address, peers=peers))
                blocks = self.blocks.alloc_blocks(count) if count > 0 else None
                if blocks is not None:
                    queue.remove(room)
                    self.held[room.address] += len(blocks)
                    return room, blocks
        return None

    def want_more(self, room: ReceiverTransfer) -> None:
        """A room with open rounds: with a window, it may want another one besides."""
        if room.remaining_tokens and len(room.open_rounds) < self.window_rounds and room not in self.for_more:
            self.for_more.append(room)

    def _wanted(self, room: ReceiverTransfer) -> int:
        tokens, total = room.remaining_tokens, self.blocks.blocks_total
        most = total if self.blocks.blocks_for(tokens) <= total else max(1, total // self.window_rounds)
        if not room.round_sizes:
            tokens = min(tokens, self.default_allocate_tokens)
        return min(self.blocks.blocks_for(tokens), most)

    def _available(self, address: Address, *, peers: int) -> int:
        """One peer may not take the whole pool from others, and gets nothing while blocks of it are in quarantine."""
        if self.in_quarantine[address]:
            return 0
        total = self.blocks.blocks_total
        most = total if peers <= 1 else max(1, total - max(1, total // 4))
        return min(self.blocks.blocks_free, most - self.held[address])

    def give_back(self, address: Address, granted: Round) -> None:
        """A round's blocks are free: no write can land in them."""
        self.blocks.free(granted.block_indices)
        self.held[address] -= len(granted.block_indices)

    def quarantine(self, room: ReceiverTransfer, *, incarnation: int) -> None:
        """The rounds of a failed room may still be written to, by that incarnation of its sender."""
        for granted in room.quarantined:
            self.blocks.quarantine(granted.block_indices, peer=incarnation)
            self.in_quarantine[room.address] += len(granted.block_indices)
        self.quarantined[room.key] = Quarantined(room.address, incarnation, room.quarantined)

    def release(self, key: RoomKey) -> Quarantined:
        """Proof has come that no write can land in what a room left behind."""
        left = self.quarantined.pop(key)
        for granted in left.rounds:
            self.blocks.release_quarantine(granted.block_indices)
            self.in_quarantine[left.address] -= len(granted.block_indices)
            self.held[left.address] -= len(granted.block_indices)
        return left
