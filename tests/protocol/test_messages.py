"""Messages: what goes in comes out; what is no whole, valid message raises ProtocolViolation, and nothing else."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedwire.errors import ProtocolViolation
from embedwire.limits import (
    BLOCKS_MAX,
    INCARNATION_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    ROOM_MAX,
    TOKENS_MAX,
)
from embedwire.protocol.messages import (
    Abort,
    Announce,
    Cause,
    Done,
    Ended,
    Hello,
    Init,
    Kept,
    Message,
    Open,
    Ping,
    Pong,
    Refused,
    ResumeTransfer,
    Status,
    Stranger,
    Welcome,
    cut,
    decode_for_receiver,
    decode_for_sender,
    encode,
)
from embedwire.protocol.states import Poll

LIFE: dict[str, Any] = {"source": INCARNATION_MAX, "target": 7}
ROOM: dict[str, Any] = {"room": ROOM_MAX, "attempt": 3}
GRANT: dict[str, Any] = {
    "round": 2,
    "start_token": 128,
    "allocated_tokens": 256,
    "block_indices": (9, 3),
    "ticket": 2**63 - 1,
}
TO_SENDER: list[Message] = [
    Hello(
        **LIFE,
        version=PROTOCOL_VERSION,
        nonce=4,
        fields=("a int32[]", "b bfloat16[8]"),
        block_size=128,
        num_blocks=5,
        wires=(("shm", b"x"),),
    ),
    Ping(**LIFE),
    Open(**LIFE, **ROOM),
    Init(**LIFE, **ROOM, **(GRANT | {"round": 0})),
    ResumeTransfer(**LIFE, **ROOM, **GRANT),
    Done(**LIFE, **ROOM),
    Abort(**LIFE, **ROOM, cause=Cause.DEADLINE, detail="too late"),
]
TO_RECEIVER: list[Message] = [
    Welcome(**LIFE, version=PROTOCOL_VERSION, nonce=4, fields=("a int32[]",), wire="shm"),
    Refused(**LIFE, nonce=4, cause=Cause.HANDSHAKE, detail="field 0"),
    Stranger(**LIFE),
    Pong(**LIFE),
    Kept(**LIFE, content_hash=b"h", tokens=3),
    Announce(
        **LIFE,
        **ROOM,
        total_tokens=TOKENS_MAX,
        aux=(TOKENS_MAX, -(2**31), *[0] * 14),
        content_hash=b"h",
        ready=True,
        digests=(2**64 - 1, 0),
    ),
    Status(**LIFE, **ROOM, poll=Poll.TRANSFERRING, round=2, sent_tokens=9),
    Ended(**LIFE, **ROOM, cause=Cause.DONE, certain=False),
]
Decode = Callable[[bytes], Message]
ALL: list[tuple[Message, Decode]] = [(m, decode_for_sender) for m in TO_SENDER] + [
    (m, decode_for_receiver) for m in TO_RECEIVER
]
BOTH = pytest.mark.parametrize("decode", [decode_for_sender, decode_for_receiver])
each = pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(m).__name__ for m, _ in ALL])


def changed(message: Message, **fields: object) -> bytes:
    """The message's frame with some fields of its map replaced; None takes one out."""
    content: dict[str, Any] = msgspec.msgpack.decode(encode(message)) | fields
    return msgspec.msgpack.encode({k: v for k, v in content.items() if v is not None})


@each
def test_round_trip(message: Message, decode: Decode) -> None:
    """Equal, and of the same type."""
    assert decode(encode(message)) == message
    assert type(decode(encode(message))) is type(message)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@each
def test_cut_short_at_every_byte(message: Message, decode: Decode) -> None:
    """No proper prefix of a message decodes."""
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(ProtocolViolation):
            decode(frame[:length])


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@each
def test_with_a_tail(message: Message, decode: Decode) -> None:
    """A message with trailing bytes does not decode."""
    for tail in (b"\x00", b"\xc0", encode(message)):
        with pytest.raises(ProtocolViolation):
            decode(encode(message) + tail)


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@each
def test_a_field_missing_or_unknown_or_of_another_type(message: Message, decode: Decode) -> None:
    """Fields without a default are required, unknown fields are refused, and each has its type."""
    needed = [f.encode_name for f in msgspec.structs.fields(message) if f.required]
    assert "source" in needed
    for name in [*needed, "type"]:
        with pytest.raises(ProtocolViolation):
            decode(changed(message, **{name: None}))
    with pytest.raises(ProtocolViolation):
        decode(changed(message, surprise=1))
    for field in msgspec.structs.fields(message):
        with pytest.raises(ProtocolViolation):
            decode(changed(message, **{field.encode_name: {"no": "such"}}))


@each
def test_the_other_side_does_not_take_it(message: Message, decode: Decode) -> None:
    """A message in the wrong direction is a violation."""
    other = decode_for_receiver if decode is decode_for_sender else decode_for_sender
    with pytest.raises(ProtocolViolation):
        other(encode(message))


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@pytest.mark.parametrize(
    ("index", "fields"),
    [
        (0, {"source": -1}),
        (0, {"source": INCARNATION_MAX + 1}),
        (0, {"num_blocks": 0}),
        (0, {"num_blocks": BLOCKS_MAX + 1}),
        (0, {"block_size": 0}),
        (0, {"fields": []}),
        (0, {"fields": ["x" * 501]}),
        (0, {"fields": ["x"] * 65}),
        (0, {"wires": []}),
        (0, {"wires": [["shm", b"x" * 4097]]}),
        (2, {"room": -1}),
        (2, {"room": ROOM_MAX + 1}),
        (2, {"attempt": -1}),
        (3, {"allocated_tokens": 0}),
        (3, {"allocated_tokens": TOKENS_MAX + 1}),
        (3, {"start_token": -1}),
        (3, {"block_indices": []}),
        (3, {"block_indices": [-1]}),
        (3, {"block_indices": [BLOCKS_MAX]}),
        (3, {"ticket": 0}),
        (3, {"ticket": 2**63}),
        (6, {"cause": "weather"}),
        (6, {"detail": "x" * 501}),
        (11, {"total_tokens": 0}),
        (11, {"aux": [0] * 15}),
        (11, {"aux": [0] * 17}),
        (11, {"aux": [2**31] + [0] * 15}),
        (11, {"content_hash": b"x" * 65}),
        (11, {"source_ms": -1.0}),
        (12, {"poll": 5}),
        (11, {"digests": [-1]}),
        (11, {"digests": [0] * 65}),
    ],
    ids=str,
)
def test_ranges(index: int, fields: dict[str, object]) -> None:
    """A number out of range or a list too long is refused while decoding."""
    message, decode = ALL[index]
    with pytest.raises(ProtocolViolation):
        decode(changed(message, **fields))


@pytest.mark.failure_mode("malformed-message")
@pytest.mark.invariant("validation")
@BOTH
@pytest.mark.parametrize(
    "head",
    [b"\xdb\x40\x00\x00\x00", b"\xc6\x40\x00\x00\x00", b"\xdd\x40\x00\x00\x00", b"\xdf\x40\x00\x00\x00"],
    ids=["string", "bytes", "array", "map"],
)
def test_a_gigabyte_announced(decode: Decode, head: bytes) -> None:
    """A length of 2**30 at any place allocates no memory and raises an error."""
    frames = [head, b"\x82\xa4type\xa4open\xa6source" + head, encode(TO_SENDER[0])[:-1] + head]
    frames += [b"\x83\xa4type\xa4init\xadblock_indices" + head, b"\x82\xa4type\xa8announce\xa7digests" + head]
    tracemalloc.start()
    for frame in frames:
        with pytest.raises(ProtocolViolation):
            decode(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


@BOTH
def test_a_frame_over_the_limit_is_not_looked_at(decode: Decode) -> None:
    """The largest grant still fits; one byte over the limit is refused by its length."""
    blocks = tuple(range(BLOCKS_MAX))
    grant = Init(source=1, room=1, round=0, start_token=0, allocated_tokens=1, block_indices=blocks, ticket=1)
    assert len(encode(grant)) < MESSAGE_BYTES_MAX
    assert decode_for_sender(encode(grant)) == grant
    with pytest.raises(ProtocolViolation, match=str(MESSAGE_BYTES_MAX)):
        decode(b"\x00" * (MESSAGE_BYTES_MAX + 1))


@BOTH
@given(frame=st.binary(max_size=200))
def test_noise_is_a_violation_or_a_message(decode: Decode, frame: bytes) -> None:
    """Whatever comes in, nothing but ProtocolViolation is raised."""
    with contextlib.suppress(ProtocolViolation):
        assert isinstance(decode(frame), Message)


@BOTH
def test_deep_nesting_is_a_violation(decode: Decode) -> None:
    """A stack of a hundred thousand arrays is refused as anything else is."""
    with pytest.raises(ProtocolViolation):
        decode(b"\x82\xa4type\xa4open\xa5extra" + b"\x91" * 100_000)


@pytest.mark.parametrize(
    ("message", "decode"), [pair for pair in ALL if isinstance(pair[0], Hello | Welcome)]
)
def test_a_greeting_of_another_version_is_understood_so_far(message: Any, decode: Decode) -> None:
    """Whatever else it has, and has not: so that both sides hear which versions they speak."""
    said = msgspec.to_builtins(message) | {"version": PROTOCOL_VERSION + 1, "codec": "none", "fields": 7}
    heard: Any = decode(msgspec.msgpack.encode(said))
    assert type(heard) is type(message)
    assert (heard.source, heard.version, heard.nonce) == (message.source, PROTOCOL_VERSION + 1, message.nonce)
    with pytest.raises(ProtocolViolation):
        decode(msgspec.msgpack.encode(said | {"version": PROTOCOL_VERSION}))


def test_a_text_for_people_is_cut() -> None:
    """What ``cut`` gives always fits into a message."""
    told = Abort(source=1, room=1, cause=Cause.ABORTED, detail=cut("é" * 1000))
    assert decode_for_sender(encode(told)) == told


def test_a_grant_is_one_short_line_however_many_blocks_it_has() -> None:
    grant = Init(
        source=1,
        room=7,
        round=0,
        start_token=0,
        allocated_tokens=512,
        block_indices=tuple(range(512)),
        ticket=9,
    )
    assert repr(grant) == (
        "Init(source=1, target=0, room=7, attempt=0, lane=0, round=0, start_token=0, allocated_tokens=512, "
        "blocks=0,1,2,3,… (512), ticket=9)"
    )
