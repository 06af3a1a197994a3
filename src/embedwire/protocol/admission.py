"""Which room gets assembly memory next, and which gets blocks. Pure bookkeeping over first-in, first-out queues.

The order in which a room takes things is what keeps any number of rooms from waiting for each other in a ring: the encoder's memory first,
then the whole assembly (``AssemblyQueue``), then blocks (``Admission``; a room without an assembly is not there). A room in the block
queue holds no block, and one that was granted blocks can always drain, since its assembly is there. So a pool of one block moves any
number of rooms of any length.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
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


class Memory(Protocol):
    """The budget that assemblies are reserved from (``memory.budget``), in bytes."""

    @property
    def limit_bytes(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    def can_ever(self, nbytes: int) -> bool: ...
    def try_reserve(self, key: Hashable, nbytes: int) -> bool: ...
    def release(self, key: Hashable) -> bool: ...


class AssemblyQueue:
    """Rooms that wait for assembly memory of ``token_bytes`` per token, first come, first served."""

    def __init__(self, token_bytes: int) -> None:
        self._token_bytes = token_bytes
        self._tokens: dict[RoomKey, int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def __iter__(self) -> Iterator[RoomKey]:
        return iter(self._tokens)

    def join(self, key: RoomKey, total_tokens: int) -> None:
        """Queue a room. Harmless when it is queued already."""
        self._tokens.setdefault(key, total_tokens)

    def leave(self, key: RoomKey) -> None:
        """The room no longer waits. Harmless when it is not queued."""
        self._tokens.pop(key, None)

    def admit(self, free_bytes: int) -> list[tuple[RoomKey, int]]:
        """Remove the rooms whose whole assemblies fit, one after another, into ``free_bytes``; return each with its tokens."""
        admitted = []
        for key, tokens in list(self._tokens.items()):
            free_bytes -= tokens * self._token_bytes
            if free_bytes < 0:
                break
            del self._tokens[key]
            admitted.append((key, tokens))
        return admitted

    def clear(self) -> None:
        """Remove every room."""
        self._tokens.clear()


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
