"""Answers about media items: shared, remembered, and from whom they may come."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import anyio
import pytest

from embedwire.serve.vllm.items import Encoded, Items, Offered
from embedwire.serve.vllm.request import Item

pytestmark = pytest.mark.anyio
ITEM = Item(key=b"picture", model="m", modality="image", size_bytes=1, part={}, options={})


class Encoders:
    """Two, of which the first is preferred; each answers when it is let go."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.go_on = anyio.Event()

    async def encode(self, item: Item, avoid: Collection[str]) -> Encoded:
        url = next(url for url in ("http://1", "http://2") if url not in avoid)
        self.asked.append(url)
        await self.go_on.wait()
        return Encoded(offered={"a": Offered((url,), 10)}, encoder=url, at_s=0.0)


async def test_whoever_is_avoided_answers_nothing() -> None:
    """Neither an answer that another request has brought back, nor one that is on its way to it."""
    encoders = Encoders()
    async with anyio.create_task_group() as background:
        items = Items(encoders.encode, background=background, remembered_max=8, is_there=lambda url: True)
        answers: dict[str, Any] = {}

        async def get(name: str, *avoid: str) -> None:
            answers[name] = (await items.get(ITEM, avoid=avoid)).encoder

        async with anyio.create_task_group() as asking:
            asking.start_soon(get, "first")
            asking.start_soon(get, "same")
            await anyio.wait_all_tasks_blocked()
            asking.start_soon(get, "other", "http://1")
            await anyio.wait_all_tasks_blocked()
            encoders.go_on.set()
        assert answers == {"first": "http://1", "same": "http://1", "other": "http://2"}
        assert encoders.asked == ["http://1", "http://2"]
        await get("later")
        await get("late", answers["later"])
        assert answers["late"] != answers["later"]
