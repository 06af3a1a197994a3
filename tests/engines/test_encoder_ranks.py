"""An encoder on several ranks: real processes over Gloo, against one rank and the undivided model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedwire.encode.interface import ChatPrompt
from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.generation import TransformersLanguage
from embedwire.engines.transformers.image_shares import images_of, shares_of
from embedwire.engines.transformers.reference import greedy_ids
from embedwire.errors import RankError
from embedwire.language.interface import AssembledPrompt

sys.path.insert(0, str(Path(__file__).parent))  # so that the other processes can import it by its name
from rank_worker import STEPS, Group, ask, count_rows

pytestmark = [pytest.mark.model, pytest.mark.e2e]


def test_a_tower_that_fails_ends_the_group(tiny_model_dir, monkeypatch) -> None:
    with Group(2) as group:
        for pipe in group.pipes:
            pipe.send(("encode", tiny_model_dir("llava")))
        engine = TransformersEncoder(
            str(tiny_model_dir("llava")), dtype="float32", tensor_parallel=group.ranks
        )
        prepared = engine.prepare(chat([]))
        monkeypatch.setattr(engine, "_encode_one", lambda _: 1 / 0)
        for _ in range(2):
            with pytest.raises(RankError, match="division by zero"):
                list(engine.encode([prepared]))
        with pytest.raises(RankError, match="division by zero"):
            engine.prepare(chat([]))
        engine.close()


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with Group(request.param) as group:
        yield group
        assert group.close() == [0] * (request.param - 1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava"])
def test_every_rank_has_what_one_rank_makes(family: str, group: Group, tiny_model_dir, picture) -> None:
    """Three images, fewer images than ranks, and none: each image is run once, and ids are those of the undivided model."""
    model = tiny_model_dir(family)
    for pipe in group.pipes:
        pipe.send(("encode", model))
    engine = TransformersEncoder(str(model), dtype="float32", tensor_parallel=group.ranks)
    alone = TransformersEncoder(str(model), dtype="float32")
    rows = count_rows(engine)
    media = [picture(84, 56, 1), picture(56, 112, 2), picture(56, 56, 3)]
    prompts = [chat(media), chat(media[:1]), chat([])]
    prepared = [replace(engine.prepare(prompt), key=(n, 0)) for n, prompt in enumerate(prompts)]
    encoded: list[Any] = list(engine.encode(prepared))
    engine.close()
    others = group.hear()
    for n, (own, one) in enumerate(zip(encoded, alone.encode(prepared), strict=True)):
        for other in others:
            assert other[n][0] == (n, 0)
            check_equal(other[n][1], own, atol=0)
        check_equal(own, one, atol=1e-4)
    images = [int((one["fill_ids"] == engine._image_token_id).sum()) for one in encoded]
    assert sum(rows) + sum(sum(other[-1]) for other in others) == sum(images)
    assert 0 < sum(rows) < sum(images)
    prompt = AssembledPrompt(**encoded[0], mrope_position_delta=prepared[0].mrope_position_delta)
    language = TransformersLanguage(str(model), dtype="float32")
    ids = ask(language, prompt).wait().ids
    language.close()
    assert ids == greedy_ids(str(model), prompts[0], max_tokens=STEPS, dtype="float32")


def chat(media: list[bytes]) -> ChatPrompt:
    parts = [{"type": "image"}] * len(media)
    return ChatPrompt([{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}]}], media)


def check_equal(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], *, atol: float) -> None:
    assert own.keys() == other.keys()
    for name, array in own.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_allclose(array, other[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("counts", "size", "shares"),
    [
        ([4, 4, 4, 4], 2, [(0, 2), (2, 4)]),
        ([9, 1, 1, 1], 2, [(0, 1), (1, 4)]),
        ([1, 1, 1, 9], 2, [(0, 3), (3, 4)]),
        ([5], 4, [(0, 0), (0, 0), (0, 1), (1, 1)]),
        ([2, 2, 2], 3, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_shares_are_neighbours_of_about_equal_size(
    counts: list[int], size: int, shares: list[tuple[int, int]]
) -> None:
    assert [(share.start, share.stop) for share in shares_of(counts, size)] == shares


def test_pixels_are_cut_between_images() -> None:
    grids = np.array([[1, 2, 2], [1, 4, 2], [1, 2, 4]])
    pixels = {"pixel_values": np.arange(20)[:, None], "image_grid_thw": grids}
    cut = images_of(pixels, slice(1, 3))
    assert cut["pixel_values"][:, 0].tolist() == list(range(4, 20))
    assert cut["image_grid_thw"].tolist() == grids[1:].tolist()
    assert images_of({"pixel_values": np.arange(3)}, slice(1, 2))["pixel_values"].tolist() == [1]
