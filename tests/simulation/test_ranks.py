"""Ranks of a group: each goes through its rounds on its own, and all agree on rooms. The world checks that every room ends on all ranks of
a group in the same step, in the same order and in the same way, and that every byte of every assembly is right."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from embedwire.group import coordinator
from embedwire.group.agreement import NEUTRAL
from embedwire.limits import AUX_POSITION_DELTA, Limits
from embedwire.protocol.actions import Finished
from embedwire.protocol.messages import Announce, Cause, Grant, Init, Message, ResumeTransfer, RoomKey
from embedwire.protocol.states import Poll
from embedwire.protocol.topology import Delivery
from embedwire.testing.sim_group import Group
from embedwire.testing.sim_link import Rule
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_transfer import Transfer
from embedwire.testing.simulation import FENCED, ONE_SIDED, WireFaults, World


def late_at(address: str, kind: type[Message], delay_s: float) -> Rule:
    """A rule: messages of this kind that a rank hears, or says, arrive late."""
    return lambda e: (
        (delay_s,) if isinstance(e.message, kind) and address in (e.origin, e.destination) else None
    )


def ends_of(group: Group, transfer: Transfer) -> list[Cause]:
    """How a room has ended on each rank that knows it."""
    ends = [node.ends[transfer.key] for node in group.nodes if transfer.key in node.ends]
    return [Cause.DONE if isinstance(end, Finished) else end.cause for end in ends]


def polls(group: Group) -> list[set[Poll]]:
    """What was contributed of any room, step by step."""
    return [
        {room.poll for facts in step.contributed.values() for room in facts.rooms} for step in group.steps
    ]


ONE_ROUND = Limits(window_rounds=1)
SIZES = pytest.mark.parametrize(
    ("total", "default", "block_size", "num_blocks"),
    [(2000, 1024, 128, 8), (20000, 16384, 8192, 2)],
)


@pytest.mark.failure_mode("ranks-see-different-totals")
@SIZES
@pytest.mark.parametrize("delivery", ["share", "replicate"])
def test_four_ranks_of_which_two_say_nothing(
    delivery: Delivery, total: int, default: int, block_size: int, num_blocks: int
) -> None:
    """Ranks 1 and 3 report (0, 0), since their announcements are late; as dummy ranks they contribute what changes no minimum, in every
    step. All agree on the total, every reader receives 1024 and 976, and all finish in one step."""
    world = World(limits=ONE_ROUND)
    world.add_sender()
    group = world.add_group(
        size=4,
        delivery=delivery,
        hosts="aabb",
        default_allocate_tokens=default,
        block_size=block_size,
        num_blocks=num_blocks,
    )
    if delivery == "replicate":
        world.link.rules += [late_at(f"language-1/{rank}", Announce, 2.0) for rank in (1, 3)]
    transfer = world.request(7, total, open_after_s=0.01)
    other = world.request(8, 1)  # its steps include room 7
    world.settle()
    assert transfer.is_done
    assert other.is_done
    contributed = [facts for step in group.steps for rank in (1, 3) for facts in step.contributed[rank].rooms]
    if delivery == "share":
        assert contributed
        assert set(contributed) == {NEUTRAL}
    else:
        assert any(facts.total_tokens == facts.landed_tokens == 0 for facts in contributed)
    assert [end[1:] for end in group.ends if end[1] == transfer.key] == [(transfer.key, Cause.DONE, total)]
    assert len(transfer.lane_rounds) == len(group.ranks.readers) == (2 if delivery == "share" else 4)
    assert set(transfer.lane_rounds.values()) == {(default, total - default)}
    assert [node.rank for node in group.nodes if node not in group.readers] == (
        [1, 3] if delivery == "share" else []
    )


@pytest.mark.failure_mode("ranks-see-different-totals", "fastest-rank-decides")
@pytest.mark.parametrize("delivery", ["share", "replicate"])
def test_a_step_in_between_agrees_on_what_has_landed(delivery: Delivery) -> None:
    """1024 tokens have landed on all readers when another room causes an agreement step: all four get 2000 and 1024."""
    world = World(limits=ONE_ROUND)
    world.add_sender()
    group = world.add_group(size=4, delivery=delivery, hosts="aabb", default_allocate_tokens=1024)
    world.link.rules += [late_at(node.address, ResumeTransfer, 1.0) for node in group.nodes]
    transfer = world.request(7, 2000)
    lanes = [lane for node in group.readers for lane in node.core.lanes.transfers.values()]
    world.run_until(lambda: bool(world.link.count()["ResumeTransfer"]))
    world.run(for_s=0.1)
    other = world.request(8, 500)
    world.run(for_s=0.1)
    agreed = {(room.total_tokens, room.landed_tokens) for room in group.agreed[-1].rooms}
    assert (2000, 1024) in agreed
    world.settle()
    assert transfer.is_done
    assert other.is_done
    assert not lanes or set(transfer.lane_rounds.values()) == {(1024, 976)}


@pytest.mark.failure_mode("fastest-rank-decides")
def test_a_late_write_skips_nothing() -> None:
    """Rank 1's grant reaches the encoder late: no rank succeeds before rank 1 has every token."""
    world = World(limits=ONE_ROUND)
    world.add_sender()
    group = world.add_group(size=4, default_allocate_tokens=1024, num_blocks=8)
    world.link.rules.append(late_at("language-1/1", Init, 3.0))
    transfer = world.request(7, 2000)
    world.run(for_s=2.0)
    assert ends_of(group, transfer) == []
    assert [room.facts().poll for node in group.nodes for room in node.core.rooms.values()] == [
        Poll.SUCCESS,
        Poll.TRANSFERRING,
        Poll.SUCCESS,
        Poll.SUCCESS,
    ]
    world.settle()
    assert transfer.is_done
    assert set(transfer.lane_rounds.values()) == {(1024, 976)}


@pytest.mark.failure_mode("position-delta-reduced")
@pytest.mark.invariant("aux-once")
def test_the_position_delta_is_told_never_reduced() -> None:
    """Every reader has −756, although rank 1 is announced late and rank 3 reads nothing from the wire."""
    world = World()
    world.add_sender()
    group = world.add_group(size=4, delivery="share", hosts="abcc")
    world.link.rules.append(late_at("language-1/1", Announce, 1.0))
    transfer = world.request(756, 2000)
    world.settle()
    stories = [node.ends[transfer.key] for node in group.nodes]
    reports = [end.report for end in stories if isinstance(end, Finished)]
    assert [report.total_tokens for report in reports] == [2000] * 4
    assert [report.aux[AUX_POSITION_DELTA] for report in reports if report.aux] == [-756] * 3


@pytest.mark.failure_mode("one-rank-cannot-allocate")
@pytest.mark.invariant("no-hold-and-wait")
def test_a_full_pool_on_one_rank() -> None:
    """Rank 2's blocks all belong to room 1, whose write is late. Room 2 waits there without a block while the other ranks receive it;
    then all finish."""
    world = World()
    world.add_sender()
    group = world.add_group(size=4, num_blocks=8)
    first = world.request(1, 1024)
    world.link.rules.append(
        lambda e: (
            (5.0,)
            if isinstance(e.message, Init) and (e.origin, e.message.room) == ("language-1/2", 1)
            else None
        )
    )
    second = world.request(2, 1000, open_after_s=0.5)
    world.run(for_s=3.0)
    assert ends_of(group, first) == ends_of(group, second) == []
    assert [node.blocks.blocks_free for node in group.nodes] == [8, 8, 0, 8]
    waiting = group.nodes[2].core.admission.for_blocks
    assert [(lane.key.room, len(lane.open_rounds)) for lane in waiting] == [(2, 0)]
    whole = [len(node.core.rooms[second.key].whole) for node in group.nodes]
    assert whole == [1, 1, 0, 1]
    world.settle()
    assert first.is_done
    assert second.is_done


@pytest.mark.failure_mode("one-rank-cannot-allocate", "deadlock-across-servers")
@pytest.mark.invariant("no-hold-and-wait")
@pytest.mark.parametrize("wire", [FENCED, ONE_SIDED])
def test_two_encoders_and_two_groups_cross(wire: str) -> None:
    """Each encoder is full of a room whose group has reserved its memory for a room of the other encoder."""
    world = World()
    room_bytes = 1024 * TOKEN_BYTES
    one, two = (world.add_encoder_group(f"encoder-{i}", 2, source_bytes=room_bytes) for i in (1, 2))
    left, right = (
        world.add_group(f"language-{i}", 3, num_blocks=1, assembly_bytes=room_bytes, wire=wire)
        for i in (1, 2)
    )
    transfers = [
        world.request(2, 1024, sender=two, receiver=left, offer_after_s=0.1),
        world.request(4, 1024, sender=one, receiver=right, offer_after_s=0.1),
        world.request(1, 1024, sender=one, receiver=left, open_after_s=0.2),
        world.request(3, 1024, sender=two, receiver=right, open_after_s=0.2),
    ]
    world.settle()
    assert all(transfer.is_done for transfer in transfers)


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_one_place_and_ten_rooms() -> None:
    """Ten rooms are ready and there is memory for one assembly: all ranks give it to the same room."""
    world = World()
    world.add_sender()
    group = world.add_group(size=3, assembly_bytes=1000 * TOKEN_BYTES, step_s=(0.0005, 0.2))
    transfers = [world.request(room, 1000 - room) for room in range(1, 11)]
    held: set[frozenset[RoomKey]] = set()
    while not all(transfer.is_done for transfer in transfers):
        assert world.step()
        held.add(frozenset(key for node in group.nodes for key in node.assemblies))
    assert max(map(len, held)) == 1
    world.settle()
    assert [node.budget.peak_bytes for node in group.nodes] == [999 * TOKEN_BYTES] * 3


@pytest.mark.failure_mode("ranks-admit-different-rooms")
def test_a_room_that_only_rank_0_knows() -> None:
    """A room opened while an agreement step runs is not part of that step, on any rank."""
    world = World()
    world.add_sender()
    group = world.add_group(size=2, step_s=(0.5, 0.5))
    world.request(1, 100)
    world.request(2, 100, open_after_s=0.75)
    world.run(for_s=0.9)
    assert [len(node.core.rooms) for node in group.nodes] == [2, 0]
    world.settle()
    told = [[len(facts.rooms) for facts in step.contributed.values()] for step in group.steps]
    assert told[:2] == [[1, 1], [2, 2]]


@pytest.mark.failure_mode("grant-sent-to-wrong-ranks")
def test_a_write_goes_only_to_ranks_that_have_granted() -> None:
    """Rank 2's first grant is late: the others get their two writes, rank 2 none until then, and two in the end."""
    world = World(limits=ONE_ROUND)
    sender = world.add_sender()
    group = world.add_group(size=4, default_allocate_tokens=1024)
    world.link.rules.append(late_at("language-1/2", Init, 3.0))
    transfer = world.request(7, 2000)
    peers = [node.process.incarnation for node in group.nodes]
    world.run(for_s=2.0)
    counts = Counter(write.peer for write in sender.writes)
    assert [counts[peer] for peer in peers] == [2, 2, 0, 2]
    world.settle()
    counts = Counter(write.peer for write in sender.writes)
    assert [counts[peer] for peer in peers] == [2, 2, 2, 2]
    assert world.link.count()["Init"] >= 4
    assert transfer.is_done


PAIRS = ((1, 1), (1, 4), (2, 8), (4, 4), (4, 2), (8, 2), (4, 6), (6, 4), (3, 2))


@pytest.mark.failure_mode("rank-counts-differ")
@pytest.mark.parametrize("delivery", ["replicate", "share"])
@pytest.mark.parametrize(("encoders", "ranks"), PAIRS)
def test_any_numbers_of_ranks(encoders: int, ranks: int, delivery: Delivery) -> None:
    """Every encoder rank sends, every reader gets all of it, and the other data-parallel encoder gets no message about the room."""
    world = World()
    sender = world.add_encoder_group("encoder-1", encoders)
    other = world.add_encoder_group("encoder-2", encoders)
    group = world.add_group(size=ranks, delivery=delivery, hosts=sorted("abab"[i % 4] for i in range(ranks)))
    transfers = [world.request(room, 2000 + room, sender=sender) for room in (1, 2, 3)]
    world.settle()
    assert all(transfer.is_done for transfer in transfers)
    assert all(node.writes for node in sender.nodes), "nobody is spare"
    assert not any(node.writes for node in other.nodes)
    assert not any(envelope.destination.startswith("encoder-2") for envelope in world.link.sent)
    assert len(group.readers) == (ranks if delivery == "replicate" else min(ranks, 2))


@pytest.mark.failure_mode("rank-counts-differ", "part-taken-for-whole-room")
def test_a_room_shorter_than_its_parts() -> None:
    """One token from six encoder ranks: some parts carry the same token, and it arrives."""
    world = World()
    sender = world.add_encoder_group("encoder-1", 6)
    world.add_group(size=2)
    transfers = [world.request(tokens, tokens, sender=sender) for tokens in (1, 2, 3, 4)]
    world.settle()
    assert all(transfer.is_done for transfer in transfers)


@pytest.mark.failure_mode("part-taken-for-whole-room")
def test_several_senders_to_one_rank() -> None:
    """Four encoder ranks each send a quarter, in rounds of their own, through one pool."""
    world = World()
    sender = world.add_encoder_group("encoder-1", 4, faults=WireFaults(slice_s=(0.001, 0.5)))
    receiver = world.add_receiver(default_allocate_tokens=256, num_blocks=3)
    transfer = world.request(7, 2000, sender=sender)
    world.settle()
    assert transfer.is_done
    assert [sum(rounds) for rounds in transfer.lane_rounds.values()] == [500] * 4
    assert receiver.budget.peak_bytes == 2000 * TOKEN_BYTES


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_the_group(rank: int) -> None:
    """The other ranks time out, end the group and every room; restarted together, they serve again."""
    world = World()
    world.add_sender(faults=WireFaults(slice_s=(0.1, 0.1)))
    group = world.add_group(size=3)
    transfer = world.request(1, 2000)
    world.run(for_s=0.1)
    world.kill(group.nodes[rank])
    world.run(for_s=60.0)
    assert group.is_lost
    assert ends_of(group, transfer) == [Cause.RANK_LOST] * 2
    assert world.request(2, 100).receiver_end is None
    world.run(for_s=1.0)
    world.restart_group(group)
    again = world.request(1, 2000, attempt=1)
    world.settle()
    assert again.is_done


@pytest.mark.failure_mode("rank-slow")
def test_a_slow_rank() -> None:
    """One rank stops for seconds, in and between agreement steps; all finish when it continues."""
    world = World()
    world.add_sender(faults=WireFaults(slice_s=(0.1, 0.1)))
    group = world.add_group(size=3)
    transfers = [world.request(room, 2000) for room in range(1, 6)]
    for at, rank in ((0.001, 1), (4.2, 2), (8.4, 0)):
        process = group.nodes[rank].process
        world.after(at, process.freeze)
        world.after(at + 4.0, process.wake)
    world.settle()
    assert not group.is_lost
    assert all(transfer.is_done for transfer in transfers)


@pytest.mark.failure_mode("rank-slow")
def test_queues_of_different_length() -> None:
    """Messages between ranks take up to two seconds, so the ranks have different rooms most of the time."""
    world = World(limits=Limits(blocks_wait_s=600.0))
    world.add_sender()
    group = world.add_group(size=4, step_s=(0.0005, 2.0), assembly_bytes=3000 * TOKEN_BYTES)
    transfers = [world.request(room, 100 * room, open_after_s=room / 3) for room in range(1, 21)]
    world.settle()
    assert all(transfer.is_done for transfer in transfers)
    assert len(group.ends) == 20


def corrupt(world: World, group: Group) -> None:
    node = group.nodes[1]
    node.setup = replace(node.setup, tolerates_wrong_bytes=True)
    whole = node.memory.write
    node.memory.write = lambda granted, start, held: whole(granted, start, held + 1)  # type: ignore[method-assign]


def lose_peer(world: World, group: Group) -> None:
    world.run(for_s=0.1)
    world.kill(world.senders["encoder-1/1"])


def never_fit(world: World, group: Group) -> None:
    node = group.nodes[1]
    node.setup = replace(node.setup, assembly_bytes=100)
    world.restart_group(group)


@pytest.mark.failure_mode("rank-fails-alone")
@pytest.mark.parametrize(
    ("fault", "cause"),
    [(corrupt, Cause.CORRUPT), (lose_peer, Cause.PEER_LOST), (never_fit, Cause.NEVER_FITS)],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_failure_on_one_rank(fault, cause: Cause) -> None:
    """A failure on rank 1 ends the room on all ranks with one cause, and the next room is served."""
    world = World()
    sender = world.add_encoder_group("encoder-1", 2, faults=WireFaults(slice_s=(0.2, 0.2)))
    spare = world.add_encoder_group("encoder-2", 2)
    group = world.add_group(size=2, num_blocks=8)
    transfer = world.request(1, 2000, sender=sender, offer_after_s=0.01, open_after_s=0.01)
    fault(world, group)
    world.run(for_s=30.0)
    assert ends_of(group, transfer) == [cause] * 2
    assert transfer.sender_end is cause or fault is lose_peer
    if fault is corrupt:
        world.restart_group(group)  # with memory that is whole
    following = world.request(2, 5, sender=spare)
    world.settle()
    assert following.is_done


@pytest.mark.failure_mode("abort-not-propagated", "rank-fails-alone")
@pytest.mark.parametrize("is_other_late", [False, True])
def test_an_abort_while_a_success_is_being_agreed(is_other_late: bool) -> None:
    """The client leaves after rank 0 reported success: the room succeeds if all ranks did, else it is aborted, on every rank alike."""
    world = World()
    world.add_sender()
    group = world.add_group(size=3)
    if is_other_late:
        world.link.rules.append(late_at("language-1/1", Init, 2.0))
    transfer = world.request(1, 1000)
    world.run_until(lambda: any(Poll.SUCCESS in said for said in polls(group)))
    assert len(group.agreed) < len(group.steps)
    group.abort(transfer.key)
    world.settle()
    assert ends_of(group, transfer) == [Cause.ABORTED if is_other_late else Cause.DONE] * 3


@pytest.mark.parametrize("rooms", [1, 10, 100])
def test_collectives(rooms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of rooms takes one collective a step, also more than there are slots (16 here), and a room few steps, however many
    rounds it has."""
    monkeypatch.setattr(coordinator, "SLOTS_MAX", 16)
    world = World(limits=ONE_ROUND)
    world.add_sender()
    group = world.add_group(size=2, num_blocks=64, block_size=4, default_allocate_tokens=4)
    transfers = [world.request(room, 40) for room in range(1, rooms + 1)]
    world.settle()
    assert all(transfer.is_done for transfer in transfers)
    assert group.collectives == len(group.steps)
    assert max(len(agreed.rooms) for agreed in group.agreed) == min(rooms, 16)
    if rooms == 1:
        assert transfers[0].rounds == (4, 36)
        assert group.collectives <= 4  # opened, announced (maybe twice), whole
    before = len(group.steps)
    world.run(for_s=100.0)
    assert len(group.steps) == before, "an idle group makes no step"


@pytest.mark.parametrize("rounds", [1, 2, 10, 50])
def test_rounds_cost_no_collective(rounds: int) -> None:
    """A room takes three or four collectives, opened, ready (once or twice) and whole, however many rounds it has on each rank."""
    world = World(limits=ONE_ROUND)
    world.add_sender()
    group = world.add_group(size=4, num_blocks=1)
    transfer = world.request(1, rounds * 128)
    world.settle()
    assert {len(sizes) for sizes in transfer.lane_rounds.values()} == {rounds}
    assert group.collectives in (3, 4)


def test_rooms_beyond_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are 8 slots, and the first 8 rooms wait for their source. The rooms behind them are served all the same."""
    monkeypatch.setattr(coordinator, "SLOTS_MAX", 8)
    world = World()
    world.add_sender()
    group = world.add_group(size=2)
    slow = [world.request(room, 1, source_s=50.0) for room in range(1, 9)]
    quick = [world.request(room, 1) for room in range(9, 30)]
    world.run(for_s=10.0)
    assert all(transfer.is_done for transfer in quick)
    assert not any(transfer.is_done for transfer in slow)
    steps = len(group.steps)
    world.run(for_s=30.0)
    assert len(group.steps) == steps, "nobody has news"
    world.settle()
    assert all(transfer.is_done for transfer in slow)


@pytest.mark.failure_mode("grant-sent-to-wrong-ranks")
def test_grants_carry_the_rank_of_their_reader() -> None:
    """Every grant goes from a reader to its own senders only."""
    world = World()
    sender = world.add_encoder_group("encoder-1", 2)
    world.add_group(size=3)
    world.request(1, 900, sender=sender)
    world.settle()
    ways = {
        (e.origin, e.destination, e.message.lane) for e in world.link.sent if isinstance(e.message, Grant)
    }
    assert ways == {
        ("language-1/0", "encoder-1/0", 0),
        ("language-1/1", "encoder-1/0", 1),
        ("language-1/1", "encoder-1/1", 4),
        ("language-1/2", "encoder-1/1", 5),
    }
