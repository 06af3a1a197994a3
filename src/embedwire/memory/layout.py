"""Which fields a token carries. Owns their names, dtypes, per-token shapes and sizes in bytes; knows no pool.

A new modality is a new :class:`Field` in a :class:`Layout`, and no new code. Everything here is immutable:
any thread.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import numpy.typing as npt

from embedwire.errors import ConfigurationError, UsageError
from embedwire.limits import DETAIL_CHARS_MAX

Rows = npt.NDArray[np.uint8]
"""One field of some tokens as bytes: shape (tokens, field.token_bytes), C-contiguous."""

DTYPES: Mapping[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
}


@dataclass(frozen=True, slots=True)
class Field:
    """One thing that every token carries: a name, a key of DTYPES, and the shape of one token's value."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    token_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes that one token takes in this field."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigurationError(
                f"field {self.name!r}: dtype {self.dtype!r} is not one of {', '.join(DTYPES)}"
            )
        if any(n < 1 for n in self.shape):
            raise ConfigurationError(
                f"field {self.name!r}: shape {self.shape} has an empty axis; leave the field out"
            )
        object.__setattr__(self, "token_bytes", self.numpy_dtype.itemsize * math.prod(self.shape))

    @property
    def numpy_dtype(self) -> np.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields that the tokens of a room carry, in a fixed order. ``model`` says whose embeddings they are, where both sides have to
    mean the same one; what differs is refused at the handshake."""

    name: str
    fields: tuple[Field, ...]
    model: str = ""
    token_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes that one token takes over all fields."""

    def __post_init__(self) -> None:
        names = [f.name for f in self.fields]
        if not names or len(set(names)) != len(names):
            raise ConfigurationError(
                f"layout {self.name!r} needs at least one field and unique names, got {names}"
            )
        object.__setattr__(self, "token_bytes", sum(f.token_bytes for f in self.fields))

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    @property
    def fingerprint(self) -> str:
        """Equal for equal layouts: 16 hex digits of SHA-256 over their text form."""
        text = ";".join(self.describe())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> tuple[str, ...]:
        """One line a field, as it travels in the handshake, and one for the model where it counts."""
        model = (f"model {self.model}"[:DETAIL_CHARS_MAX],) if self.model else ()
        return (*(str(f) for f in self.fields), *model)

    def empty(self, tokens: int) -> dict[str, np.ndarray]:
        """Uninitialised arrays of shape (tokens, *field.shape), one a field."""
        return {f.name: np.empty((tokens, *f.shape), f.numpy_dtype) for f in self.fields}

    def rows(self, arrays: Mapping[str, np.ndarray]) -> tuple[Rows, ...]:
        """The arrays as bytes: one (T, field.token_bytes) view a field in the layout's order, no copy.

        Each array has to be of shape (T, *field.shape) with one T for all, in the field's dtype and
        C-contiguous. Raises UsageError that names the field which is not.
        """
        if arrays.keys() != (names := {f.name for f in self.fields}):
            raise UsageError(f"layout {self.name!r} has the fields {sorted(names)}, got {sorted(arrays)}")
        rows = tuple(_rows(f, arrays[f.name]) for f in self.fields)
        if len({len(r) for r in rows}) > 1:
            counts = ", ".join(f"{f.name} {len(r)}" for f, r in zip(self.fields, rows, strict=True))
            raise UsageError(f"the fields of layout {self.name!r} differ in tokens: {counts}")
        return rows


def _rows(field: Field, array: np.ndarray) -> Rows:
    if array.dtype != field.numpy_dtype or array.ndim < 1 or array.shape[1:] != field.shape:
        raise UsageError(f"field {field}: got an array of {array.dtype}{list(array.shape)}")
    if not array.flags.c_contiguous:
        raise UsageError(f"field {field}: the array of strides {array.strides} is not C-contiguous")
    return array.reshape(-1).view(np.uint8).reshape(len(array), field.token_bytes)


def multimodal(
    hidden_size: int, *, dtype: str = "bfloat16", mrope: bool = True, deepstack_levels: int = 0
) -> Layout:
    """The layout of a prompt room: one token is one position of the prompt."""
    fields = [Field("input_embeddings", dtype, (hidden_size,)), Field("fill_ids", "int32")]
    if mrope:
        fields.append(Field("mrope_positions", "int32", (3,)))
    if deepstack_levels:
        fields.append(Field("deepstack_embeddings", dtype, (deepstack_levels, hidden_size)))
    return Layout("MULTIMODAL", tuple(fields))


def item(width: int, *, dtype: str = "bfloat16", model: str = "") -> Layout:
    """The layout of an item room: one token is one row of an encoder's output."""
    return Layout("ITEM", (Field("embeddings", dtype, (width,)),), model)
