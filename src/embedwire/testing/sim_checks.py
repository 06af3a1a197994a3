"""What has to hold in a simulated world after every event, and when all has come to rest. Changes nothing; one thread."""

from __future__ import annotations

from collections.abc import Iterable

from embedwire.protocol.messages import RoomKey
from embedwire.protocol.states import HOLDS_BLOCKS, Poll
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_nodes import InvariantBroken, ReceiverNode, SenderNode


def hold(condition: bool, problem: str) -> None:
    """Raise InvariantBroken unless the condition holds."""
    if not condition:
        raise InvariantBroken(problem)


class Checks:
    """Remembers what may only grow."""

    def __init__(self) -> None:
        self._polls: dict[tuple[int, RoomKey], Poll] = {}
        self._progress: dict[tuple[int, RoomKey], tuple[int, ...]] = {}

    def after_event(self, senders: Iterable[SenderNode], receivers: Iterable[ReceiverNode]) -> None:
        """Whatever holds at any time."""
        for sender in senders:
            if not sender.process.is_dead:
                self._check_sender(sender)
        for receiver in receivers:
            if not receiver.process.is_dead:
                self._check_receiver(receiver)

    def _check_sender(self, node: SenderNode) -> None:
        core, limits, budget = node.core, node.setup.limits, node.budget
        hold(budget.used_bytes <= budget.limit_bytes, f"{node.address}: {budget.used_bytes} bytes of source")
        need = sum(room.total_tokens for room in core.rooms.values()) * TOKEN_BYTES
        hold(budget.used_bytes == need, f"{node.address}: reserved {budget.used_bytes}, rooms need {need}")
        hold(len(core.rooms) <= limits.rooms_max, f"{node.address}: {len(core.rooms)} rooms")
        hold(len(core._pending_opens) <= limits.pending_opens_max, f"{node.address}: too many opens wait")
        hold(len(core._tombstones) <= limits.tombstones_max, f"{node.address}: too many tombstones")
        hold(len(core.sessions) <= limits.sessions_max, f"{node.address}: {len(core.sessions)} sessions")
        for key, room in core.rooms.items():
            progress = (room.sent_tokens, room.granted_tokens, len(room.rounds))
            self._only_grows(node.process.incarnation, key, room.poll, progress)
            hold(room.sent_tokens <= room.granted_tokens <= room.total_tokens, f"{key}: {progress}")

    def _check_receiver(self, node: ReceiverNode) -> None:
        node.blocks.check()
        self._check_blocks(node)
        core, budget = node.core, node.budget
        hold(len(core.rooms) <= node.setup.limits.rooms_max, f"{node.address}: {len(core.rooms)} rooms")
        hold(budget.used_bytes <= budget.limit_bytes, f"{node.address}: {budget.used_bytes} bytes of assembly")
        held = sum(len(a) for a in node.assemblies.values()) * TOKEN_BYTES
        hold(held == budget.used_bytes, f"{node.address}: assemblies of {held}, reserved {budget.used_bytes}")
        for key, room in core.rooms.items():
            progress = (room.landed_tokens, room.draining_tokens, room.drained_tokens, room.granted_tokens)
            self._only_grows(node.process.incarnation, key, room.poll, progress)
            hold(room.drained_tokens <= room.landed_tokens <= room.granted_tokens, f"{key}: {progress}")

    def _check_blocks(self, node: ReceiverNode) -> None:
        """Each block that is not free is held by one room, and a room that waits for its turn holds none."""
        core = node.core
        granted = [b for room in core.rooms.values() for r in room.open_rounds for b in r.block_indices]
        doubted = [b for held in core.quarantine.values() for r in held.rounds for b in r.block_indices]
        hold(len(granted) == node.blocks.blocks_granted, f"{node.address}: {len(granted)} granted, {node.blocks}")
        hold(len(doubted) == node.blocks.blocks_quarantined, f"{node.address}: {len(doubted)} doubted, {node.blocks}")
        hold(len(set(granted + doubted)) == len(granted + doubted), f"{node.address}: a block twice")
        for room in (*core.admission.for_assembly, *core.admission.for_blocks):
            hold(not room.open_rounds, f"{node.address}: {room.key} waits and holds blocks")
        for room in core.rooms.values():
            hold(bool(room.open_rounds) == (room.state in HOLDS_BLOCKS), f"{room.key}: {room.state} and its blocks")

    def _only_grows(self, incarnation: int, key: RoomKey, poll: Poll, progress: tuple[int, ...]) -> None:
        life = (incarnation, key)
        before, low = self._polls.get(life, Poll.BOOTSTRAPPING), self._progress.get(life, (0,) * len(progress))
        hold(poll is Poll.FAILED or (before is not Poll.FAILED and before <= poll), f"{key}: {before!r}, then {poll!r}")
        hold(all(a <= b for a, b in zip(low, progress, strict=True)), f"{key}: {low}, then {progress}")
        self._polls[life], self._progress[life] = poll, progress


def check_rest(senders: Iterable[SenderNode], receivers: Iterable[ReceiverNode]) -> None:
    """Nothing is due any more: every room has ended, and everything is where it was in the beginning."""
    for sender in senders:
        if not sender.process.is_dead:
            hold(not sender.core.rooms, f"{sender.address}: rooms {list(sender.core.rooms)} have not ended")
            hold(not sender.waiting, f"{sender.address}: {len(sender.waiting)} rooms still wait for memory")
            hold(sender.budget.used_bytes == 0, f"{sender.address}: {sender.budget.used_bytes} bytes reserved")
            hold(not sender.core.sessions, f"{sender.address}: sessions are left")
            hold(sender.core.next_due() is None, f"{sender.address}: a timer burns")
    for receiver in receivers:
        if not receiver.process.is_dead:
            hold(not receiver.core.rooms, f"{receiver.address}: rooms {list(receiver.core.rooms)} have not ended")
            hold(not receiver.core.quarantine, f"{receiver.address}: quarantine {list(receiver.core.quarantine)}")
            free, total = receiver.blocks.blocks_free, receiver.blocks.blocks_total
            hold(free == total, f"{receiver.address}: {free} of {total} blocks are free")
            hold(receiver.budget.used_bytes == 0, f"{receiver.address}: {receiver.budget.used_bytes} bytes reserved")
            hold(not receiver.assemblies, f"{receiver.address}: assemblies are left")
            hold(not receiver.memory.permits, f"{receiver.address}: permits {receiver.memory.permits} are left")
            hold(receiver.core.next_due() is None, f"{receiver.address}: a timer burns")
            admission = receiver.core.admission
            queued = (*admission.for_assembly, *admission.for_blocks, *admission.for_more)
            hold(not queued, f"{receiver.address}: {len(queued)} rooms still queue")
