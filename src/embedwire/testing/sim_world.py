"""A world in virtual time: any number of senders and receivers over one seeded link, with everything that goes wrong.

Time jumps to the next delivery or deadline, so minutes take milliseconds, and a seed replays a run exactly. After every event
``sim_checks`` checks the invariants. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from embedwire.errors import OverloadedError
from embedwire.limits import Limits
from embedwire.protocol.actions import Heard, Peer
from embedwire.protocol.messages import Message, RoomKey
from embedwire.protocol.topology import Delivery, RankGroup
from embedwire.testing.sim_checks import Checks, check_rest
from embedwire.testing.sim_group import EncoderGroup, Group, RankNode
from embedwire.testing.sim_link import Link, Weather
from embedwire.testing.sim_receiver import ReceiverNode, ReceiverSetup
from embedwire.testing.sim_sender import SenderNode, SenderSetup
from embedwire.testing.sim_timeline import NEVER, Timeline
from embedwire.testing.sim_transfer import Receiver, Sender, Transfer
from embedwire.testing.sim_wire import InvariantBroken, Target

STEPS_MAX = 100_000
"""A world that has not come to rest after so many events never will."""


class World:
    """Nodes, their link and their time. Methods that change it act at the present moment."""

    def __init__(
        self, seed: int = 0, *, limits: Limits | None = None, weather: Weather | None = None
    ) -> None:
        self.seed = seed
        self.limits = limits or Limits()
        self.timeline = Timeline(seed)
        self.link = Link(self.timeline, weather or Weather())
        self.senders: dict[str, SenderNode] = {}
        self.receivers: dict[str, ReceiverNode] = {}
        self.transfers: dict[RoomKey, Transfer] = {}
        self.steps = 0
        self.groups: dict[str, Group] = {}
        self.on_heard: Callable[[ReceiverNode, SenderNode, bytes, int], None] = lambda *_: None
        """Called where a receiver hears of an item: who, from whom, the content hash, and tokens."""
        self._lives = 1000
        self._life_of: dict[int, ReceiverNode] = {}
        self._died_at: dict[int, float] = {}
        self._made: dict[tuple[str, bytes], int] = {}
        self._checks = Checks()

    # ------------------------------------------------------------------ who is there

    def add_sender(
        self, address: str = "encoder-1", *, rank: int = 0, ranks: int = 1, **setup: object
    ) -> SenderNode:
        """An encoder, or one rank of it; ``setup`` are fields of SenderSetup."""
        node = SenderNode(
            address,
            replace(SenderSetup(self.limits), **setup),  # type: ignore[arg-type]
            timeline=self.timeline,
            say=self._to_receiver,
            reach=self._reach,
            rank=rank,
            ranks=ranks,
        )
        self.senders[address] = node
        node.start(self._new_life())
        return node

    def add_encoder_group(self, address: str = "encoder-1", size: int = 1, **setup: object) -> EncoderGroup:
        """An encoder of several ranks."""
        return EncoderGroup(
            address,
            [self.add_sender(f"{address}/{rank}", rank=rank, ranks=size, **setup) for rank in range(size)],
        )

    def add_group(
        self,
        address: str = "language-1",
        size: int = 2,
        *,
        delivery: Delivery = "replicate",
        hosts: Sequence[str] = (),
        agreement_timeout_s: float = 10.0,
        step_s: tuple[float, float] = (0.0005, 0.005),
        **setup: object,
    ) -> Group:
        """A language server of several ranks, all on one host unless told; ``setup`` are fields of each one's ReceiverSetup."""
        ranks = RankGroup(tuple(hosts) or ("",) * size, delivery)
        group = self.groups[address] = Group(
            address,
            ranks,
            timeline=self.timeline,
            agreement_timeout_s=agreement_timeout_s,
            step_s=step_s,
        )
        for rank in range(ranks.size):
            node = RankNode(
                f"{address}/{rank}", group=ranks, rank=rank, on_end=group.on_end, **self._of_receiver(setup)
            )
            group.nodes.append(node)
            self._add(node)
        return group

    def add_receiver(self, address: str = "language-1", **setup: object) -> ReceiverNode:
        """A language server of one rank; ``setup`` are fields of ReceiverSetup."""
        node = ReceiverNode(address, **self._of_receiver(setup))
        self._add(node)
        return node

    def _of_receiver(self, setup: dict[str, Any]) -> dict[str, Any]:
        return {
            "setup": replace(ReceiverSetup(self.limits), **setup),
            "timeline": self.timeline,
            "say": self._to_sender,
            "is_gone": self._is_gone,
            "on_heard": self._on_heard,
        }

    def _add(self, node: ReceiverNode) -> None:
        self.receivers[node.address] = node
        self._life_of[self._new_life()] = node
        node.start(self._lives)

    @property
    def nodes(self) -> list[SenderNode | ReceiverNode]:
        """Everybody."""
        return [*self.senders.values(), *self.receivers.values()]

    def _new_life(self) -> int:
        self._lives += 1
        return self._lives

    def kill(self, node: SenderNode | ReceiverNode) -> None:
        """End a node's process."""
        self.timeline.note(f"kill {node.address}")
        self._died_at[node.process.incarnation] = self.timeline.now
        node.kill()

    def restart(self, node: SenderNode | ReceiverNode) -> None:
        """A new process on the same address."""
        if not node.process.is_dead:
            self.kill(node)
        node.start(self._new_life())
        if isinstance(node, ReceiverNode):
            self._life_of[self._lives] = node
        self.timeline.note(f"start {node.address} as {self._lives}")

    def restart_group(self, group: Group) -> None:
        """A lost group, or one that has lost a rank, begins anew as a whole."""
        group.start()
        for node in group.nodes:
            self.restart(node)

    def _is_gone(self, incarnation: int, proof_s: float) -> bool:
        died_at = self._died_at.get(incarnation)
        return died_at is not None and self.timeline.now >= died_at + proof_s

    # ------------------------------------------------------------------ rooms

    def request(
        self,
        room: int,
        total_tokens: int,
        *,
        sender: Sender | None = None,
        receiver: Receiver | None = None,
        attempt: int = 0,
        offer_after_s: float = 0.0,
        open_after_s: float = 0.0,
        source_s: float = 0.0,
    ) -> Transfer:
        """What a router does: tell an encoder and a language server of a room (the first of each, unless told)."""
        sender = sender or next(iter(self.senders.values()))
        receivers: list[Receiver] = [*self.groups.values(), *self.receivers.values()]
        receiver = receiver or receivers[0]
        readers = len(receiver.ranks.readers) if isinstance(receiver, Group) else 1
        transfer = Transfer(RoomKey(room, attempt), total_tokens, sender, receiver)
        self.transfers[transfer.key] = transfer
        key = transfer.key
        for node in sender.nodes:
            node.expect(key, readers=readers)
            self.after(offer_after_s, partial(self._offer, node, transfer, source_s))
        self.after(open_after_s, lambda: receiver.process.run(lambda: self._open(transfer)))
        return transfer

    def fetch(
        self,
        room: int,
        item: bytes,
        total_tokens: int,
        *,
        sender: Sender,
        receiver: ReceiverNode,
        open_after_s: float = 0.0,
    ) -> Transfer:
        """What a reader of items does: it opens a room, of its own choice, for what the only rank of ``sender`` keeps under a hash."""
        transfer = Transfer(RoomKey(room), total_tokens, sender, receiver)
        self.transfers[transfer.key] = transfer
        self.after(open_after_s, lambda: receiver.process.run(lambda: self._open(transfer, item=item)))
        return transfer

    def keep(self, item: bytes, total_tokens: int, *, sender: SenderNode) -> None:
        """An encoder has made something, and tells who subscribes."""
        self._made[sender.address, item] = total_tokens
        sender.process.run(lambda: sender.keep(item, total_tokens))

    def _on_heard(self, receiver: ReceiverNode, heard: Heard) -> None:
        made = self._made.get((heard.address, heard.content_hash))
        if made != heard.tokens or heard.address not in receiver.subscriptions:
            raise InvariantBroken(f"{receiver.address} heard of {heard}, of which {made} tokens were made")
        self.on_heard(receiver, self.senders[heard.address], heard.content_hash, heard.tokens)

    def _offer(self, node: SenderNode, transfer: Transfer, source_s: float) -> None:
        node.process.run(lambda: node.request(transfer.key, transfer.total_tokens, source_s=source_s))

    def _open(self, transfer: Transfer, **more: bytes) -> None:
        try:
            transfer.receiver.open(transfer.key, [node.address for node in transfer.sender.nodes], **more)
        except OverloadedError:
            transfer.is_refused_at_once = True

    # ------------------------------------------------------------------ messages

    def _to_sender(self, origin: str, address: str, message: Message) -> None:
        peer = message.source
        self.link.send(
            origin, address, message, deliver=lambda frame: self.deliver_to_sender(address, frame, peer)
        )

    def deliver_to_sender(self, address: str, frame: bytes, origin: Peer) -> None:
        """A frame reaches whoever lives at ``address`` now."""
        node = self.senders[address]
        node.process.run(lambda: node.on_frame(frame, origin=origin))

    def _to_receiver(self, origin: str, peer: Peer, message: Message) -> None:
        node = self._life_of.get(peer)
        if node is not None:
            self.link.send(
                origin,
                node.address,
                message,
                deliver=lambda frame: self.deliver_to_receiver(node.address, frame, origin),
            )

    def deliver_to_receiver(self, address: str, frame: bytes, origin: str) -> None:
        """A frame reaches whoever lives at ``address`` now."""
        node = self.receivers[address]
        node.process.run(lambda: node.on_frame(frame, origin=origin))

    def _reach(self, origin: str, peer: Peer) -> Target | None:
        node = self._life_of.get(peer)
        if node is None or node.process.incarnation != peer or node.process.is_dead:
            return None
        return node.target(lambda: self.now < self.link.cut_until(origin, node.address))

    # ------------------------------------------------------------------ time

    @property
    def now(self) -> float:
        """Seconds since the world began."""
        return self.timeline.now

    def after(self, delay_s: float, call: Callable[[], object]) -> None:
        """Something happens to the world later."""
        self.timeline.after(delay_s, call)

    def step(self) -> bool:
        """The next event, and the checks. False: nothing is due any more."""
        due, node = self._next_tick()
        event = self.timeline.next_event
        if min(due, event) == NEVER:
            return False
        if node is None or event <= due:
            self.timeline.run_next()
        else:
            self.timeline.now = max(self.timeline.now, due)
            node.tick()
        for receiver in self.receivers.values():
            if receiver.core.admission.quarantined:
                receiver.process.run(receiver.look_for_proof)
        for group in self.groups.values():
            group.look()
        self.steps += 1
        self._checks.after_event(self.senders.values(), self.receivers.values())
        return True

    def _next_tick(self) -> tuple[float, SenderNode | ReceiverNode | None]:
        first: tuple[float, SenderNode | ReceiverNode | None] = (NEVER, None)
        for node in self.nodes:
            if not node.process.is_dead and not node.process.is_frozen:
                due = node.core.next_due()
                if due is not None and due < first[0]:
                    first = (due, node)
        return first

    def run(self, *, for_s: float) -> None:
        """Let so much time pass."""
        end = self.timeline.now + for_s
        while min(self.timeline.next_event, self._next_tick()[0]) <= end:
            self._step_or_stop()
        self.timeline.now = end

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Go on until something is so. Raises InvariantBroken when the world comes to rest before."""
        while not condition():
            if not self._step_or_stop():
                raise InvariantBroken("the world has come to rest before that")

    def settle(self) -> None:
        """Go on until nothing is due any more; then everything has to be where it was."""
        while self._step_or_stop():
            pass
        check_rest(self.senders.values(), self.receivers.values())
        for group in self.groups.values():
            if not group.is_at_rest:
                raise InvariantBroken(f"{group.address} has not come to rest")

    def _step_or_stop(self) -> bool:
        if self.steps >= STEPS_MAX:
            raise InvariantBroken(f"not at rest after {self.steps} events")
        return self.step()

    def story(self) -> str:
        """The last lines of the trace, and how to see them again."""
        return "\n".join((*self.timeline.last_lines, f"replay: make sim SEED={self.seed}"))
