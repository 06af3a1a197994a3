"""Old faults put back one at a time: the simulation has to see each. A simulation that sees nothing proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from embedwire.errors import EmbedwireError
from embedwire.group.agreement import NEUTRAL, Facts, pack, unpack
from embedwire.group.coordinator import GroupCoordinator
from embedwire.limits import Limits
from embedwire.memory.allocator import BlockAllocator
from embedwire.protocol.actions import Drain, Want
from embedwire.protocol.admission import Admission
from embedwire.protocol.handshake import ReceiverSession
from embedwire.protocol.messages import Announce, Cause, Grant, Hello, Init, Message, Open, Status
from embedwire.protocol.receiver import ReceiverTransfer
from embedwire.protocol.receiver_core import Room
from embedwire.protocol.receiver_lanes import ReceiverLanes
from embedwire.protocol.sender import SenderTransfer
from embedwire.protocol.sender_core import SenderCore
from embedwire.protocol.states import Poll, SenderEvent, SenderState
from embedwire.testing import sim_group
from embedwire.testing.sim_link import delay
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.simulation import ONE_SIDED, Weather, WireFaults, World

Patch = pytest.MonkeyPatch

# ---------------------------------------------------------------------- worlds, all well unless a fault is in


def two_rounds() -> None:
    """2000/1024, B 128; every status and grant comes twice."""
    world = World(limits=Limits(window_rounds=1))
    sender = world.add_sender()
    world.add_receiver(default_allocate_tokens=1024, num_blocks=8)
    world.link.rules += [delay(Status, 0.001, 0.003), delay(Grant, 0.001, 0.004)]
    transfer = world.request(7, 2000)
    world.settle()
    assert transfer.is_done
    assert transfer.rounds == (1024, 976)
    assert len(sender.writes) == 2


def losses() -> None:
    """A third of all messages is lost."""
    world = World(2, weather=Weather(loss=0.33))
    world.add_sender()
    world.add_receiver()
    transfers = [world.request(room, 500) for room in range(1, 9)]
    world.settle()
    assert all(t.is_done for t in transfers)


def crowd() -> None:
    """40 rooms of two encoders crowd a one-sided pool of 6 blocks, clients leave in mid-write, and drains come late."""
    world = World(3, weather=Weather(delay_s=(0.02, 0.1)))
    senders = [
        world.add_sender(f"encoder-{i}", faults=WireFaults(slice_tokens=100, slice_s=(0.01, 0.3)))
        for i in (1, 2)
    ]
    receiver = world.add_receiver(num_blocks=6, default_allocate_tokens=128, wire=ONE_SIDED)
    transfers = [world.request(room, 400 + room, sender=senders[room % 2]) for room in range(1, 41)]
    for half_seconds in range(1, 15):
        world.after(
            half_seconds / 2,
            lambda: [receiver.abort(w.running) for s in senders for w in s.wires.values() if w.running],
        )
    world.settle()
    assert sum(t.is_done for t in transfers) >= 10


def lease() -> None:
    """A slice takes longer than its round may; other rooms wait for the blocks, and drain them late."""
    world = World(limits=Limits(round_s=6.0, write_timeout_s=6.0))
    slow = world.add_sender("encoder-1", faults=WireFaults(slice_s=(30.0, 30.0)))
    quick = world.add_sender("encoder-2", faults=WireFaults(slice_s=(0.1, 0.1), slice_tokens=512))
    world.add_receiver(num_blocks=4, wire=ONE_SIDED)
    world.link.rules.append(delay(Status, 4.0))
    transfer = world.request(1, 384, sender=slow)
    world.run_until(lambda: bool(slow.writes))
    for room in range(2, 20):
        world.request(room, 4 * 128, sender=quick, open_after_s=room * 1.0)
    world.settle()
    assert transfer.receiver_end is Cause.DEADLINE


def doubt() -> None:
    """A write comes back as unknown; afterwards the same encoder has to get through."""
    world = World()
    sender = world.add_sender(faults=WireFaults(in_doubt=1.0))
    world.add_receiver(wire=ONE_SIDED, num_blocks=8)
    world.request(1, 1000)
    world.run(for_s=1.0)
    sender.setup.faults.in_doubt = 0.0
    following = world.request(2, 1000)
    world.run(for_s=10.0)
    assert following.is_done


def restart() -> None:
    """An encoder dies in mid-round on a one-sided wire and is back at once."""
    world = World()
    sender = world.add_sender(faults=WireFaults(slice_s=(0.1, 0.1)))
    world.add_receiver(wire=ONE_SIDED, num_blocks=8)
    world.request(1, 1000)
    world.run(for_s=0.1)
    world.restart(sender)
    world.run(for_s=5.0)
    following = world.request(2, 1000)
    world.settle()
    assert following.is_done


def refusal() -> None:
    """The encoder's memory can never hold the room."""
    world = World()
    world.add_sender(source_bytes=10)
    world.add_receiver()
    transfer = world.request(1, 1000)
    world.run(for_s=1.0)
    assert transfer.receiver_end is Cause.NEVER_FITS


def frozen() -> None:
    """Encoder 1 freezes with grants while encoder 2 has nothing to do for the moment."""
    world = World()
    stuck, healthy = world.add_sender("encoder-1"), world.add_sender("encoder-2")
    world.add_receiver(num_blocks=8, wire=ONE_SIDED)
    world.request(100, 1000, sender=healthy)
    world.run(for_s=1.0)
    world.request(1, 5000, sender=stuck)
    world.run_until(lambda: bool(stuck.writes))
    stuck.process.freeze()
    following = world.request(101, 1000, sender=healthy)
    world.run(for_s=20.0)
    assert following.is_done
    stuck.process.wake()
    world.settle()


def ranks() -> None:
    """Three ranks with one place for an assembly each; rank 1's first grant is late, and rank 2 reads for long."""
    world = World()
    world.add_sender()
    group = world.add_group(size=3, assembly_bytes=1000 * TOKEN_BYTES, step_s=(0.0005, 0.2))
    group.nodes[2].setup = replace(group.nodes[2].setup, read_s=3.0)
    late = group.nodes[1].address
    world.link.rules.append(lambda e: (2.0,) if isinstance(e.message, Init) and e.origin == late else None)
    transfers = [world.request(room, 1000) for room in range(1, 5)]
    while world.step():
        assert len({key for node in group.nodes for key in node.assemblies}) <= 1
    world.settle()
    assert all(t.is_done for t in transfers)


def leaving() -> None:
    """All ranks have said that they have all of a room when its client leaves rank 0."""
    world = World()
    world.add_sender()
    group = world.add_group(size=3)
    transfer = world.request(1, 1000)
    world.run_until(
        lambda: any(
            len(s.contributed) == 3 and s.contributed[0].rooms[0].poll is Poll.SUCCESS for s in group.steps
        )
    )
    group.abort(transfer.key)
    world.settle()
    assert transfer.is_done


def dummies() -> None:
    """Ranks 1 and 3 are dummies; rank 2 is none, though it hears of the room late."""
    world = World()
    world.add_sender()
    group = world.add_group(size=4, delivery="share", hosts="aabb")
    late = group.nodes[2].address
    world.link.rules.append(
        lambda e: (2.0,) if isinstance(e.message, Announce) and e.destination == late else None
    )
    transfer = world.request(1, 1000)
    world.settle()
    assert transfer.is_done


def items() -> None:
    """Two readers fetch the same item and others over a link that loses and doubles; one wants what nobody keeps."""
    world = World(4, weather=Weather(loss=0.3, doubling=0.3))
    sender = world.add_sender(items={b"a": 500, b"b": 300}, source_bytes=500 * TOKEN_BYTES)
    readers = [world.add_receiver(f"language-{i}", num_blocks=2) for i in (1, 2)]
    transfers = [
        world.fetch(
            room, (b"a", b"b")[room % 2], (500, 300)[room % 2], sender=sender, receiver=readers[room % 4 // 2]
        )
        for room in range(1, 13)
    ]
    unknown = world.fetch(100, b"c", 1, sender=sender, receiver=readers[0])
    world.settle()
    assert all(t.is_done for t in transfers)
    assert unknown.receiver_end is Cause.UNKNOWN_ITEM


def subscribers() -> None:
    """One that has a room already and one that has none hear of each item once, and fetch it; also of those that are made minutes later,
    by another life of the encoder, after a cut."""
    world, made = World(limits=Limits(window_rounds=1)), (b"soon", b"late", b"anew", b"healed")
    sender = world.add_sender()
    readers = [world.add_receiver(f"language-{i}", num_blocks=2) for i in (1, 2)]
    transfers = [world.request(1, 100, receiver=readers[0])]
    world.on_heard = lambda reader, _, item, tokens: transfers.append(
        world.fetch(100 + len(transfers), item, tokens, sender=sender, receiver=reader)
    )
    world.run(for_s=1.0)
    for reader in readers:
        reader.subscribe(sender.address)
    for item in made:
        world.run(for_s=300.0)
        if item == b"anew":
            world.restart(sender)
            world.run(for_s=60.0)
        if item == b"healed":
            world.link.cut(sender.address, readers[0].address, for_s=200.0)
            world.run(for_s=260.0)
        world.keep(item, 700, sender=sender)
    world.run(for_s=60.0)
    for reader in readers:
        assert reader.heard == {(sender.address, item): 1 for item in made}
        reader.unsubscribe()
    world.settle()
    assert len(transfers) == 1 + 2 * len(made)
    assert all(t.receiver_end is Cause.DONE for t in transfers)


WORLDS = (
    two_rounds,
    losses,
    crowd,
    lease,
    doubt,
    restart,
    refusal,
    frozen,
    ranks,
    leaving,
    dummies,
    items,
    subscribers,
)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_all_is_well_without_faults(world: Callable[[], None]) -> None:
    """What the faults below break is whole."""
    world()


# ---------------------------------------------------------------------- the faults


def resume_is_stored_but_never_queued(patch: Patch) -> None:
    patch.setattr(Admission, "rejoin", lambda self, room: None)


def grant_announces_the_tokens_it_wants(patch: Patch) -> None:
    whole = ReceiverTransfer.grant_message

    def message(self: ReceiverTransfer, granted: Any, **more: Any) -> Message:
        told = whole(self, granted, **more)
        return type(told)(
            **{f: getattr(told, f) for f in told.__struct_fields__} | {"allocated_tokens": granted.tokens}
        )

    patch.setattr(ReceiverTransfer, "grant_message", message)


def aux_is_read_from_every_round(patch: Patch) -> None:
    whole = ReceiverLanes.on_drained

    def on_drained(self: ReceiverLanes, key: Any, to_token: int, **more: Any) -> Any:
        return whole(self, key, to_token, **(more | {"aux": more["aux"] or (0,) * 16}))

    patch.setattr(ReceiverLanes, "on_drained", on_drained)


def rounds_are_told_apart_by_their_blocks(patch: Patch) -> None:
    whole = SenderTransfer.on_grant

    def on_grant(self: SenderTransfer, grant: Grant, **more: Any) -> Any:
        if any(set(r.block_indices) >= set(grant.block_indices) for r in self.rounds):
            return None
        return whole(self, grant, **more)

    patch.setattr(SenderTransfer, "on_grant", on_grant)


def a_grant_that_comes_twice_is_written_twice(patch: Patch) -> None:
    whole = SenderTransfer.on_grant

    def on_grant(self: SenderTransfer, grant: Grant, **more: Any) -> Any:
        known = grant.round < len(self.rounds) and self.state is SenderState.WRITING
        return self.rounds[grant.round] if known else whole(self, grant, **more)

    patch.setattr(SenderTransfer, "on_grant", on_grant)


def half_of_what_is_configured_is_granted(patch: Patch) -> None:
    def wanted(self: Admission, room: ReceiverTransfer) -> int:
        return self.blocks.blocks_for(min(self.default_allocate_tokens // 2, room.total_tokens))

    patch.setattr(Admission, "_wanted", wanted)


def partial_is_success(patch: Patch) -> None:
    def rejoin(core: ReceiverLanes) -> Callable[..., None]:
        def finish(room: ReceiverTransfer) -> None:
            room.machine.state = next(s for s in type(room.state) if s.value == "filling")
            core._finish(room, 0.0)

        return finish

    whole = ReceiverLanes.__init__

    def init(self: ReceiverLanes, **more: Any) -> None:
        whole(self, **more)
        self.admission.rejoin = rejoin(self)  # type: ignore[method-assign]

    patch.setattr(ReceiverLanes, "__init__", init)


def blocks_are_kept_while_waiting_for_more(patch: Patch) -> None:
    patch.setattr(Admission, "give_back", lambda self, address, granted: None)


def nothing_is_asked_again(patch: Patch) -> None:
    whole = ReceiverLanes._on_room_due

    def once(self: ReceiverLanes, room: ReceiverTransfer, now: float) -> None:
        with patch.context() as silent:
            silent.setattr(self, "_ask", lambda room: None)
            whole(self, room, now)

    patch.setattr(ReceiverLanes, "_on_room_due", once)


def blocks_are_free_at_once_on_every_wire(patch: Patch) -> None:
    whole = ReceiverLanes._fail

    def fail(self: ReceiverLanes, room: ReceiverTransfer, *more: Any, **options: Any) -> None:
        self.sessions[room.address].is_fenced = True
        whole(self, room, *more, **options)

    patch.setattr(ReceiverLanes, "_fail", fail)


def the_end_is_told_before_writes_have_returned(patch: Patch) -> None:
    def settle(self: SenderCore, room: SenderTransfer) -> None:
        if room.state is SenderState.ENDING:
            self._end(room.peer or 0, room.key, *(room.end or (Cause.ABORTED, "")))
        if room.state is SenderState.ENDING and not room.writes_under_way:
            room.machine.step(SenderEvent.WRITES_RETURNED)
            self._forget(room)

    patch.setattr(SenderCore, "_settle", settle)


def a_doubt_lasts_for_ever(patch: Patch) -> None:
    patch.setattr(SenderCore, "on_doubt_ended", lambda self, peer, key: [])


def doubt_is_taken_for_loss(patch: Patch) -> None:
    def unknown(self: SenderCore, key: Any, number: int, detail: str, *, now: float) -> Any:
        room = self._write_returned(key)
        self._fail(room, Cause.WIRE_FAILED, detail, now)
        self._settle(room)
        return self._take()

    patch.setattr(SenderCore, "on_write_unknown", unknown)
    patch.setattr(SenderCore, "on_doubt_ended", lambda self, peer, key: [])


def quarantine_is_for_nobody(patch: Patch) -> None:
    whole = Admission.quarantine
    patch.setattr(
        Admission, "quarantine", lambda self, room, *, incarnation: whole(self, room, incarnation=0)
    )
    patch.setattr(ReceiverLanes, "suspects", lambda self: frozenset({0}))


def a_refusal_is_kept_secret(patch: Patch) -> None:
    whole = SenderCore.fail

    def fail(self: SenderCore, key: Any, *more: Any, **named: Any) -> Any:
        return whole(self, key, *more, **named) if key in self.rooms else []

    patch.setattr(SenderCore, "fail", fail)


def the_allocator_hands_out_what_is_in_use(patch: Patch) -> None:
    whole = BlockAllocator.alloc_blocks

    def alloc(self: BlockAllocator, n: int) -> Any:
        blocks = whole(self, n)
        return blocks and (0, *blocks[1:])

    patch.setattr(BlockAllocator, "alloc_blocks", alloc)


def one_peer_may_take_the_whole_pool(patch: Patch) -> None:
    whole = Admission.next_grant
    patch.setattr(Admission, "next_grant", lambda self, *, peers: whole(self, peers=1))


def a_drain_skips_what_came_late(patch: Patch) -> None:
    whole = ReceiverNode._drain

    def drain(self: ReceiverNode, order: Drain) -> None:
        whole(self, replace(order, from_token=min(order.from_token + 1, order.to_token)))

    patch.setattr(ReceiverNode, "_drain", drain)


def the_fastest_rank_decides(patch: Patch) -> None:
    def by_max(packed: Any) -> list[int]:
        said = [unpack(words) for words in packed]
        first = said[0]
        rooms = [max(each, key=lambda room: room.poll) for each in zip(*(f.rooms for f in said), strict=True)]
        return pack(Facts(first.step, min(f.free_bytes for f in said), tuple(rooms)))

    patch.setattr(sim_group, "agree", by_max)


def each_rank_admits_by_its_own_memory(patch: Patch) -> None:
    whole = GroupCoordinator._admit
    patch.setattr(GroupCoordinator, "_admit", lambda self, free_bytes: whole(self, self._free_bytes))


def what_was_contributed_may_be_taken_back(patch: Patch) -> None:
    whole = GroupCoordinator._decide

    def decide(self: GroupCoordinator, key: Any, room: Any, agreed: Any) -> Any:
        has_failed_since = room.facts.poll is Poll.FAILED and agreed.poll is Poll.SUCCESS
        return [] if has_failed_since else whole(self, key, room, agreed)

    patch.setattr(GroupCoordinator, "_decide", decide)


def who_has_seen_no_total_is_a_dummy(patch: Patch) -> None:
    whole = Room.facts
    patch.setattr(Room, "facts", lambda self: whole(self) if self.total_tokens else NEUTRAL)


def an_item_is_looked_for_at_each_question(patch: Patch) -> None:
    whole = SenderCore._on_unknown_room

    def on_unknown_room(self: SenderCore, message: Any, peer: int, now: float) -> None:
        known = message.key in self._pending_opens
        whole(self, message, peer, now)
        if known and isinstance(message, Open):
            self._actions.append(Want(message.key, message.item))

    patch.setattr(SenderCore, "_on_unknown_room", on_unknown_room)


def an_item_is_asked_for_as_a_room(patch: Patch) -> None:
    whole = ReceiverTransfer.__init__
    patch.setattr(
        ReceiverTransfer, "__init__", lambda self, *more, **named: whole(self, *more, **named | {"item": b""})
    )


def a_session_begun_anew_subscribes_to_nothing(patch: Patch) -> None:
    whole = ReceiverSession.question

    def question(self: ReceiverSession, *more: Any, **named: Any) -> Any:
        asked = whole(self, *more, **named)
        if isinstance(asked, Hello) and self.incarnation:
            asked = msgspec.structs.replace(asked, subscribes=False)
        return asked

    patch.setattr(ReceiverSession, "question", question)


def a_subscription_alone_keeps_up_no_session(patch: Patch) -> None:
    whole = ReceiverLanes._on_session_due

    def on_session_due(self: ReceiverLanes, address: str, now: float) -> None:
        session = self.sessions[address]
        subscribes, session.subscribes = session.subscribes, session.subscribes and bool(session.rooms)
        whole(self, address, now)
        session.subscribes = subscribes

    patch.setattr(ReceiverLanes, "_on_session_due", on_session_due)


def only_the_first_hello_subscribes(patch: Patch) -> None:
    whole = SenderCore._on_hello

    def on_hello(self: SenderCore, hello: Hello, now: float) -> None:
        session = self.sessions.get(hello.source)
        whole(self, hello, now)
        if session is not None:
            session.subscribes = session.hello.subscribes

    patch.setattr(SenderCore, "_on_hello", on_hello)


@pytest.mark.failure_mode(
    "resume-never-triggered",
    "grant-not-whole-blocks",
    "aux-read-from-resumed-block",
    "repeated-grant-written-twice",
    "reused-indices-taken-for-same-round",
    "partial-reported-as-success",
    "pool-held-by-partial-rooms",
    "ranks-see-different-totals",
    "fastest-rank-decides",
    "ranks-admit-different-rooms",
    "message-lost",
    "frozen-peer-holds-blocks",
    "reuse-during-write",
    "abort-not-propagated",
    "restart-on-same-address",
    "write-outcome-unknown",
    "refusal-not-sent",
    "bytes-of-another-room",
    "lease-shorter-than-write",
)
@pytest.mark.invariant(
    "alignment", "aux-once", "token-progress", "no-hold-and-wait", "no-early-reuse", "receiver-drives"
)
@pytest.mark.parametrize(
    ("fault", "world"),
    [
        (resume_is_stored_but_never_queued, two_rounds),  # resume-never-triggered
        (grant_announces_the_tokens_it_wants, two_rounds),  # grant-not-whole-blocks
        (aux_is_read_from_every_round, two_rounds),  # aux-read-from-resumed-block
        (a_grant_that_comes_twice_is_written_twice, two_rounds),  # repeated-grant-written-twice
        (rounds_are_told_apart_by_their_blocks, two_rounds),  # reused-indices-taken-for-same-round
        (partial_is_success, two_rounds),  # partial-reported-as-success
        (half_of_what_is_configured_is_granted, two_rounds),
        (a_drain_skips_what_came_late, two_rounds),
        (blocks_are_kept_while_waiting_for_more, two_rounds),  # pool-held-by-partial-rooms
        (who_has_seen_no_total_is_a_dummy, dummies),  # ranks-see-different-totals
        (the_fastest_rank_decides, ranks),  # fastest-rank-decides
        (each_rank_admits_by_its_own_memory, ranks),  # ranks-admit-different-rooms
        (nothing_is_asked_again, losses),  # message-lost
        (one_peer_may_take_the_whole_pool, frozen),  # frozen-peer-holds-blocks
        (blocks_are_free_at_once_on_every_wire, crowd),  # reuse-during-write
        (the_end_is_told_before_writes_have_returned, crowd),  # reuse-during-write
        (what_was_contributed_may_be_taken_back, leaving),  # abort-not-propagated
        (quarantine_is_for_nobody, restart),  # restart-on-same-address
        (a_doubt_lasts_for_ever, doubt),  # write-outcome-unknown
        (a_refusal_is_kept_secret, refusal),  # refusal-not-sent
        (the_allocator_hands_out_what_is_in_use, crowd),  # bytes-of-another-room
        (blocks_are_free_at_once_on_every_wire, lease),  # lease-shorter-than-write
        (an_item_is_looked_for_at_each_question, items),
        (an_item_is_asked_for_as_a_room, items),
        (a_session_begun_anew_subscribes_to_nothing, subscribers),
        (a_subscription_alone_keeps_up_no_session, subscribers),
        (only_the_first_hello_subscribes, subscribers),
    ],
    ids=lambda part: part.__name__,
)
def test_a_fault_put_back_is_seen(
    fault: Callable[[Patch], None], world: Callable[[], None], monkeypatch: Patch
) -> None:
    """Each fault, put back into the code, makes its world fail."""
    fault(monkeypatch)
    with pytest.raises((AssertionError, EmbedwireError, KeyError)):
        world()
