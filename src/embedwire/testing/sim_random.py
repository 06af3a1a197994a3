"""Random worlds: sizes, pools, weather and faults drawn from a seed, run to rest, and judged. Also the command line.

A *mild* world has losses, doubling, delays and lost writes, which the protocol has to make good: every room succeeds. In a *harsh* one
processes freeze, die and return, links are cut, clients leave, and writes are in doubt: every room ends, and nothing is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from embedwire.errors import EmbedwireError
from embedwire.limits import Limits
from embedwire.protocol.messages import RoomKey
from embedwire.protocol.receiver import CorruptRoom
from embedwire.protocol.topology import Delivery
from embedwire.testing.sim_group import EncoderGroup
from embedwire.testing.sim_link import Weather
from embedwire.testing.sim_memory import TOKEN_BYTES
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode
from embedwire.testing.sim_transfer import Receiver, Sender, Transfer
from embedwire.testing.sim_wire import FENCED, ONE_SIDED, InvariantBroken, WireFaults
from embedwire.testing.sim_world import World

STORM_S = 40.0
"""Faults happen within this; then the weather clears up."""
CALM_S = STORM_S + 60.0
"""By then whoever was frozen or dead is back, and whoever subscribes has a session again."""
QUIET_S = CALM_S + 60.0
"""Subscriptions end then: a world with one never comes to rest."""
LAST = b"the last one"


class RandomWorld:
    """One world, drawn from one seed."""

    def __init__(self, seed: int, *, is_harsh: bool | None = None) -> None:
        self.world = World(seed)
        self.rng = rng = self.world.timeline.rng
        self.is_harsh = rng.random() < 0.7 if is_harsh is None else is_harsh
        self.world.limits = Limits(
            window_rounds=rng.choice((1, 1, 2, 4)), blocks_wait_s=600.0, open_wait_s=300.0
        )
        self._set_weather()
        self.has_groups = rng.random() < 0.4
        rooms = self._draw_rooms(rng.randint(2, 9 if self.has_groups else 24))
        largest = max(tokens for _, tokens in rooms) * TOKEN_BYTES
        self.senders = [self._add_sender(i, largest) for i in range(rng.randint(1, 3))]
        self.receivers = [self._add_receiver(i, largest) for i in range(rng.randint(1, 3))]
        self.transfers = [self._add_room(room, tokens) for room, tokens in rooms]
        self._subscribe(largest // TOKEN_BYTES)
        if self.is_harsh:
            for _ in range(rng.randint(1, 16)):
                self.world.after(rng.uniform(0, STORM_S), self._draw_fault())
        self.world.after(STORM_S, self._clear_up)

    def _subscribe(self, longest: int) -> None:
        """Some receivers hear of what some encoders make, and fetch most of it unasked."""
        rng, world = self.rng, self.world
        senders = [sender for group in self.senders if len(group.nodes) == 1 for sender in group.nodes]
        receivers = [receiver for receiver in self.receivers if isinstance(receiver, ReceiverNode)]
        if not senders or not receivers or rng.random() < 0.5:
            return
        world.on_heard = self._on_heard
        for receiver in receivers:
            for sender in rng.sample(senders, rng.randint(0, len(senders))):
                world.after(rng.uniform(0, STORM_S / 2), partial(receiver.subscribe, sender.address))
        for number in range(rng.randint(1, 12)):
            keep = partial(
                world.keep, b"made %d" % number, rng.randint(1, longest), sender=rng.choice(senders)
            )
            world.after(rng.uniform(0, STORM_S), keep)
        for sender in senders:
            world.after(CALM_S, partial(world.keep, LAST, 1, sender=sender))
        for receiver in receivers:
            world.after(QUIET_S, partial(self._end_subscriptions, receiver))

    def _on_heard(self, receiver: ReceiverNode, sender: SenderNode, item: bytes, tokens: int) -> None:
        if self.rng.random() < 0.7:
            room = 10_000 + len(self.transfers)
            self.transfers.append(self.world.fetch(room, item, tokens, sender=sender, receiver=receiver))

    def _end_subscriptions(self, receiver: ReceiverNode) -> None:
        for address in receiver.subscriptions:
            if not receiver.heard[address, LAST]:
                raise InvariantBroken(f"{receiver.address} no longer hears of {address}")
        receiver.unsubscribe()

    def run(self) -> Counter[str]:
        """To rest. Returns how rooms ended. Raises InvariantBroken."""
        self.world.settle()
        ends: Counter[str] = Counter()
        for transfer in self.transfers:
            ends[self._judge(transfer)] += 1
        return ends

    def _judge(self, transfer: Transfer) -> str:
        if not self.is_harsh:
            assert transfer.is_done, f"{transfer.key}: {transfer.sender_end}, {transfer.receiver_end}"
            for node in transfer.sender.nodes:
                sent = {lane.key: sum(lane.rounds) for lane in node.ends[transfer.key].lanes}
                assert sent == {key: len(share) for key, share in node.shares(transfer.key).items()}
        end = transfer.receiver_end
        return "not asked for" if end is None else end.value

    # ------------------------------------------------------------------ what is drawn

    def _set_weather(self) -> None:
        rng, worst = self.rng, 0.3 if self.is_harsh else 0.15
        self.world.link.weather = Weather(
            loss=rng.choice((0.0, rng.random() * worst)),
            doubling=rng.choice((0.0, rng.random() * worst)),
            lateness=rng.choice((0.0, rng.random() * 0.05)),
            delay_s=(0.0005, rng.choice((0.001, 0.02, 0.4 if self.is_harsh else 0.1))),
        )

    def _draw_rooms(self, count: int) -> list[tuple[int, int]]:
        longest = self.rng.choice((1, 50, 500, 2000))
        return [(room, self.rng.randint(1, longest)) for room in range(1, count)]

    def _add_sender(self, index: int, largest: int) -> Sender:
        rng, is_harsh = self.rng, self.is_harsh
        return self.world.add_encoder_group(
            f"encoder-{index + 1}",
            rng.choice((1, 2, 2, 3, 4)) if self.has_groups else 1,
            source_bytes=largest * rng.choice((1, 2, 100)),
            faults=WireFaults(
                slice_tokens=rng.choice((24, 64, 512)),
                slice_s=(0.0001, rng.choice((0.001, 0.05, 1.0 if is_harsh else 0.1))),
                lost=rng.choice((0.0, 0.02)) if is_harsh else 0.0,
                in_doubt=rng.choice((0.0, 0.01)) if is_harsh else 0.0,
            ),
        )

    def _add_receiver(self, index: int, largest: int) -> Receiver:
        rng = self.rng
        block_size = rng.choice((3, 16, 96, 128))
        setup: dict[str, Any] = {
            "block_size": block_size,
            "num_blocks": rng.choice((1, 2, 5, 32)),
            "default_allocate_tokens": block_size * rng.randint(1, 32),
            "assembly_bytes": largest * rng.choice((1, 2, 100)),
            "wire": rng.choice((FENCED, ONE_SIDED)),
            "read_s": rng.choice((0.0, 0.2)),
        }
        address, size = f"language-{index + 1}", rng.choice((1, 2, 2, 3, 4, 8))
        if size == 1 or not self.has_groups:
            return self.world.add_receiver(address, **setup)
        delivery: Delivery = rng.choice(("replicate", "share"))
        hosts = sorted(rng.choice("ab") for _ in range(size))
        step_s = (0.0001, rng.choice((0.001, 0.05, 1.0)))
        return self.world.add_group(
            address,
            size,
            delivery=delivery,
            hosts=hosts,
            step_s=step_s,
            agreement_timeout_s=rng.choice((5.0, 10.0)),
            **setup,
        )

    def _add_room(self, room: int, tokens: int) -> Transfer:
        rng = self.rng
        start_s = rng.choice((0.0, rng.uniform(0, STORM_S)))
        sender, receiver = rng.choice(self.senders), rng.choice(self.receivers)
        if isinstance(receiver, ReceiverNode) and len(sender.nodes) == 1 and rng.random() < 0.3:
            return self._add_item(room, tokens, sender, receiver, start_s)
        return self.world.request(
            room,
            tokens,
            sender=sender,
            receiver=receiver,
            offer_after_s=start_s + rng.choice((0.0, rng.uniform(0, 10))),
            open_after_s=start_s + rng.choice((0.0, rng.uniform(0, 10))),
            source_s=rng.choice((0.0, rng.uniform(0, 3))),
        )

    def _add_item(
        self, room: int, tokens: int, sender: Sender, receiver: ReceiverNode, start_s: float
    ) -> Transfer:
        """A room for an item: a new one, or one that other rooms are for, too. In a harsh world it may go before anybody asks for it."""
        kept = sender.nodes[0].setup.items
        name = self.rng.choice((b"%d" % room, *kept))
        kept.setdefault(name, tokens)
        if self.is_harsh and self.rng.random() < 0.2:
            self.world.after(self.rng.uniform(0, STORM_S), lambda: kept.pop(name, None))
        return self.world.fetch(
            room, name, kept[name], sender=sender, receiver=receiver, open_after_s=start_s
        )

    # ------------------------------------------------------------------ faults

    def _draw_fault(self) -> Callable[[], object]:
        rng, world = self.rng, self.world
        node, transfer = rng.choice(world.nodes), rng.choice(self.transfers)
        sender = rng.choice(rng.choice(self.senders).nodes)
        receiver = rng.choice(rng.choice(self.receivers).nodes)
        pause_s = rng.choice((0.1, 1.0, 8.0, 30.0))
        return rng.choice(
            (
                lambda: self._freeze(node, pause_s),
                lambda: self._freeze(sender, pause_s),
                lambda: self._kill(node, min(pause_s, 8.0)),
                lambda: world.link.cut(sender.address, receiver.address, for_s=pause_s),
                lambda: self._abort(transfer.sender, transfer.key),
                lambda: self._abort(transfer.receiver, transfer.key),
                lambda: self._abort_in_mid_write(sender),
                lambda: self._abort_in_mid_write(sender),
                lambda: self._garbage(sender, receiver),
            )
        )

    def _abort(self, side: Sender | Receiver, key: RoomKey) -> None:
        ranks = side.nodes if isinstance(side, EncoderGroup) else [side]
        for one in ranks:
            one.process.run(partial(one.abort, key))

    def _abort_in_mid_write(self, sender: SenderNode) -> None:
        """The clients of all rooms that this sender is writing at the moment have gone."""
        for wire in list(sender.wires.values()):
            if wire.running is not None:
                transfer = self.world.transfers[wire.running.of_room]
                self._abort(self.rng.choice((transfer.sender, transfer.receiver)), transfer.key)

    def _freeze(self, node: SenderNode | ReceiverNode, pause_s: float) -> None:
        self.world.timeline.note(f"freeze {node.address}")
        process = node.process
        process.freeze()
        self.world.after(pause_s, process.wake)

    def _kill(self, node: SenderNode | ReceiverNode, pause_s: float) -> None:
        if node.process.is_dead:
            return
        self.world.kill(node)
        group = next((g for g in self.world.groups.values() if node in g.nodes), None)
        if group is None:
            self.world.after(pause_s, lambda: self.world.restart(node))
        else:
            self.world.after(pause_s, lambda: self.world.restart_group(group))

    def _garbage(self, sender: SenderNode, receiver: ReceiverNode) -> None:
        frame = self.rng.randbytes(self.rng.randint(0, 60))
        self.world.deliver_to_receiver(receiver.address, frame, sender.address)
        self.world.deliver_to_sender(sender.address, frame, receiver.process.incarnation)

    def _clear_up(self) -> None:
        self.world.link.heal()
        for node in self.world.senders.values():
            node.setup.faults.lost = node.setup.faults.in_doubt = 0.0
        for group in self.world.groups.values():
            if group.is_lost:
                self.world.restart_group(group)


def run_seed(seed: int) -> tuple[RandomWorld, Counter[str]]:
    """Run one world to rest; prints its story and the line that replays it when something is broken."""
    drawn = RandomWorld(seed)
    try:
        return drawn, drawn.run()
    except (AssertionError, EmbedwireError, CorruptRoom, LookupError):
        print(drawn.world.story(), file=sys.stderr)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Run random worlds one after another and print what became of their rooms."""
    parser = argparse.ArgumentParser(description="random worlds in virtual time")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds from there on")
    chosen = parser.parse_args(arguments)
    ends: Counter[str] = Counter()
    events = 0
    for seed in range(chosen.seed, chosen.seed + chosen.runs):
        drawn, seen = run_seed(seed)
        ends += seen
        events += drawn.world.steps
        if chosen.runs == 1:
            print("\n".join(drawn.world.timeline.last_lines))
            print(f"trace {drawn.world.timeline.trace_hash}, messages {dict(drawn.world.link.count())}")
    print(f"{chosen.runs} worlds, {events} events, rooms: {dict(ends)}")
    return 0
