"""Which rank of an encoder runs its tower over which images of a prompt.

Owns that division, and the cutting of pixels by images. Must not know models, groups or threads: pure functions over numpy arrays, called
by ``encoder``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def shares_of(counts: Sequence[int], size: int) -> list[slice]:
    """Which images each of ``size`` ranks encodes: neighbours, with about as many of the rows that ``counts`` says of each image."""
    middles = np.cumsum(counts) - np.asarray(counts) / 2
    firsts = np.searchsorted(middles, np.arange(size + 1) * (sum(counts) / size))
    return [slice(int(first), int(stop)) for first, stop in itertools.pairwise(firsts)]


def images_of(pixels: Mapping[str, np.ndarray], images: slice) -> Mapping[str, np.ndarray]:
    """The pixels of some images of a prompt. With a grid an image has as many patches as its grid, else one entry."""
    if "image_grid_thw" not in pixels:
        return {name: array[images] for name, array in pixels.items()}
    grids = pixels["image_grid_thw"]
    ends = np.cumsum([0, *grids.prod(-1)])
    patches = pixels["pixel_values"][ends[images.start] : ends[images.stop]]
    return {"pixel_values": patches, "image_grid_thw": grids[images]}
