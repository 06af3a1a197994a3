"""What travels on the control plane, and how it is checked before it changes anything.

A message is one MessagePack map, tagged by ``type``. Every message names the incarnation that said it and the one it is for
(0: not known yet), so what an earlier life of a process said can not touch the present one. Lengths and ranges that need no
other knowledge are checked while decoding; the rest is checked by the cores.

    receiver → sender                               sender → receiver
    hello            who I am, my layout and pool   welcome    the wire that we use
                                                    refused    we do not fit; which field differs
                                                    stranger   I do not know you; say hello again
    ping             are you there                  pong       yes
                                                    kept       there is this item now, who subscribes
    open             tell me about this room        announce   total, aux, content hash; whether the source is ready
    init             round 0: write here            status     how far it has landed
    resume_transfer  round n: go on here
    done             I have all of it               ended      the room is over, and why
    abort            end it, and why
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct

from embedwire.errors import ProtocolViolation
from embedwire.limits import (
    AUX_WORDS,
    BLOCKS_MAX,
    CONTENT_HASH_BYTES_MAX,
    DETAIL_CHARS_MAX,
    INCARNATION_MAX,
    LANES_MAX,
    MESSAGE_BYTES_MAX,
    PROTOCOL_VERSION,
    ROOM_MAX,
    TOKENS_MAX,
)
from embedwire.protocol.states import Poll

Incarnation = Annotated[int, Meta(ge=0, le=INCARNATION_MAX)]
Count = Annotated[int, Meta(ge=0, le=TOKENS_MAX)]
Positive = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
UInt64 = Annotated[int, Meta(ge=0)]
"""Bounded by MessagePack itself."""
Text = Annotated[str, Meta(max_length=DETAIL_CHARS_MAX)]
FieldLines = Annotated[tuple[Text, ...], Meta(min_length=1, max_length=64)]
BlockIndices = Annotated[
    tuple[Annotated[int, Meta(ge=0, lt=BLOCKS_MAX)], ...], Meta(min_length=1, max_length=BLOCKS_MAX)
]
ContentHash = Annotated[bytes, Meta(max_length=CONTENT_HASH_BYTES_MAX)]
Aux = Annotated[tuple[Int32, ...], Meta(min_length=AUX_WORDS, max_length=AUX_WORDS)]


class RoomKey(NamedTuple):
    """One try of one room on one of its ways. ``lane``: which way, from one encoder rank to one language rank; where each side is a
    single rank there is lane 0 alone. The cores treat every lane as a room of its own; ``protocol.rank`` puts them together."""

    room: int
    attempt: int = 0
    lane: int = 0

    @property
    def of_room(self) -> RoomKey:
        """The key of the room itself, which is that of its lane 0."""
        return RoomKey(self.room, self.attempt) if self.lane else self


class Cause(StrEnum):
    """Why a room ended. It reaches the other side, the client and the metrics under this name."""

    DONE = "done"
    ABORTED = "aborted"
    DEADLINE = "deadline"
    PEER_LOST = "peer_lost"
    NEVER_FITS = "never_fits"
    OVERLOADED = "overloaded"
    CORRUPT = "corrupt"
    VIOLATION = "violation"
    UNKNOWN_ROOM = "unknown_room"
    UNKNOWN_ITEM = "unknown_item"
    ENCODER_FAILED = "encoder_failed"
    WIRE_FAILED = "wire_failed"
    HANDSHAKE = "handshake"
    CLOSED = "closed"
    RANK_LOST = "rank_lost"


class Message(Struct, frozen=True, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    """``source`` said it, ``target`` is to read it."""

    source: Incarnation
    target: Incarnation = 0


class Hello(Message, tag="hello", frozen=True, kw_only=True):
    """A receiver's first message. ``wires`` holds (name, descriptor) in order of preference. ``nonce`` comes back in the answer, so
    that one which an earlier life of the sender gave to an earlier question is told from it. With ``subscribes`` it wants to hear of
    each item that the sender will keep from now on."""

    version: Count
    nonce: Count
    fields: FieldLines
    block_size: Positive
    num_blocks: Annotated[int, Meta(ge=1, le=BLOCKS_MAX)]
    wires: Annotated[
        tuple[tuple[Text, Annotated[bytes, Meta(max_length=4096)]], ...], Meta(min_length=1, max_length=16)
    ]
    subscribes: bool = False


class Welcome(Message, tag="welcome", frozen=True, kw_only=True):
    """The session is open; rounds go over ``wire``."""

    version: Count
    nonce: Count
    fields: FieldLines
    wire: Text


class Refused(Message, tag="refused", frozen=True, kw_only=True):
    """No session: the versions or layouts differ, no wire reaches, or there are too many sessions."""

    nonce: Count
    cause: Cause
    detail: Text


class Stranger(Message, tag="stranger", frozen=True, kw_only=True):
    """The message that this answers came from, or was for, an incarnation that is not known here."""


class Ping(Message, tag="ping", frozen=True, kw_only=True):
    """A receiver that waits for nothing but is still there."""


class Pong(Message, tag="pong", frozen=True, kw_only=True):
    """The answer to ping."""


class Kept(Message, tag="kept", frozen=True, kw_only=True):
    """To receivers that subscribe: there is an item of ``tokens`` tokens under this content hash now, and a room may be opened for it.
    Nobody waits for this message, so it is said once; where it is lost, the item is fetched when it is needed."""

    content_hash: ContentHash
    tokens: Positive


class RoomMessage(Message, frozen=True, kw_only=True):
    """It belongs to one attempt of one room, and to one lane of it."""

    room: Annotated[int, Meta(ge=0, le=ROOM_MAX)]
    attempt: Count = 0
    lane: Annotated[int, Meta(ge=0, lt=LANES_MAX)] = 0

    @property
    def key(self) -> RoomKey:
        return RoomKey(self.room, self.attempt, self.lane)


class Open(RoomMessage, tag="open", frozen=True, kw_only=True):
    """Tell me about this room, and tell me again when its source is ready. ``item`` is empty where the sender knows the room by its
    number. Else the receiver chose that number, and wants what the sender keeps under this content hash."""

    item: ContentHash = b""


class Announce(RoomMessage, tag="announce", frozen=True, kw_only=True):
    """A room's facts; ``total_tokens`` and ``digests`` are those of this lane, all else is the room's. ``ready``: its source can be
    written from; then ``digests`` are there, one XXH3-64 a field over the field's bytes of these tokens in order, and ``source_ms``, how
    long the encoder took."""

    total_tokens: Positive
    aux: Aux
    content_hash: ContentHash
    ready: bool
    digests: Annotated[tuple[UInt64, ...], Meta(max_length=64)] = ()
    source_ms: Annotated[float, Meta(ge=0)] = 0.0


class Grant(RoomMessage, frozen=True, kw_only=True):
    """Permission to write the tokens from ``start_token`` on into these blocks, in this order, under ``ticket``."""

    round: Count
    start_token: Count
    allocated_tokens: Positive
    block_indices: BlockIndices
    ticket: Annotated[int, Meta(ge=1, le=2**63 - 1)]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(source={self.source}, target={self.target}, room={self.room}, attempt={self.attempt}, "
            f"lane={self.lane}, round={self.round}, start_token={self.start_token}, "
            f"allocated_tokens={self.allocated_tokens}, blocks={in_short(self.block_indices)}, ticket={self.ticket})"
        )


class Init(Grant, tag="init", frozen=True, kw_only=True):
    """Round 0."""


class ResumeTransfer(Grant, tag="resume_transfer", frozen=True, kw_only=True):
    """Every later round."""


class Status(RoomMessage, tag="status", frozen=True, kw_only=True):
    """How far a room has got, at an event of round ``round``. ``sent_tokens`` is the contiguous landed prefix of the room."""

    poll: Poll
    round: Count = 0
    sent_tokens: Count = 0


class Done(RoomMessage, tag="done", frozen=True, kw_only=True):
    """Everything is where it is read; the source is no longer needed."""


class Abort(RoomMessage, tag="abort", frozen=True, kw_only=True):
    """End the room. It is answered by ``ended`` once no write of it is under way."""

    cause: Cause
    detail: Text = ""


class Ended(RoomMessage, tag="ended", frozen=True, kw_only=True):
    """The room is over. ``certain``: no write of it can land any more."""

    cause: Cause
    detail: Text = ""
    certain: bool = True


ToSender: TypeAlias = Hello | Ping | Open | Init | ResumeTransfer | Done | Abort
ToReceiver: TypeAlias = Welcome | Refused | Stranger | Pong | Kept | Announce | Status | Ended


class _AnyHello(Struct, tag_field="type", tag="hello"):
    """What every version's has, and keeps."""

    source: Incarnation
    version: Count
    nonce: Count

    def in_our_words(self) -> Hello:
        """Enough of one to be refused."""
        return Hello(
            source=self.source,
            version=self.version,
            nonce=self.nonce,
            fields=("unknown",),
            block_size=1,
            num_blocks=1,
            wires=(("unknown", b""),),
        )


class _AnyWelcome(Struct, tag_field="type", tag="welcome"):
    """What every version's has, and keeps."""

    source: Incarnation
    target: Incarnation
    version: Count
    nonce: Count

    def in_our_words(self) -> Welcome:
        """Enough of one to be refused."""
        return Welcome(
            source=self.source,
            target=self.target,
            version=self.version,
            nonce=self.nonce,
            fields=("unknown",),
            wire="unknown",
        )


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_to_sender: msgspec.msgpack.Decoder[ToSender] = msgspec.msgpack.Decoder(ToSender)
_to_receiver: msgspec.msgpack.Decoder[ToReceiver] = msgspec.msgpack.Decoder(ToReceiver)
_any_hello = msgspec.msgpack.Decoder(_AnyHello)
_any_welcome = msgspec.msgpack.Decoder(_AnyWelcome)


_NOT_READABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def encode(message: Message) -> bytes:
    """One message as it travels."""
    return _encoder.encode(message)


def decode_for_sender(frame: bytes) -> ToSender:
    """Raises ProtocolViolation for whatever is not a whole, valid message to a sender. Of a hello of another version only that is told."""
    return _decode(_to_sender, frame, lambda f: _any_hello.decode(f).in_our_words())


def decode_for_receiver(frame: bytes) -> ToReceiver:
    """Raises ProtocolViolation for whatever is not a whole, valid message to a receiver. Of a welcome of another version only that is
    told."""
    return _decode(_to_receiver, frame, lambda f: _any_welcome.decode(f).in_our_words())


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes, greeting: Callable[[bytes], T]) -> T:
    if len(frame) > MESSAGE_BYTES_MAX:
        raise ProtocolViolation(f"a message of {len(frame)} bytes; at most {MESSAGE_BYTES_MAX} are read")
    try:
        return decoder.decode(frame)
    except _NOT_READABLE as error:
        with suppress(*_NOT_READABLE):
            greeted = greeting(frame)
            if getattr(greeted, "version", PROTOCOL_VERSION) != PROTOCOL_VERSION:
                return greeted
        raise ProtocolViolation(f"not a message: {error}") from error


def in_short(block_indices: Sequence[int]) -> str:
    """Block indices for a log line: a round may have thousands."""
    first = ",".join(map(str, block_indices[:4]))
    return f"{first},… ({len(block_indices)})" if len(block_indices) > 4 else first


def cut(detail: str) -> str:
    """A text for people, cut to what a message may carry."""
    return detail[:DETAIL_CHARS_MAX]
