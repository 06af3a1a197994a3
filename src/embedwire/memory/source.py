"""What a sender reads from: a room's own arrays, cut into pieces for a wire. Owns no memory and copies none.

It knows no transport: a piece is a plain (bytes, region offset), which the endpoint hands on. Called once a
slice, on the sender's write threads; a Source never changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embedwire.errors import UsageError
from embedwire.limits import AUX_BYTES
from embedwire.memory.geometry import PoolGeometry
from embedwire.memory.layout import Layout


class Source:
    """The arrays (T, *field.shape) of a whole room, checked once and kept alive. Nobody may change them."""

    def __init__(self, layout: Layout, arrays: Mapping[str, np.ndarray]) -> None:
        rows = layout.rows(arrays)
        self.layout = layout
        self.tokens = len(rows[0])
        self._bytes = tuple(r.reshape(-1).data.toreadonly() for r in rows)

    def pieces(
        self,
        geometry: PoolGeometry,
        block_indices: Sequence[int],
        *,
        start_token: int,
        token: int,
        tokens: int,
        aux: bytes | None = None,
    ) -> list[tuple[memoryview, int]]:
        """The room's tokens [token, token + tokens) as (source bytes, region offset), one a run and field.

        ``geometry`` and ``block_indices`` are the receiver's; the grant starts at the room's token
        ``start_token``. ``aux`` (AUX_BYTES) goes to the grant's first block; it is given with the first slice
        of round 0 only. Raises UsageError for tokens outside the room or the grant, and for another layout.
        """
        if geometry.layout.fields != self.layout.fields:
            raise UsageError(
                f"the room's layout is {self.layout.describe()}, the pool's {geometry.layout.describe()}"
            )
        if token < 0 or token + tokens > self.tokens:
            raise UsageError(
                f"tokens [{token}, {token + tokens}) are not inside the room's [0, {self.tokens})"
            )
        pieces = []
        for span in geometry.spans(block_indices, start=token - start_token, tokens=tokens):
            at = (token + span.token) * geometry.token_bytes[span.field_index]
            pieces.append((self._bytes[span.field_index][at : at + span.nbytes], span.offset))
        if aux is not None:
            if len(aux) != AUX_BYTES or not block_indices:
                raise UsageError(
                    f"aux of {len(aux)} bytes for {len(block_indices)} blocks; needs {AUX_BYTES} and a block"
                )
            pieces.append((memoryview(aux), geometry.aux_offset(block_indices[0])))
        return pieces
