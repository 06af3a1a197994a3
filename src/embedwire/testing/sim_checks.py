"""What has to hold in a simulated world after every event, and when all has come to rest. Changes nothing in it; one thread.

Each check yields what is wrong, in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from embedwire.protocol.messages import RoomKey
from embedwire.protocol.states import HOLDS_BLOCKS, Poll
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode
from embedwire.testing.sim_wire import InvariantBroken


class Checks:
    """Remembers what may only grow."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, RoomKey], tuple[Poll, tuple[int, ...]]] = {}

    def after_event(self, senders: Iterable[SenderNode], receivers: Iterable[ReceiverNode]) -> None:
        """Whatever holds at any time, of those nodes that have done something since. Raises InvariantBroken."""
        for sender in senders:
            if sender.has_moved and not sender.process.is_dead:
                _raise(sender.address, self._of_sender(sender))
                sender.has_moved = False
        for receiver in receivers:
            if receiver.has_moved and not receiver.process.is_dead:
                _raise(receiver.address, self._of_receiver(receiver))
                _raise(receiver.address, _of_blocks(receiver))
                receiver.has_moved = False

    def _of_sender(self, node: SenderNode) -> Iterator[str]:
        core, limits, used = node.core, node.setup.limits, node.budget.used_bytes
        if used > node.budget.limit_bytes:
            yield f"{used} bytes of source; the limit is {node.budget.limit_bytes}"
        if used != sum(node.totals[key] for key in core.rooms) * TOKEN_BYTES:
            yield f"{used} bytes of source are not what its rooms need"
        for queue, most in (
            (core.transfers, limits.rooms_max),
            (core.sessions, limits.sessions_max),
            (core._pending_opens, limits.pending_opens_max),
            (core._tombstones, limits.tombstones_max),
        ):
            if len(queue) > most:
                yield f"{len(queue)} where at most {most} are allowed"
        for key, room in core.transfers.items():
            progress = (room.sent_tokens, room.granted_tokens, len(room.rounds))
            yield from self._growth(node.process.incarnation, key, room.poll, progress)
            if not room.sent_tokens <= room.granted_tokens <= room.total_tokens:
                yield f"{key}: sent, granted, rounds: {progress}"

    def _of_receiver(self, node: ReceiverNode) -> Iterator[str]:
        core, used = node.core, node.budget.used_bytes
        if used > node.budget.limit_bytes:
            yield f"{used} bytes of assemblies; the limit is {node.budget.limit_bytes}"
        if used != sum(len(assembly) for assembly in node.assemblies.values()) * TOKEN_BYTES:
            yield f"{used} bytes are reserved, which is not what the assemblies take"
        if len(core.lanes.transfers) > node.setup.limits.rooms_max:
            yield f"{len(core.lanes.transfers)} rooms"
        for key, room in core.lanes.transfers.items():
            progress = (room.drained_tokens, room.draining_tokens, room.landed_tokens, room.granted_tokens)
            yield from self._growth(node.process.incarnation, key, room.poll, progress)
            if not progress[0] <= progress[1] <= progress[2] <= progress[3]:
                yield f"{key}: drained, draining, landed, granted: {progress}"

    def _growth(self, incarnation: int, key: RoomKey, poll: Poll, progress: tuple[int, ...]) -> Iterator[str]:
        life, now = (incarnation, key), (poll, progress)
        before, low = self._seen.setdefault(life, now)
        if before is poll and low == progress:
            return
        if poll is not Poll.FAILED and (before is Poll.FAILED or poll < before):
            yield f"{key}: poll {before!r}, then {poll!r}"
        if any(a > b for a, b in zip(low, progress, strict=True)):
            yield f"{key}: {low}, then {progress}"
        self._seen[life] = now


def _raise(address: str, problems: Iterator[str]) -> None:
    for problem in problems:
        raise InvariantBroken(f"{address}: {problem}")


def _of_blocks(node: ReceiverNode) -> Iterator[str]:
    """Each block that is not free is held by one room, and a room that waits for its turn holds none."""
    core, blocks = node.core, node.blocks
    blocks.check()
    granted = [b for room in core.lanes.transfers.values() for r in room.open_rounds for b in r.block_indices]
    doubted = [
        b for held in core.admission.quarantined.values() for r in held.rounds for b in r.block_indices
    ]
    if len(granted) != blocks.blocks_granted or len(doubted) != blocks.blocks_quarantined:
        yield f"rooms hold {len(granted)} blocks, quarantine {len(doubted)}: {blocks}"
    if len(set(granted + doubted)) != len(granted + doubted):
        yield f"a block is held twice: {sorted(granted + doubted)}"
    for room in core.admission.for_blocks:
        if room.open_rounds:
            yield f"{room.key} waits and holds blocks"
    for room in core.lanes.transfers.values():
        if bool(room.open_rounds) != (room.state in HOLDS_BLOCKS):
            yield f"{room.key} is {room.state.value} with {len(room.open_rounds)} open rounds"


def check_rest(senders: Iterable[SenderNode], receivers: Iterable[ReceiverNode]) -> None:
    """Nothing is due any more: every room has ended, and everything is where it was in the beginning."""
    for sender in senders:
        if not sender.process.is_dead:
            _raise(sender.address, _left_at_sender(sender))
    for receiver in receivers:
        if not receiver.process.is_dead:
            _raise(receiver.address, _left_at_receiver(receiver))


def _left_at_sender(node: SenderNode) -> Iterator[str]:
    core = node.core
    left = {
        "rooms": [*core.rooms, *core.transfers],
        "sessions": list(core.sessions),
        "opens": list(core._pending_opens),
        "requests": list(node.waiting),
        "bytes": node.budget.used_bytes,
        "timer": core.next_due(),
        "rooms offered without an end": sorted(node.offered - node.ends.keys()),
    }
    yield from (f"{what} left: {some}" for what, some in left.items() if some)


def _left_at_receiver(node: ReceiverNode) -> Iterator[str]:
    core, admission = node.core, node.core.admission
    left = {
        "rooms": [*core.rooms, *core.lanes.transfers],
        "sessions": list(core.lanes.sessions),
        "quarantine": list(core.admission.quarantined),
        "queues": [*core.coordinator.queue, *admission.for_blocks, *admission.for_more],
        "held": +admission.held,
        "bytes": node.budget.used_bytes,
        "assemblies": list(node.assemblies),
        "permits": sorted(node.memory.permits),
        "blocks": node.blocks.blocks_total - node.blocks.blocks_free,
        "timer": core.next_due(),
        "rooms opened without an end": sorted(node.opened - node.ends.keys()),
    }
    yield from (f"{what} left: {some}" for what, some in left.items() if some)
