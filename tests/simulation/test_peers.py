"""Peers that leave, die, come back, refuse and talk nonsense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from embedwire.limits import Limits
from embedwire.protocol.messages import Cause, Message, Open, RoomKey, Stranger, Welcome, encode
from embedwire.protocol.states import ReceiverState, SenderState
from embedwire.testing.sim_link import Weather
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode
from embedwire.testing.simulation import FENCED, ONE_SIDED, Transfer, WireFaults, World

WIRES = (FENCED, ONE_SIDED)


def pair(**receiver: Any) -> tuple[World, SenderNode, ReceiverNode]:
    """A world of one sender, whose slices take a tenth of a second, and one receiver with a pool of 8 blocks; one round at a time."""
    world = World(limits=Limits(window_rounds=1))
    sender = world.add_sender(faults=WireFaults(slice_s=(0.1, 0.1)))
    return world, sender, world.add_receiver(**({"num_blocks": 8} | receiver))


# ---------------------------------------------------------------------- aborts


def is_in(transfer: Transfer, state: ReceiverState | SenderState) -> Callable[[], bool]:
    """Whether the room of that side is in that state."""
    node: Any = transfer.receiver if isinstance(state, ReceiverState) else transfer.sender

    def condition() -> bool:
        rooms = node.core.lanes.transfers if isinstance(node, ReceiverNode) else node.core.transfers
        room = rooms.get(transfer.key)
        return room is not None and room.state is state

    return condition


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize(
    "state",
    [
        ReceiverState.OPENING,
        ReceiverState.WAITING,
        ReceiverState.FILLING,
        ReceiverState.PARTIAL,
        ReceiverState.CLOSING,
        SenderState.OFFERED,
        SenderState.ANNOUNCED,
        SenderState.WRITING,
        SenderState.DELIVERED,
    ],
    ids=lambda state: f"{type(state).__name__}-{state.value}",
)
def test_abort_in_every_state(state: ReceiverState | SenderState, side: str, wire: str) -> None:
    """Either side aborts in every state: the other side gets the end, and the next room in the same blocks gets the right bytes."""
    world, sender, receiver = pair(default_allocate_tokens=1024, wire=wire)
    competing = world.request(1, 5000)
    transfer = world.request(7, 2500, source_s=0.2)
    if state is SenderState.OFFERED:
        world.link.rules.append(lambda e: () if isinstance(e.message, Open) and e.message.room == 7 else None)
        world.run(for_s=0.1)
    world.run_until(is_in(transfer, state))
    (sender if side == "sender" else receiver).abort(transfer.key)
    world.link.rules.clear()
    following = world.request(8, 3000)
    world.settle()
    assert competing.is_done
    assert following.is_done
    if state in (ReceiverState.CLOSING, SenderState.DELIVERED):  # too late for one side or for both
        assert {transfer.receiver_end, transfer.sender_end} <= {Cause.DONE, Cause.ABORTED}
    else:
        assert transfer.receiver_end is transfer.sender_end is Cause.ABORTED


@pytest.mark.failure_mode("reuse-during-write")
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_abort_during_a_write(side: str, wire: str) -> None:
    """On a one-sided wire blocks and source memory come back only when the slice under way has landed."""
    world, sender, receiver = pair(wire=wire)
    transfer = world.request(7, 1024)
    world.run_until(lambda: bool(sender.writes))
    world.run(for_s=0.05)
    (sender if side == "sender" else receiver).abort(transfer.key)
    world.run(for_s=0.02)
    assert transfer.key in sender.core.rooms, "its write is under way"
    assert sender.budget.used_bytes == 1024 * TOKEN_BYTES
    if side == "receiver":
        assert transfer.receiver_end is Cause.ABORTED
        assert receiver.blocks.blocks_quarantined == {FENCED: 0, ONE_SIDED: 8}[wire]
    world.run(for_s=0.06)
    assert transfer.receiver_end is transfer.sender_end is Cause.ABORTED
    assert receiver.blocks.blocks_free == 8
    assert sender.budget.used_bytes == 0
    world.settle()


# ---------------------------------------------------------------------- killed and restarted peers


@pytest.mark.failure_mode("encoder-killed", "restart-on-same-address")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("pause_s", [0.0, 0.9, 20.0])
def test_encoder_killed_in_mid_round(pause_s: float, wire: str) -> None:
    """The language server ends the rooms in time with the cause, and serves the restarted encoder at once."""
    world, sender, receiver = pair(wire=wire)
    transfer = world.request(7, 5000)
    world.run_until(lambda: len(transfer.grants) == 2)
    world.run(for_s=0.15)
    world.kill(sender)
    world.after(pause_s, lambda: world.restart(sender))
    world.run(for_s=min(pause_s, Limits().peer_silence_s) + Limits().peer_silence_s / 4 + 0.1)
    assert transfer.receiver_end is Cause.PEER_LOST
    world.run(for_s=max(0.0, pause_s - 5.0))
    following = world.request(8, 3000)
    world.run(for_s=5.0)
    assert following.is_done
    world.settle()
    assert receiver.blocks.blocks_free == 8


@pytest.mark.failure_mode("language-server-killed", "restart-on-same-address")
@pytest.mark.invariant("deadlines")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("pause_s", [0.0, 0.9, 20.0])
def test_language_server_killed(pause_s: float, wire: str) -> None:
    """The encoder ends the rooms in time, frees its memory, and serves the next incarnation at once."""
    world, sender, receiver = pair(wire=wire)
    transfer = world.request(7, 5000)
    world.run_until(lambda: len(transfer.grants) == 2)
    world.kill(receiver)
    world.after(pause_s, lambda: world.restart(receiver))
    world.run(for_s=pause_s + 0.1)
    following = world.request(8, 3000)
    world.run(for_s=Limits().peer_silence_s + 1.0)
    assert transfer.sender_end in (Cause.PEER_LOST, Cause.WIRE_FAILED)
    assert following.is_done
    assert sender.budget.used_bytes == 0
    world.settle()


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.invariant("deadlines")
def test_an_encoder_that_never_was() -> None:
    """No process at the address: the room ends within ``peer_silence_s``."""
    world, sender, _ = pair()
    world.kill(sender)
    transfer = world.request(7, 100)
    world.run(for_s=Limits().peer_silence_s + Limits().retry_s + 0.1)
    assert transfer.receiver_end is Cause.PEER_LOST
    world.settle()


# ---------------------------------------------------------------------- lost, repeated, late and malformed messages


@pytest.mark.failure_mode("message-lost", "message-repeated-or-late")
@pytest.mark.invariant("receiver-drives")
@pytest.mark.parametrize(
    "weather",
    [
        Weather(loss=0.3),
        Weather(doubling=0.9, delay_s=(0.001, 0.05)),
        Weather(lateness=0.2, delay_s=(0.001, 0.2)),
        Weather(loss=0.2, doubling=0.3, lateness=0.1, delay_s=(0.0, 0.6)),
    ],
)
@pytest.mark.parametrize("wire", WIRES)
def test_bad_weather(weather: Weather, wire: str) -> None:
    """Messages are lost, doubled, minutes late and reordered: all rooms complete."""
    for seed in range(5):
        world = World(seed, weather=weather, limits=Limits(blocks_wait_s=600.0, peer_silence_s=10.0))
        world.add_sender()
        world.add_receiver(num_blocks=4, wire=wire)
        transfers = [world.request(room, 500 * room) for room in range(1, 7)]
        world.settle()
        assert all(t.is_done for t in transfers), f"seed {seed}"


@pytest.mark.failure_mode("message-from-earlier-life")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("restarted", ["sender", "receiver", "both"])
def test_messages_from_an_earlier_life(restarted: str, wire: str) -> None:
    """All messages of an earlier incarnation are sent again in the middle of the present one, without effect."""
    world, sender, receiver = pair(wire=wire)
    first = world.request(7, 3000)
    world.run_until(lambda: first.is_done)
    earlier = list(world.link.sent)
    if restarted in ("sender", "both"):
        world.restart(sender)
    if restarted in ("receiver", "both"):
        world.restart(receiver)
    again = world.request(7, 3000, attempt=0 if restarted == "both" else 1)
    other = world.request(8, 2000)
    world.run_until(lambda: len(again.grants) == 2)
    for envelope in earlier:
        frame = encode(envelope.message)
        if envelope.destination == sender.address:
            world.deliver_to_sender(sender.address, frame, envelope.message.source)
        else:
            world.deliver_to_receiver(receiver.address, frame, sender.address)
    world.settle()
    assert again.is_done
    assert other.is_done


@pytest.mark.failure_mode("message-from-earlier-life")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("kind", [Stranger, Welcome])
def test_a_late_answer_from_an_earlier_life_ends_no_room(kind: type[Message]) -> None:
    """A ``stranger`` or ``welcome`` of an earlier sender arrives minutes late: rooms of the present one go on."""
    world, sender, receiver = pair()
    warm = world.request(1, 100)
    world.run_until(lambda: warm.is_done)
    target, old = receiver.process.incarnation, sender.process.incarnation
    late: Message = Stranger(source=old, target=target)
    if kind is Welcome:
        late = next(e.message for e in world.link.sent if isinstance(e.message, Welcome))
    world.restart(sender)
    transfer = world.request(7, 3000)
    world.run_until(lambda: len(transfer.grants) == 2)
    for _ in range(3):
        world.deliver_to_receiver(receiver.address, encode(late), sender.address)
        world.run(for_s=0.05)
    world.settle()
    assert transfer.is_done


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_what_is_no_message_fails_its_own_connection_only(side: str) -> None:
    """A truncated frame ends the rooms of its origin with a cause, and no others."""
    world, bad, receiver = pair(num_blocks=32)
    good = world.add_sender("encoder-2")
    room, other = world.request(1, 3000), world.request(2, 3000, sender=good)
    world.run_until(lambda: len(room.grants) == 1)
    frame = encode(world.link.sent[-1].message)[:-1]
    if side == "receiver":
        world.deliver_to_receiver(receiver.address, frame, bad.address)
    else:
        world.deliver_to_sender(bad.address, frame, receiver.process.incarnation)
    world.run(for_s=1.0)
    assert room.sender_end is room.receiver_end
    assert room.receiver_end in (Cause.VIOLATION, Cause.PEER_LOST)
    assert other.is_done
    following = world.request(3, 3000, sender=bad)
    world.settle()
    assert following.is_done, "the connection can be used again at once"


# ---------------------------------------------------------------------- one failure does not shut a peer out


@pytest.mark.failure_mode("one-failure-shuts-peer-out")
@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("trouble", ["lost", "in_doubt", "refused", "aborted"])
def test_one_failure_blacklists_nobody(trouble: str, wire: str) -> None:
    """After a room failed for any cause, the next rooms of the same peer complete."""
    world, sender, receiver = pair(wire=wire)
    if trouble == "refused":
        sender.setup.attach_fails = True
    elif trouble != "aborted":
        setattr(sender.setup.faults, trouble, 1.0)
    failed = world.request(7, 3000)
    if trouble == "aborted":
        world.run_until(lambda: bool(failed.grants))
        sender.abort(failed.key)
    world.run_until(lambda: failed.receiver_end is not None)
    assert failed.receiver_end is (Cause.ABORTED if trouble == "aborted" else Cause.WIRE_FAILED)
    sender.setup.attach_fails = False
    sender.setup.faults.lost = sender.setup.faults.in_doubt = 0.0
    following = [world.request(room, 3000) for room in range(8, 12)]
    world.run(for_s=10.0)
    assert all(t.is_done for t in following)
    assert receiver.blocks.blocks_free == 8
    sender.abort(failed.key)
    world.settle()


@pytest.mark.failure_mode("one-failure-shuts-peer-out")
def test_a_lost_write_is_tried_again_where_it_stopped() -> None:
    """One slice is lost: the write resumes after the landed prefix, under the same grant."""
    world, sender, _ = pair()
    transfer = world.request(7, 1024)
    world.run_until(lambda: bool(sender.writes))
    world.run(for_s=0.05)
    sender.setup.faults.lost = 1.0
    world.run(for_s=0.1)
    sender.setup.faults.lost = 0.0
    world.settle()
    assert transfer.is_done
    assert [(w.round.number, w.landed_tokens) for w in sender.writes] == [(0, 0), (0, 512)]


# ---------------------------------------------------------------------- bursts and refusals


@pytest.mark.failure_mode("burst-of-requests")
@pytest.mark.invariant("backpressure")
@pytest.mark.parametrize(
    ("limits", "queue_max"), [(Limits(), 1000), (Limits(rooms_max=64), 1000), (Limits(), 50)]
)
def test_200_rooms_at_the_same_moment(limits: Limits, queue_max: int) -> None:
    """All rooms complete or are refused at once."""
    world = World(limits=limits)
    world.add_sender(queue_max=queue_max, source_bytes=100 * 1300 * TOKEN_BYTES)
    world.add_receiver()
    transfers = [world.request(room, 1300) for room in range(1, 201)]
    world.run(for_s=1.0)
    refused = [t for t in transfers if t.is_refused_at_once or t.receiver_end is Cause.OVERLOADED]
    world.settle()
    done = [t for t in transfers if t.is_done]
    assert len(done) + len(refused) == 200
    assert len(done) >= 64
    assert bool(refused) == (limits.rooms_max < 200 or queue_max < 100)


@pytest.mark.failure_mode("refusal-not-sent", "request-never-fits")
@pytest.mark.parametrize("source_bytes", [10 * TOKEN_BYTES, 2000 * TOKEN_BYTES])
def test_an_encoder_without_room_says_so(source_bytes: int) -> None:
    """A refusal of the encoder, for now or for ever, reaches the receiver in one round trip."""
    world = World()
    world.add_sender(source_bytes=source_bytes, queue_max=0 if source_bytes > 100 * TOKEN_BYTES else 9)
    world.add_receiver()
    world.run_until(lambda: True)
    transfer = world.request(7, 1000)
    world.run(for_s=0.02)
    assert transfer.receiver_end in (Cause.OVERLOADED, Cause.NEVER_FITS)
    assert world.link.count()["Open"] == 1
    world.settle()


@pytest.mark.failure_mode("refusal-not-sent")
def test_an_open_that_waits_hears_the_refusal() -> None:
    """When the encoder refuses the request, a waiting open is answered at once."""
    world = World()
    sender = world.add_sender(source_bytes=10 * TOKEN_BYTES)
    world.add_receiver()
    transfer = world.request(7, 1000, offer_after_s=3.0)
    world.run(for_s=2.9)
    assert len(sender.core._pending_opens) == 1
    world.run(for_s=0.11)
    assert transfer.receiver_end is Cause.NEVER_FITS
    world.settle()


@pytest.mark.failure_mode("refusal-not-sent")
@pytest.mark.invariant("backpressure")
def test_a_sender_with_too_many_receivers_says_so() -> None:
    """One session too many is refused in one round trip, and accepted when another has ended."""
    world = World(limits=Limits(sessions_max=1))
    sender = world.add_sender()
    first, second = world.add_receiver("language-1"), world.add_receiver("language-2")
    one = world.request(1, 100, receiver=first)
    world.run_until(lambda: one.is_done)
    two = world.request(2, 100, receiver=second)
    world.run(for_s=0.01)
    assert two.receiver_end is Cause.OVERLOADED
    world.run(for_s=70.0)
    assert not sender.core.sessions
    three = world.request(3, 100, receiver=second)
    world.settle()
    assert three.is_done


@pytest.mark.failure_mode("refusal-not-sent")
@pytest.mark.invariant("backpressure")
def test_too_many_opens_are_refused() -> None:
    """Opens that wait for their room are bounded; one more is refused at once."""
    world = World(limits=Limits(pending_opens_max=3))
    world.add_sender()
    world.add_receiver()
    transfers = [world.request(room, 100, offer_after_s=5.0) for room in range(1, 6)]
    world.run(for_s=0.02)
    assert [t.receiver_end for t in transfers] == [None] * 3 + [Cause.OVERLOADED] * 2
    world.run_until(lambda: transfers[2].is_done)


@pytest.mark.parametrize("difference", [("cell int32[]",), ("cell int64[]", "deepstack bfloat16[8]")])
def test_layouts_that_differ(difference: tuple[str, ...]) -> None:
    """A layout that differs is refused at the handshake, and the receiver's cause names the field."""
    world = World()
    world.add_sender()
    receiver = world.add_receiver(fields=difference)
    transfer = world.request(7, 100)
    world.run(for_s=0.01)
    assert transfer.receiver_end is Cause.HANDSHAKE
    assert difference[-1] in receiver.ends[transfer.key].detail  # type: ignore[union-attr]
    assert not transfer.grants


# ---------------------------------------------------------------------- bytes of another room, leases


@pytest.mark.failure_mode("bytes-of-another-room", "reuse-during-write")
@pytest.mark.parametrize("wire", WIRES)
def test_every_cell_says_whose_it_is(wire: str) -> None:
    """60 rooms share a pool of 6 blocks and clients abort in mid-write: no room reads a cell of another."""
    world = World(3)
    sender = world.add_sender(faults=WireFaults(slice_tokens=100, slice_s=(0.001, 0.02)))
    receiver = world.add_receiver(num_blocks=6, default_allocate_tokens=128, wire=wire)
    transfers = [world.request(room, 400 + room) for room in range(1, 61)]
    for room in range(3, 61, 3):
        world.after(0.02 * room, lambda room=room: receiver.abort(RoomKey(room)))
    world.settle()
    ends = [t.receiver_end for t in transfers]
    assert ends.count(Cause.DONE) >= 40
    assert ends.count(Cause.ABORTED) >= 5
    assert len(sender.writes) > 150


@pytest.mark.failure_mode("lease-shorter-than-write")
@pytest.mark.invariant("no-early-reuse")
def test_a_write_longer_than_its_lease() -> None:
    """The round expires while its slice is under way: the blocks are not granted before it has landed, and its late completion is no
    success."""
    limits = Limits(round_s=6.0, write_timeout_s=6.0)
    world = World(limits=limits)
    slow = world.add_sender("encoder-1", faults=WireFaults(slice_s=(30.0, 30.0)))
    quick = world.add_sender("encoder-2")
    receiver = world.add_receiver(num_blocks=4, wire=ONE_SIDED)
    transfer = world.request(1, 384, sender=slow)
    world.run_until(lambda: bool(slow.writes))
    waiting = world.request(2, 512 * 3, sender=quick)
    world.run(for_s=10.0)
    assert transfer.receiver_end is Cause.DEADLINE
    assert receiver.blocks.blocks_quarantined == 3
    assert waiting.is_done
    assert max(len(g.block_indices) for g in waiting.grants) == 1
    world.settle()
    assert transfer.receiver_end is Cause.DEADLINE
    assert transfer.sender_end is not Cause.DONE


@pytest.mark.failure_mode("lease-shorter-than-write")
def test_no_lease_ends_under_a_write_by_configuration() -> None:
    """The relation between the two limits is checked when they are made."""
    from embedwire.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="round_s"):
        Limits(round_s=20.0, write_timeout_s=30.0)
