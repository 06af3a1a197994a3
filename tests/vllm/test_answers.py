"""An encoder and a language server of vLLM beside an undivided one: the same token ids, in float32, one request at a time.

The receive pool holds 16 rows, less than any of the larger pictures (256 rows).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from servers import asked, chat, free_port, ids_of, offered, post

from embedwire.engines.vllm.items import content_hash_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

Prompts = list[list[dict[str, Any]]]
ITEMS_LOGGED = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}},
    "loggers": {"embedwire.language.items": {"level": "DEBUG", "handlers": ["stderr"]}},
}
"""A configuration of logging, as vLLM takes it from a file."""
ROW_BYTES = {"qwen2_5_vl": 128 * 4, "qwen3_vl": 4 * 128 * 4}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest) -> str:
    """Both: one whose rows are as wide as the model, and one with three deepstack levels beside."""
    return str(request.param)


@pytest.fixture(scope="module")
def stack(family: str, servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An undivided server, two encoders, and language servers: alone with a tower, without one, and over two ranks, which fetch what
    encoder 1 makes before a request names it, and log each item that is available."""
    staging = (
        4 * 256 * ROW_BYTES[family]
    )  # the largest prompt: what is not given back is missed by the next one
    port = free_port()
    logging_config = tmp_path_factory.mktemp("logging") / "items.json"
    logging_config.write_text(json.dumps(ITEMS_LOGGED))
    started = {
        "whole": servers.start(f"whole {family}", family),
        "encoder 1": servers.encoder(f"encoder 1 {family}", family, port=port),
        "language": servers.language(f"language {family}", family, staging_bytes=staging),
        "metadata": servers.language(f"metadata {family}", family, "--language-model-only"),
    }
    if family == "qwen2_5_vl":
        started["encoder 2"] = servers.encoder(f"encoder 2 {family}", family)
        started["two ranks"] = servers.language(
            f"ranks {family}", family, "--tensor-parallel-size", "2",
            staging_bytes=staging, encoders=[f"tcp://localhost:{port}"], prefetch=True,
            variables={"VLLM_LOGGING_CONFIG_PATH": str(logging_config)},
        )  # fmt: skip
    urls = {name: server.wait_ready().url for name, server in started.items()}
    yield {**urls, "wait_logged": getattr(started.get("two ranks"), "wait_logged", None)}
    servers.close()


@pytest.fixture(scope="module")
def expected(stack: Any, prompts: Prompts) -> list[list[int]]:
    """What the undivided server answers. The prompts have many different answers."""
    ids = [ids_of(post(stack["whole"], chat(parts, f"q{n}"))) for n, parts in enumerate(prompts)]
    assert len({i for one in ids for i in one}) > 50
    return ids


def test_one_encoder(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """20 prompts with none to four pictures, some repeated."""
    for number, parts in enumerate(prompts):
        body = asked([stack["encoder 1"]], parts, f"q{number}")
        assert ids_of(post(stack["language"], body)) == expected[number], f"prompt {number}"


def test_two_encoders(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """The items of one prompt come from both."""
    if "encoder 2" not in stack:
        pytest.skip("two encoders: with one family only, to save servers")
    encoders = [stack["encoder 1"], stack["encoder 2"]]
    for number, parts in enumerate(prompts[:10]):
        body = asked(encoders, parts, f"q{number}")
        assert ids_of(post(stack["language"], body)) == expected[number], f"prompt {number}"


def test_tensor_parallel(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """Both ranks read each item from the memory of the one that fetched it."""
    if "two ranks" not in stack:
        pytest.skip("two ranks: with one family only, to save servers")
    for number, parts in enumerate(prompts[:10]):
        body = asked([stack["encoder 1"]], parts, f"q{number}")
        assert ids_of(post(stack["two ranks"], body)) == expected[number], f"prompt {number}"


def test_an_item_is_there_before_the_request(stack: Any, image: Callable[..., dict[str, Any]]) -> None:
    """Both ranks read it although nothing listens at the address that the request names. The encoder answers before it has announced
    the item, so the test waits until the language server has fetched it."""
    if "two ranks" not in stack:
        pytest.skip("two ranks: with one family only, to save servers")
    part = image(224, 224, 98)
    ((name, item),) = offered(stack["encoder 1"], part).items()
    stack["wait_logged"](f"item {content_hash_of(name).hex()} is available")
    params = {"embedwire": {"ticket": "", "items": {name: {**item, "addresses": ["tcp://127.0.0.1:1"]}}}}
    answer = post(stack["two ranks"], chat([part], ec_transfer_params=params))
    assert ids_of(answer) == ids_of(post(stack["whole"], chat([part])))


def test_metadata_instead_of_media(stack: Any, prompts: Prompts, expected: list[list[int]]) -> None:
    """To a server without a tower, which never sees a picture."""
    for number, parts in enumerate(prompts):
        items: dict[str, Any] = {}
        content = []
        for part in parts:
            for name, item in offered(stack["encoder 1"], part).items():
                items[name] = item
                content.append({"type": "image_embeds", "image_embeds": item["metadata"], "uuid": name})
        params = {"embedwire": {"ticket": "", "items": items}}
        body = chat(content, f"q{number}", ec_transfer_params=params)
        assert ids_of(post(stack["metadata"], body)) == expected[number], f"prompt {number}"


def test_requests_that_fail_alone(stack: Any, image: Callable[..., dict[str, Any]]) -> None:
    """What killed the engine or answered wrongly without a word elsewhere: here that request fails, and the next one is answered."""
    part = image(224, 224, 99)  # in nobody's cache
    ((name, item),) = offered(stack["encoder 1"], part).items()

    def params(**changed: Any) -> dict[str, Any]:
        return {"embedwire": {"ticket": "", "items": {name: {**item, **changed}}}}

    metadata = {"type": "image_embeds", "image_embeds": item["metadata"], "uuid": name}
    hostile = {"type": "image_embeds", "image_embeds": item["metadata"], "uuid": "../../../etc/passwd"}
    smaller = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 8, 8]}, "uuid": name}
    nowhere = ["tcp://127.0.0.1:1"]
    for server, body in (
        ("language", chat([part], ec_transfer_params=None)),
        ("language", chat([part], ec_transfer_params=params(tokens=12))),
        ("language", chat([part], ec_transfer_params=params(addresses=nowhere))),
        ("language", chat([part], ec_transfer_params={"embedwire": 3})),
        ("metadata", chat([metadata])),
        ("metadata", chat([hostile], ec_transfer_params=params())),
        ("metadata", chat([smaller], ec_transfer_params=params())),
        ("metadata", chat([metadata], ec_transfer_params=params(addresses=nowhere))),
    ):
        assert post(stack[server], body).status_code == 500, body
    right = ids_of(post(stack["whole"], chat([part])))
    assert ids_of(post(stack["language"], chat([part], ec_transfer_params=params()))) == right
    assert ids_of(post(stack["metadata"], chat([metadata], ec_transfer_params=params()))) == right
