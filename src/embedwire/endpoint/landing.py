"""Where rooms land: the pool, the wires that write into it, and the way from its blocks into assemblies.

Owns the region and everything that points into it. It knows rounds, not rooms, and decides nothing. The driver's thread.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from embedwire.memory.allocator import BlockAllocator
from embedwire.memory.checksum import FieldDigests
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Layout, Rows
from embedwire.memory.pool import BlockPool
from embedwire.protocol.actions import Drain, Round
from embedwire.protocol.handshake import Offered
from embedwire.transports import open_inbound
from embedwire.transports.contract import Inbound


class Landing:
    """One region of ``num_blocks`` blocks of ``block_size`` tokens, reached over each of ``transports``, best first."""

    def __init__(
        self, layout: Layout, *, num_blocks: int, block_size: int, transports: Sequence[str], host: str
    ) -> None:
        self._layout = layout
        self._geometry = PoolGeometry(layout, block_size, num_blocks)
        self.blocks = BlockAllocator(num_blocks, block_size)
        self._inbounds = {name: open_inbound(name, host=host) for name in transports}
        first, *others = self._inbounds.values()
        try:
            region = first.allocate(self._geometry.region_bytes)
            for inbound in others:
                inbound.register(region)
        except BaseException:
            self._close_wires()
            raise
        self._pool: BlockPool | None = BlockPool(self._geometry, region)
        self._permitted: set[int] = set()

    def offered(self) -> Offered:
        """What senders are told of it."""
        return Offered(
            fields=self._layout.describe(),
            block_size=self._geometry.block_size,
            num_blocks=self._geometry.num_blocks,
            wires=tuple((name, inbound.descriptor()) for name, inbound in self._inbounds.items()),
            fenced=frozenset(name for name, inbound in self._inbounds.items() if inbound.is_fenced),
        )

    def wire(self, name: str | None) -> Inbound | None:
        """The receiving half of a wire."""
        return self._inbounds.get(name or "")

    def permit(self, granted: Round) -> None:
        """Let writes under the round's ticket reach its blocks, over the wires that hold others back."""
        self._permitted.add(granted.ticket)
        fenced = [inbound for inbound in self._inbounds.values() if inbound.is_fenced]
        spans = self._geometry.grant_spans(granted.block_indices) if fenced else []
        for inbound in fenced:
            inbound.permit(granted.ticket, spans)

    def revoke(self, ticket: int) -> None:
        """End a permission."""
        self._permitted.discard(ticket)
        for inbound in self._inbounds.values():
            inbound.revoke(ticket)

    def is_gone(self, incarnation: int) -> bool:
        """Proof, on every wire, that no write of that sender can land any more."""
        return all(inbound.is_gone(incarnation) for inbound in self._inbounds.values())

    def is_permitted(self, granted: Round) -> bool:
        """Whether the round's blocks are still its own."""
        return granted.ticket in self._permitted

    def drain(self, drain: Drain, assembly: Sequence[Rows], sums: FieldDigests) -> tuple[int, ...] | None:
        """Copy what has landed of a round into the assembly's rows, and update the checksums with it. Returns a copy of the aux row with
        the first tokens."""
        assert self._pool is not None
        blocks, start = drain.round.block_indices, drain.round.start_token
        self._pool.get_rows(
            blocks,
            assembly,
            row=drain.first_row + drain.from_token,
            start=drain.from_token - start,
            tokens=drain.to_token - drain.from_token,
            sums=sums,
            on_piece=os.sched_yield,  # to threads of messages that were put on this core, however idle the others are
        )
        return self._pool.read_aux(blocks[0]) if drain.from_token == 0 else None

    def close(self) -> None:
        """Unregister and free. Off the driver's thread, once that has ended."""
        self._pool = None  # its views have to be gone before the region is unmapped
        self._close_wires()

    def _close_wires(self) -> None:
        for inbound in reversed(self._inbounds.values()):
            inbound.close()
