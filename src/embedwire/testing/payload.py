"""Content for tests: bytes that say which room, field and token they belong to. Owns no state; any thread.

The bytes of different rooms, fields and tokens differ, so one that landed in the wrong place is seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from embedwire.memory.layout import Layout


def payload(layout: Layout, tokens: int, *, room: int = 0) -> dict[str, np.ndarray]:
    """Arrays (tokens, *field.shape) of random bytes, the same ones for the same room and number of tokens.

    The bits are arbitrary (NaN among them): compare bytes (:func:`differing`), not values.
    """
    arrays = {}
    for index, field in enumerate(layout):
        size = tokens * field.token_bytes
        raw = np.random.default_rng([room, index]).integers(0, 256, size, np.uint8)
        arrays[field.name] = raw.view(field.numpy_dtype).reshape(tokens, *field.shape)
    return arrays


def cut(arrays: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
    """The tokens [start, stop) of all fields, as views."""
    return {name: array[start:stop] for name, array in arrays.items()}


def differing(
    layout: Layout, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[str]:
    """The names of the fields whose bytes or number of tokens differ; empty when all are equal."""
    pairs = zip(layout, layout.rows(expected), layout.rows(found), strict=True)
    return [field.name for field, a, b in pairs if not np.array_equal(a, b)]
