"""Peers that send what they may not, on real sockets: it costs their own rooms, never a thread, never others'."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import zmq

from embedwire.endpoint.identity import identity_of
from embedwire.limits import MESSAGE_BYTES_MAX, PROTOCOL_VERSION, ROOM_MAX
from embedwire.protocol import messages
from embedwire.testing.payload import payload

pytestmark = pytest.mark.timeout(60)

TOKENS = 1000
ME = 1234567
"""The incarnation that the hostile peer claims to have."""


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


def dealer(context: Any, address: str, identity: bytes = identity_of(ME, "")) -> Any:
    """A hostile receiver's socket."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.RCVTIMEO, 30_000)
    socket.connect(address)
    return socket


def router(context: Any) -> tuple[Any, str]:
    """A hostile sender's socket and its address."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.RCVTIMEO, 30_000)
    socket.bind("tcp://127.0.0.1:*")
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def hello_of(context: Any, receiver: Any) -> messages.Hello:
    """What a receiver sends first to any sender. This one refuses it, and so ends the room that it was for."""
    socket, address = router(context)
    reception = receiver.open(ROOM_MAX, address)
    identity, frame = socket.recv_multipart()
    sent = messages.decode_for_sender(frame)
    assert isinstance(sent, messages.Hello)
    cause = messages.Cause.HANDSHAKE
    refused = messages.Refused(source=77, target=sent.source, nonce=sent.nonce, cause=cause, detail="no")
    socket.send_multipart([identity, messages.encode(refused)])
    assert reception.exception(30) is not None
    socket.close(linger=0)
    return sent


def hello(context: Any, receiver: Any, *, source: int = ME, **other: Any) -> messages.Hello:
    """A hello as the given receiver would send it, under the name of ``source``."""
    return msgspec.structs.replace(hello_of(context, receiver), source=source, **other)


def incarnation_of(context: Any, sender: Any) -> int:
    """A sender names it to any peer that it has no session with."""
    socket = dealer(context, sender.address)
    socket.send(messages.encode(messages.Ping(source=ME)))
    incarnation: int = read(socket, messages.Stranger).source
    socket.close(linger=0)
    return incarnation


def read(socket: Any, kind: type) -> Any:
    """The next message of this kind that a hostile receiver gets."""
    while True:
        message = messages.decode_for_receiver(socket.recv())
        if isinstance(message, kind):
            return message


def garbage() -> list[bytes]:
    """Frames that are no message: noise, cut short, a field missing, wrong, or one too many, a gigabyte announced."""
    noise = random.Random(29)
    open_ = messages.encode(messages.Open(source=ME, target=5, room=1))
    fields = msgspec.msgpack.decode(open_)
    return [
        b"",
        b"\xc1",
        b"\xdb\x40\x00\x00\x00" + b"a" * 100,  # a string of a gigabyte
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\x91" * 5000,  # nested beyond all bounds
        b"\x81\xa4type\xa4open",
        *(noise.randbytes(n) for n in (1, 10, 100, 10_000)),
        *(open_[:n] for n in range(1, len(open_))),
        *(
            msgspec.msgpack.encode({k: v for k, v in fields.items() if k != name})
            for name in ("type", "source", "room")
        ),
        *(
            msgspec.msgpack.encode(fields | wrong)
            for wrong in (
                {"type": "announce"},
                {"type": "no such"},
                {"room": -1},
                {"room": 2**63},
                {"room": "1"},
                {"attempt": -1},
                {"source": 2**62},
                {"more": 1},
            )
        ),
    ]


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_garbage_to_a_sender(stage: Any, context: Any) -> None:
    """Each frame is refused and counted; correct rooms go on at the same time."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=2)
    socket = dealer(context, sender.address)
    frames = garbage()
    for number, frame in enumerate(frames):
        socket.send(frame)
        if number % 20 == 0:
            stage.move(sender, receiver, number, TOKENS).release()
    socket.send_multipart([b"one", b"two", b"three"])
    stage.until(lambda: sender.stats().frames_refused_total == len(frames) + 1, otherwise=sender.stats)
    stage.move(sender, receiver, 999, TOKENS)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_a_huge_frame_to_a_sender(stage: Any, context: Any) -> None:
    """The frame is not read; its connection ends, and no other."""
    sender, receiver = stage.sender(), stage.receiver()
    socket = dealer(context, sender.address)
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    socket.send(bytes(MESSAGE_BYTES_MAX + 1))
    assert monitor.poll(30_000)
    stage.move(sender, receiver, 1, TOKENS)
    assert sender.stats().frames_refused_total == 0


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_garbage_ends_the_session_of_who_sent_it(stage: Any, context: Any) -> None:
    """The rooms of that receiver end with a cause; rooms of other receivers go on."""
    sender, receiver = stage.sender(), stage.receiver()
    socket = dealer(context, sender.address)
    socket.send(messages.encode(hello(context, receiver)))
    mine = sender.offer(1, total_tokens=TOKENS)
    others = sender.offer(2, total_tokens=TOKENS)
    reception = receiver.open(2, sender.address)
    welcome = read(socket, messages.Welcome)
    socket.send(messages.encode(messages.Open(source=ME, target=welcome.source, room=1)))
    stage.until(lambda: sender.stats().rooms.get("announced") == 2)
    socket.send(b"garbage")
    assert stage.failure_of(mine).cause == "peer_lost"
    others.fill(stage.layout.empty(TOKENS))
    assert reception.result(30).report.total_tokens == TOKENS


@pytest.mark.failure_mode("identity-taken")
@pytest.mark.invariant("validation")
def test_a_message_under_anothers_name(stage: Any, context: Any, brake: Any) -> None:
    """``source`` has to match the identity of the socket; the peer that was named loses nothing."""
    sender, receiver = stage.sender(), stage.receiver()
    held = brake()
    stage.offer(sender, 1, TOKENS)
    reception = receiver.open(1, sender.address)
    held.wait_reached()
    victim, target = hello_of(context, receiver).source, incarnation_of(context, sender)
    socket = dealer(context, sender.address)
    for message in (
        messages.Abort(source=victim, target=target, room=1, cause=messages.Cause.ABORTED),
        messages.Done(source=victim, target=target, room=1),
        hello(context, receiver, source=victim, fields=("other",)),
    ):
        socket.send(messages.encode(message))
    stage.until(lambda: sender.stats().frames_refused_total == 3)
    held.release()
    stage.check(reception, TOKENS)


def with_a_thief(stage: Any, context: Any, *, takes_its_identity: bool) -> tuple[Any, Any, Any, Any]:
    """A room that is announced when another socket speaks for its receiver: sender, receiver, offer and reception."""
    sender, receiver = stage.sender(), stage.receiver(limits=stage.quick)
    offer = sender.offer(1, total_tokens=TOKENS)
    reception = receiver.open(1, sender.address)
    stage.until(lambda: sender.stats().rooms.get("announced") == 1)
    victim, target = hello_of(context, receiver).source, incarnation_of(context, sender)
    thief = dealer(context, sender.address, identity_of(victim, sender.address if takes_its_identity else ""))
    thief.send(messages.encode(messages.Ping(source=victim, target=target)))
    read(thief, messages.Pong)
    return sender, receiver, offer, reception


@pytest.mark.failure_mode("identity-taken")
def test_a_socket_that_takes_anothers_identity(stage: Any, context: Any) -> None:
    """The displaced peer detects the loss of its connection within its deadline and connects anew."""
    sender, receiver, offer, reception = with_a_thief(stage, context, takes_its_identity=True)
    assert stage.failure_of(reception).cause == "peer_lost"
    assert stage.failure_of(offer).cause == "peer_lost"
    stage.move(sender, receiver, 2, TOKENS)


@pytest.mark.failure_mode("identity-taken")
def test_a_socket_that_speaks_for_another(stage: Any, context: Any) -> None:
    """Answers go to the other socket only until the displaced peer sends its next request."""
    sender, _, offer, reception = with_a_thief(stage, context, takes_its_identity=False)
    offer.fill(payload(sender.layout, TOKENS, room=1))
    stage.check(reception, TOKENS)


@pytest.mark.failure_mode("grant-not-whole-blocks", "lying-peer")
@pytest.mark.invariant("alignment", "validation")
def test_grants_that_lie(stage: Any, context: Any) -> None:
    """Wrong sizes, blocks and rounds end their own room before a byte is written."""
    sender, receiver = stage.sender(), stage.receiver(num_blocks=8)
    socket = dealer(context, sender.address)
    socket.send(messages.encode(hello(context, receiver)))
    target = read(socket, messages.Welcome).source
    right: dict[str, Any] = {
        "round": 0,
        "start_token": 0,
        "allocated_tokens": 256,
        "block_indices": (0, 1),
        "ticket": 1,
    }
    lies: list[dict[str, Any]] = [
        {"allocated_tokens": 250},
        {"block_indices": (0, 0)},
        {"block_indices": (0, 8)},
        {"block_indices": (7, 2**19 - 1)},
        {"start_token": 1},
    ]
    for room, lie in enumerate(lies):
        offer = stage.offer(sender, room, TOKENS)
        common = {"source": ME, "target": target, "room": room}
        socket.send(messages.encode(messages.Open(**common)))
        socket.send(messages.encode(messages.Init(**common | right | lie)))
        assert stage.failure_of(offer).cause == "violation"
        assert read(socket, messages.Ended).cause == "violation"
    offer = stage.offer(sender, 99, TOKENS)
    socket.send(messages.encode(messages.Open(source=ME, target=target, room=99)))
    socket.send(messages.encode(messages.Done(source=ME, target=target, room=99)))
    assert stage.failure_of(offer).cause == "violation"
    assert sender.stats().rounds_total == 0
    stage.move(sender, receiver, 100, TOKENS)


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(
    "descriptor", [b"", b"\xc1", os.urandom(4096), b"\x95\xa5shm/2\xa9../../etc\xc4\x00\x01"]
)
def test_a_region_that_is_none(stage: Any, context: Any, descriptor: bytes) -> None:
    """Refused with the reason of each wire; no file or host of the peer's choice is opened."""
    sender, receiver = stage.sender(), stage.receiver()
    socket = dealer(context, sender.address)
    wires = ((stage.wire, descriptor), ("no such", b""))
    socket.send(messages.encode(hello(context, receiver, wires=wires)))
    refused = read(socket, messages.Refused)
    assert refused.cause == "wire_failed"
    assert "no such: not offered" in refused.detail
    stage.move(sender, receiver, 1, TOKENS)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
def test_garbage_to_a_receiver(stage: Any, context: Any) -> None:
    """Garbage from one sender ends its own rooms only."""
    # who is patient does not connect again meanwhile, and hears all that is sent
    patient = replace(stage.quick, peer_silence_s=10.0)
    sender, receiver = stage.sender(), stage.receiver(limits=patient)
    socket, address = router(context)
    frames = garbage()
    for room, frame in enumerate(frames[:12]):
        reception = receiver.open(room, address)
        good = receiver.open(1000 + room, sender.address)
        identity = socket.recv_multipart()[0]
        socket.send_multipart([identity, frame])
        assert stage.failure_of(reception).cause == "violation"
        stage.offer(sender, 1000 + room, TOKENS)
        stage.check(good, TOKENS).release()
    refused = receiver.stats().frames_refused_total
    for frame in frames[12:]:
        socket.send_multipart([identity, frame])
    expected = refused + len(frames) - 12
    stage.until(lambda: receiver.stats().frames_refused_total == expected, otherwise=receiver.stats)
    socket.close(linger=0)
    stage.move(sender, receiver, 2000, TOKENS)


@pytest.mark.failure_mode("lying-peer")
@pytest.mark.invariant("validation")
def test_a_sender_that_lies(stage: Any, context: Any) -> None:
    """False statements about layout, wire, sizes and progress end only the room concerned."""
    sender = stage.sender()
    receiver = stage.receiver(num_blocks=4, assembly_bytes=2**20, limits=stage.quick)
    fields, wire = stage.layout.describe(), stage.wire
    aux = (TOKENS, *[0] * 15)
    whole = {"total_tokens": TOKENS, "aux": aux, "content_hash": b"", "ready": True, "digests": (1, 2, 3)}
    short = whole | {"total_tokens": 16, "aux": (16, *aux[1:])}  # one round
    status = {"poll": 3, "round": 0}
    lies: list[tuple[str, list[tuple[type, dict[str, Any]]]]] = [
        ("handshake", [(messages.Welcome, {"fields": ("other",)})]),
        ("handshake", [(messages.Welcome, {"version": 99})]),
        ("violation", [(messages.Welcome, {"wire": "pigeon"})]),
        ("violation", [(messages.Welcome, {}), (messages.Announce, whole | {"total_tokens": 5})]),
        ("never_fits", [(messages.Welcome, {}), (messages.Announce, whole | {"total_tokens": 2**31 - 1, "aux": (2**31 - 1, *aux[1:])})]),
        ("violation", [(messages.Welcome, {}), (messages.Announce, whole), (messages.Status, status | {"sent_tokens": 2**31 - 1})]),
        ("corrupt", [(messages.Welcome, {}), (messages.Announce, short), (messages.Status, status)]),
    ]  # fmt: skip
    for number, (cause, lines) in enumerate(lies):
        socket, address = router(context)
        reception = receiver.open(number, address)
        for kind, lie in lines:
            identity, frame = socket.recv_multipart()
            said: Any = messages.decode_for_sender(frame)
            while kind is messages.Announce and not isinstance(said, messages.Open):
                said = messages.decode_for_sender(socket.recv_multipart()[1])
            while kind is messages.Status and not isinstance(said, messages.Init):
                said = messages.decode_for_sender(socket.recv_multipart()[1])
            common: dict[str, Any] = {"source": 77 + number, "target": said.source}
            if kind is messages.Welcome:
                common |= {"version": PROTOCOL_VERSION, "nonce": said.nonce, "fields": fields, "wire": wire}
            else:
                common |= {"room": number}
            if kind is messages.Status:
                common |= {"sent_tokens": 16}
            message = kind(**common | lie)
            socket.send_multipart([identity, messages.encode(message)])
        assert stage.failure_of(reception).cause == cause
        socket.close(linger=0)
        stage.move(sender, receiver, 1000 + number, TOKENS).release()
