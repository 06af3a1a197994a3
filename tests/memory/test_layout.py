"""Layouts: sizes, fingerprints, and arrays seen as bytes without a copy."""

from __future__ import annotations

import numpy as np
import pytest

from embedwire.errors import ConfigurationError, UsageError
from embedwire.memory.layout import DTYPES, Field, Layout, item, multimodal


def test_sizes_of_a_prompt_room() -> None:
    layout = multimodal(1024, deepstack_levels=3)
    assert [f.token_bytes for f in layout] == [2048, 4, 12, 6144]
    assert layout.token_bytes == 8208


def test_rows_are_views_and_not_copies() -> None:
    layout = multimodal(4, deepstack_levels=2)
    arrays = layout.empty(6)
    for row, field in zip(layout.rows(arrays), layout, strict=True):
        assert row.shape == (6, field.token_bytes)
        assert np.shares_memory(row, arrays[field.name])
    assert np.shares_memory(
        layout.rows({n: a[2:4] for n, a in arrays.items()})[0], arrays["input_embeddings"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_can_be_seen_as_bytes(dtype: str) -> None:
    layout = item(3, dtype=dtype)
    (rows,) = layout.rows(layout.empty(0))
    assert rows.shape == (0, layout.token_bytes)
    (rows,) = layout.rows({"embeddings": np.ones((2, 3), DTYPES[dtype])})
    assert rows.tobytes() == np.ones((2, 3), DTYPES[dtype]).tobytes()


@pytest.mark.failure_mode("no-media")
def test_layouts_without_deepstack() -> None:
    """No levels mean no field; a deepstack of width zero is refused."""
    assert [f.name for f in multimodal(8)] == ["input_embeddings", "fill_ids", "mrope_positions"]
    assert [f.name for f in multimodal(8, mrope=False)] == ["input_embeddings", "fill_ids"]
    with pytest.raises(ConfigurationError, match="empty axis"):
        Field("deepstack_embeddings", "bfloat16", (0, 8))
    with pytest.raises(ConfigurationError, match="empty axis"):
        Field("deepstack_embeddings", "bfloat16", (3, 0))


@pytest.mark.failure_mode("layouts-differ")
def test_the_fingerprint_tells_layouts_apart() -> None:
    """Hidden size, dtype, number of fields, and a deepstack on one side only."""
    layouts = [
        multimodal(8),
        multimodal(16),
        multimodal(8, dtype="float16"),
        multimodal(8, mrope=False),
        multimodal(8, deepstack_levels=3),
        item(8),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert multimodal(8).fingerprint == multimodal(8).fingerprint


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("fill_ids", np.zeros(5, np.int64), "fill_ids"),
        ("fill_ids", np.zeros(5, ">i4"), "fill_ids"),
        ("fill_ids", np.zeros((5, 1), np.int32), "fill_ids"),
        ("fill_ids", np.zeros((), np.int32), "fill_ids"),
        ("mrope_positions", np.zeros((3, 5), np.int32).T, "C-contiguous"),
        ("fill_ids", np.zeros(10, np.int32)[::2], "C-contiguous"),
        ("fill_ids", np.zeros(4, np.int32), "fill_ids 4"),
        ("deepstack_embeddings", np.zeros(5, np.int32), "deepstack_embeddings"),
    ],
)
def test_arrays_that_do_not_match_are_refused(name: str, array: np.ndarray, words: str) -> None:
    layout = multimodal(4)
    with pytest.raises(UsageError, match=words):
        layout.rows({**layout.empty(5), name: array})


def test_a_missing_field_is_refused() -> None:
    layout = multimodal(4)
    arrays = layout.empty(5)
    del arrays["mrope_positions"]
    with pytest.raises(UsageError, match="mrope_positions"):
        layout.rows(arrays)


def test_layouts_that_make_no_sense_are_refused() -> None:
    for fields in ((), (Field("a", "int32"), Field("a", "uint8"))):
        with pytest.raises(ConfigurationError):
            Layout("BAD", fields)
    with pytest.raises(ConfigurationError, match="float8"):
        Field("a", "float8")
