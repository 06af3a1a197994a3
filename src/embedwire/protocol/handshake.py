"""How a session begins: what a receiver says of itself, and why either side would not go on. Owns no rooms.

Called by both cores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from embedwire.limits import PROTOCOL_VERSION
from embedwire.protocol.actions import Peer
from embedwire.protocol.messages import Cause, Hello, Ping, Refused, RoomKey, Welcome, cut

Problem = tuple[Cause, str]


@dataclass(frozen=True, slots=True)
class Offered:
    """What a receiver says of itself in ``hello``. ``fenced``: the wires whose receiver can enforce the end of a grant."""

    fields: tuple[str, ...]
    block_size: int
    num_blocks: int
    wires: tuple[tuple[str, bytes], ...]
    fenced: frozenset[str]

    def problem_with(self, welcome: Welcome) -> Problem | None:
        """Why there is no session with whoever said this."""
        if welcome.version != PROTOCOL_VERSION:
            return Cause.HANDSHAKE, f"sender speaks version {welcome.version}"
        if welcome.fields != self.fields:
            return Cause.HANDSHAKE, difference(welcome.fields, self.fields)
        if welcome.wire not in dict(self.wires):
            return Cause.VIOLATION, f"sender chose wire {welcome.wire!r}, which was not offered"
        return None


@dataclass(slots=True)
class ReceiverSession:
    """One sender, as a receiver knows it. ``incarnation`` is 0 until it has welcomed us; ``wire`` is None while we say hello,
    with this ``nonce``. ``is_fenced`` is about the last wire. One that ``subscribes`` is kept up without rooms."""

    heard_at: float
    nonce: int
    incarnation: int = 0
    wire: str | None = None
    is_fenced: bool = False
    rooms: set[RoomKey] = field(default_factory=set)
    subscribes: bool = False

    def question(self, offered: Offered, *, source: int) -> Hello | Ping:
        """What the session itself waits for an answer to."""
        if self.wire is not None:
            return Ping(source=source, target=self.incarnation)
        return Hello(
            source=source,
            version=PROTOCOL_VERSION,
            nonce=self.nonce,
            fields=offered.fields,
            block_size=offered.block_size,
            num_blocks=offered.num_blocks,
            wires=offered.wires,
            subscribes=self.subscribes,
        )

    def begin(self, welcome: Welcome, offered: Offered) -> None:
        """The sender has welcomed us."""
        self.incarnation, self.wire = welcome.source, welcome.wire
        self.is_fenced = welcome.wire in offered.fenced

    def is_other(self, welcome: Welcome, offered: Offered) -> bool:
        """Whether it is another process, or writes in another way, than the one that welcomed us before."""
        before = self.incarnation, self.is_fenced
        return self.incarnation != 0 and before != (welcome.source, welcome.wire in offered.fenced)


@dataclass(slots=True)
class SenderSession:
    """One receiver, as a sender knows it. ``wire`` is None while it is being attached. ``nonce`` is that of its latest hello; it
    ``subscribes`` once one of them has said so."""

    hello: Hello
    nonce: int
    heard_at: float
    subscribes: bool = False
    wire: str | None = None
    rooms: set[RoomKey] = field(default_factory=set)

    def welcome(self, fields: tuple[str, ...], *, source: int, wire: str) -> Welcome:
        """The answer to the latest hello."""
        return Welcome(
            source=source,
            target=self.hello.source,
            version=PROTOCOL_VERSION,
            nonce=self.nonce,
            fields=fields,
            wire=wire,
        )


def problem_with_hello(hello: Hello, fields: tuple[str, ...]) -> Problem | None:
    """Why a sender of these fields has no session with whoever said this."""
    if hello.source == 0:
        return Cause.VIOLATION, "incarnation 0"
    if hello.version != PROTOCOL_VERSION:
        return Cause.HANDSHAKE, f"protocol version: sender {PROTOCOL_VERSION}, receiver {hello.version}"
    if hello.fields != fields:
        return Cause.HANDSHAKE, difference(fields, hello.fields)
    return None


def refusal(peer: Peer, nonce: int, problem: Problem, *, source: int) -> Refused:
    """A sender's word that there is no session, and why."""
    cause, detail = problem
    return Refused(source=source, target=peer, nonce=nonce, cause=cause, detail=cut(detail))


def difference(sender_fields: tuple[str, ...], receiver_fields: tuple[str, ...]) -> str:
    """Which field of two layouts differs first, in words for both sides."""
    for index in range(max(len(sender_fields), len(receiver_fields))):
        ours = sender_fields[index] if index < len(sender_fields) else "none"
        theirs = receiver_fields[index] if index < len(receiver_fields) else "none"
        if ours != theirs:
            return f"layouts differ at field {index}: sender {ours}, receiver {theirs}"
    return "layouts are equal"
