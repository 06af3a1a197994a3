"""Names of media items where vLLM itself counts them: an answer never comes from another request's picture.

With the processor cache and prefix caching off, vLLM names an item by a counter that starts at 0 in every server process
(``renderer0-mm-1-image-0``), unless the request gives a ``uuid``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from servers import Router, VllmServer, asked, chat, free_port, ids_of, offered, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FAMILY = "qwen2_5_vl"
COUNTED = ("--mm-processor-cache-gb", "0", "--no-enable-prefix-caching")
"""Flags under which vLLM counts items instead of hashing them."""
MODES = ("metadata", "bytes")


@pytest.fixture(scope="module")
def parts(image: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
    """40 different pictures of one size."""
    return [image(112, 112, seed=3000 + n) for n in range(40)]


@pytest.fixture(scope="module")
def stack(servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two encoders that count their items; for each media mode a language server, a router over one of the encoders and one over both; an
    undivided server."""
    made = SimpleNamespace(
        whole=servers.start("whole", FAMILY),
        encoders=[servers.encoder(f"encoder {n}", FAMILY, *COUNTED) for n in (1, 2)],
        languages={
            "bytes": servers.language("bytes", FAMILY),
            "metadata": servers.language("metadata", FAMILY, "--language-model-only"),
        },
    )
    for server in (made.whole, *made.encoders, *made.languages.values()):
        server.wait_ready()
    logs = tmp_path_factory.mktemp("routers")
    with ExitStack() as stop:

        def router(mode: str, encoders: Sequence[VllmServer]) -> Router:
            urls = [flag for encoder in encoders for flag in ("--encoder", encoder.url)]
            flags = ("--language", made.languages[mode].url, "--media", mode)
            started = Router(free_port(), *urls, *flags, log=logs / f"{mode} {len(encoders)}.log")
            stop.callback(started.stop)
            return started.wait_knows(encoder=len(encoders), language=1)

        made.one = {mode: router(mode, [encoder]) for mode, encoder in zip(MODES, made.encoders, strict=True)}
        made.two = {mode: router(mode, made.encoders) for mode in MODES}
        yield made


@pytest.fixture(scope="module")
def reference(stack: Any, parts: list[dict[str, Any]]) -> list[list[int]]:
    """What the undivided server answers to each picture: 40 different answers."""
    answers = [ids_of(post(stack.whole.url, chat([part]))) for part in parts]
    assert len(set(map(tuple, answers))) == len(parts)
    return answers


@pytest.mark.parametrize("mode", MODES)
def test_two_encoders_that_count_alike(
    stack: Any, parts: list[dict[str, Any]], reference: list[list[int]], mode: str
) -> None:
    """Both begin at the same number, and one language server reads from both. The first test, so that they are at the same number."""
    used: set[str] = set()
    for number, part in enumerate(parts):
        answer = post(stack.two[mode].url, chat([part]))
        assert ids_of(answer) == reference[number], f"picture {number}"
        used.update(answer.json()["embedwire"]["encoders"])
    assert used == {encoder.url for encoder in stack.encoders}


@pytest.fixture(scope="module")
def restarted(stack: Any, parts: list[dict[str, Any]]) -> Any:
    """The answers of either mode, each with an encoder of its own: to the first 20 pictures, then, after the encoder was restarted, to the
    other 20 and to the first 20 again. ``named`` is what the first encoder offers a picture under in each of its two processes."""
    found = SimpleNamespace(before={}, after={}, again={}, named=[])
    for mode in MODES:
        found.before[mode] = [post(stack.one[mode].url, chat([part])) for part in parts[:20]]
    found.named += offered(stack.encoders[0].url, parts[0])
    for encoder in stack.encoders:
        encoder.restart()
    for encoder in stack.encoders:
        encoder.wait_ready()
    for mode in MODES:
        stack.one[mode].wait_knows(encoder=1)
        found.after[mode] = [post(stack.one[mode].url, chat([part])) for part in parts[20:]]
        found.again[mode] = [post(stack.one[mode].url, chat([part])) for part in parts[:20]]
    found.named += offered(stack.encoders[0].url, parts[0])
    return found


@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_that_was_restarted(restarted: Any, reference: list[list[int]], mode: str) -> None:
    """40 pictures, half of them after the restart: every answer is of its own picture."""
    answers = map(ids_of, restarted.before[mode] + restarted.after[mode])
    wrong = [n for n, (answer, right) in enumerate(zip(answers, reference, strict=True)) if answer != right]
    assert not wrong


@pytest.mark.parametrize("mode", MODES)
def test_items_outlive_their_encoder(restarted: Any, reference: list[list[int]], mode: str) -> None:
    """The language server has the first 20 pictures from before the restart, and fetches none of them a second time."""
    assert [ids_of(answer) for answer in restarted.again[mode]] == reference[:20]

    def transfers(answers: list[Any]) -> list[Any]:
        return [answer.json()["embedwire"]["transfers"] for answer in answers]

    assert all(transfers(restarted.before[mode]))
    assert transfers(restarted.again[mode]) == transfers(restarted.before[mode])


def test_counted_names_without_a_router(
    stack: Any, restarted: Any, parts: list[dict[str, Any]], reference: list[list[int]]
) -> None:
    """The encoder's answer adds its incarnation to a name that is no content hash, so that the names of two processes never meet."""
    counts, incarnations = zip(*(name.split("@") for name in restarted.named), strict=True)
    assert all(count.startswith("renderer0-mm-") for count in counts)
    assert len(set(incarnations)) == 2
    for number, part in enumerate(parts[:5]):
        ((name, item),) = offered(stack.encoders[0].url, part).items()
        placeholder = {"type": "image_embeds", "image_embeds": item["metadata"], "uuid": name}
        params = {"embedwire": {"ticket": "", "items": {name: item}}}
        answer = post(stack.languages["metadata"].url, chat([placeholder], ec_transfer_params=params))
        assert ids_of(answer) == reference[number], f"picture {number}"
    body = asked([stack.encoders[0].url], parts[:1], "What?")
    assert post(stack.languages["bytes"].url, body).status_code == 500, "the two name it differently"
