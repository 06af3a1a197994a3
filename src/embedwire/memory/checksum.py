"""A sum over what a room carried, to compare on both sides. Owns one running XXH3 a field; knows no blocks.

The sums depend on the fields' bytes in token order and on nothing else: any cut into updates, block size and
grant gives the same ones. xxhash releases the GIL for large updates (seen with 4.1.0: at 1 MiB and above, not
at 64 KiB), so hash in slices, not rows. An object belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xxhash

from embedwire.memory.layout import Layout, Rows


class FieldDigests:
    """Running sums, one a field. They find damage and mix-ups; a forger could match them."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sums = tuple(xxhash.xxh3_64() for _ in layout)

    def update(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Add the next tokens: arrays as :meth:`Layout.rows` wants them, read in place. Raises as it does."""
        for total, rows in zip(self._sums, self._layout.rows(arrays), strict=True):
            total.update(rows.reshape(-1).data)

    def add(self, index: int, rows: Rows) -> None:
        """Add the next tokens of field ``index`` alone, as bytes."""
        self._sums[index].update(rows.data)

    def digest(self) -> tuple[int, ...]:
        """One unsigned 64-bit number a field, in the layout's order, over all tokens so far."""
        return tuple(total.intdigest() for total in self._sums)
