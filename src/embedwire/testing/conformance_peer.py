"""The other process of the conformance suite: a receiver that waits, or a sender that writes until it is
killed.

Started as ``python -m embedwire.testing.conformance_peer MODULE:FUNCTION receive|send …``; the first argument
names the function that returns the :class:`~embedwire.testing.wires.Wire`. Ends with its standard
input.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module

from embedwire.testing.wires import PATIENCE_S, Wire
from embedwire.transports.contract import Piece, Slice


def receive(wire: Wire, nbytes: int) -> None:
    """Print the descriptor of a region whose ticket 1 is open, and wait."""
    inbound = wire.inbound()
    inbound.allocate(nbytes)
    inbound.permit(1, [(0, nbytes)])
    print(inbound.descriptor().hex(), flush=True)
    sys.stdin.read()
    inbound.close()


def send(wire: Wire, descriptor: bytes, *, sender_token: int, ticket: int, nbytes: int) -> None:
    """Write without end; print ``landed`` when the first slice has."""
    region = wire.outbound().connect(descriptor, sender_token=sender_token, timeout_s=PATIENCE_S)
    source = memoryview(b"\xab" * nbytes)

    def slices() -> Iterator[Slice]:
        while True:
            yield [Piece(source, 0)]

    reported = False

    def on_landed(_: int) -> None:
        nonlocal reported
        if not reported:
            reported = True
            print("landed", flush=True)

    region.write(ticket, slices(), is_permitted=lambda: True, on_landed=on_landed, timeout_s=PATIENCE_S)


def main(importable_as: str, role: str, *args: str) -> None:
    module, _, function = importable_as.partition(":")
    wire: Wire = getattr(import_module(module), function)()
    if role == "receive":
        receive(wire, int(args[0]))
    else:
        descriptor, sender_token, ticket, nbytes = args
        send(
            wire,
            bytes.fromhex(descriptor),
            sender_token=int(sender_token),
            ticket=int(ticket),
            nbytes=int(nbytes),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
