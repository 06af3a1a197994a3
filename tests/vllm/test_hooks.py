"""The connector between vLLM's own classes, in one process: both ways in which its model runners call it, and what fails alone.

The configuration, the metadata and the context managers are vLLM's; only the model is left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

import torch
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.distributed.ec_transfer import ec_transfer_state
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem, MultiModalKwargsItem
from vllm.v1.worker.ec_connector_model_runner_mixin import ECConnectorModelRunnerMixin
from vllm.v1.worker.gpu.ec_connector import ActiveECConnector

from embedwire.engines.vllm import connector as module
from embedwire.engines.vllm import consumer, cores
from embedwire.engines.vllm.connector import EmbedwireECConnector
from embedwire.engines.vllm.items import content_hash_of, name_of
from embedwire.errors import ConfigurationError
from embedwire.language.items import ItemKey

WIDTH, PATIENCE_S = 128, 20.0
A, B, C, SHARED, COMING, LATE, SOON = (
    hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b", "c", "shared", "coming", "late", "soon")
)
"""Identifiers as vLLM makes them of an item's content."""


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """And vLLM's way to wait is its own again afterwards."""
    monkeypatch.setattr(module, "_is_first_rank", lambda: True)
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)


@pytest.fixture
def config(checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """``config(role, **extra)``: vLLM's configuration of a server."""

    def make(
        role: str, *, family: str = "qwen2_5_vl", widths: dict[str, int] | None = None, **extra: Any
    ) -> Any:
        made = EngineArgs(
            model=str(checkpoint(family)),
            dtype="float32",
            max_model_len=2048,
            ec_transfer_config={
                "ec_connector": "EmbedwireECConnector",
                "ec_connector_module_path": "embedwire.engines.vllm.connector",
                "ec_role": role,
                "engine_id": f"test-{os.getpid()}-{role}",
                "ec_connector_extra_config": extra,
            },
        ).create_engine_config()
        made.ec_transfer_config.mm_encoder_output_widths = widths or {"image": WIDTH}
        return made

    return make


def request(name: str, identifiers: list[str], rows: int, **params: Any) -> Any:
    """As the scheduler sees it: each item has ``rows`` places, one after the other."""
    features = [
        SimpleNamespace(
            identifier=identifier,
            modality="image",
            mm_position=SimpleNamespace(offset=index * rows, length=rows, get_num_embeds=lambda: rows),
            data=None,
        )
        for index, identifier in enumerate(identifiers)
    ]
    return SimpleNamespace(
        request_id=name,
        mm_features=features,
        ec_transfer_params=params or None,
        get_num_encoder_embeds=lambda index: rows,
    )


class Pair:
    """A producer and a consumer, each with both halves, in the shape of a step that ``shape`` gives the workers."""

    def __init__(self, config: Callable[..., Any], shape: str, **extra: Any) -> None:
        self.shape = shape
        self._producing, consuming = config("ec_producer"), config("ec_consumer", **extra)
        self.keeper, self.teller = self.producer()
        self.copier = EmbedwireECConnector(consuming, ECConnectorRole.WORKER)
        self.fetcher = EmbedwireECConnector(consuming, ECConnectorRole.SCHEDULER)
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self.language_cache: dict[str, torch.Tensor] = {}

    def producer(self) -> tuple[EmbedwireECConnector, EmbedwireECConnector]:
        """Both halves of a producer that has just started."""
        worker = EmbedwireECConnector(self._producing, ECConnectorRole.WORKER)
        worker.start_worker_services()
        return worker, EmbedwireECConnector(self._producing, ECConnectorRole.SCHEDULER)

    def encode(self, name: str, outputs: dict[str, torch.Tensor], rows: int) -> dict[str, Any]:
        """A step of the encoder, and the answer's parameters as a router passes them on."""
        asked = request(name, list(outputs), rows)
        assert self.teller.ensure_cache_available(asked, 0)
        with self.step(self.keeper, self.teller, self.encoder_cache):
            for identifier, output in outputs.items():
                if identifier not in self.encoder_cache:
                    self.encoder_cache[identifier] = output
                    if self.shape == "V1":
                        ECConnectorModelRunnerMixin.maybe_save_ec_to_connector(self.encoder_cache, identifier)
        delayed, params = self.teller.request_finished(asked)
        assert not delayed
        assert params is not None
        return {"embedwire": {"ticket": "", "items": params}}

    def step(self, worker: Any, scheduler: Any, cache: dict[str, torch.Tensor], *, tokens: int = 1) -> Any:
        """One step of the workers as the model runner of that shape has it."""
        metadata = scheduler.build_connector_meta(SimpleNamespace(total_num_scheduled_tokens=tokens))
        output = SimpleNamespace(ec_connector_metadata=metadata, finished_req_ids=set())
        ec_transfer_state._EC_CONNECTOR_AGENT = worker
        if self.shape == "V1":
            return ECConnectorModelRunnerMixin.maybe_get_ec_connector_output(output, encoder_cache=cache)
        return ActiveECConnector(SimpleNamespace(), cache).maybe_get_output(output)

    def wait(self, asked: Any) -> bool:
        """Ask until the request may run, or has to fail."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.fetcher.ensure_cache_available(asked, 0):
            if asked.request_id in self.fetcher.take_unavailable_requests():
                return False
            assert time.monotonic() < deadline
            os.sched_yield()
        return True

    def read(self, asked: Any) -> None:
        """The step in which the language model reads a request's items."""
        for index, feature in enumerate(asked.mm_features):
            if feature.identifier not in self.language_cache:
                assert self.fetcher.has_cache_item(feature.identifier)
                self.fetcher.update_state_after_alloc(asked, index)
        with self.step(self.copier, self.fetcher, self.language_cache) as output:
            pass
        self.fetcher.update_connector_output(output)

    def cause(self, asked: Any) -> tuple[str, str]:
        """Why a request has to fail, which is then over."""
        assert not self.wait(asked)
        failure = self.fetcher._fetcher.desk.failure_of(asked.request_id)
        self.fetcher.request_finished(asked)
        return failure.cause.value, failure.detail

    def close(self) -> None:
        ec_transfer_state._EC_CONNECTOR_AGENT = None
        for half in (self.fetcher, self.copier, self.keeper, self.teller):
            half.shutdown()


@pytest.fixture(params=["V1", "V2"])
def pair(request: pytest.FixtureRequest, config: Callable[..., Any]) -> Iterator[Pair]:
    """At its end no request holds anything, and the pool is whole."""
    made = Pair(config, request.param, num_blocks=2, block_size=8, item_deadline_s=PATIENCE_S)
    yield made
    stats = made.fetcher._fetcher._receiver.stats()
    desk = made.fetcher._fetcher.desk
    assert not desk._waiters
    assert stats.blocks_free == 2
    made.close()


def rows(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_an_item_goes_from_cache_to_cache(pair: Pair) -> None:
    """Views of one storage that the producer uses again at once: each arrives as it was, in rounds, bit for bit."""
    batch = torch.cat([rows(40, 1), rows(40, 2)])
    wanted = {A: batch[:40].clone(), B: batch[40:].clone()}
    params = pair.encode("e", {A: batch[:40], B: batch[40:]}, 40)
    batch.zero_()
    asked = request("r", [A, B, A], 40, **params)
    assert pair.wait(asked)
    pair.read(asked)
    assert pair.language_cache.keys() == wanted.keys()
    assert all(torch.equal(pair.language_cache[name], wanted[name]) for name in wanted)
    pair.fetcher.request_finished(asked)


def test_pixels_stay_in_the_scheduler(pair: Pair) -> None:
    """Workers get what positions are worked out from, of each item that an encoder was named for. What may be encoded here stays whole, as
    does what vLLM has put into its own shared memory."""
    params = pair.encode("e", {A: rows(10, 3), SHARED: rows(10, 4)}, 10)
    asked = request("r", [A, B, SHARED], 10, **params)
    fields = {"image_grid_thw": True, "pixel_values": False, "anything": True}
    for feature, names in zip(asked.mm_features, (fields, fields, {"address": False}), strict=True):
        feature.data = MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(torch.ones(3), MultiModalBatchedField(keep_on_cpu=keep))
                for name, keep in names.items()
            }
        )
    pair.fetcher.ensure_cache_available(asked, 0)
    left = [set(feature.data) for feature in asked.mm_features]
    assert left == [{"image_grid_thw", "anything"}, set(fields), {"address"}]
    pair.fetcher.request_finished(asked)


def test_an_item_that_the_encoder_has_in_its_cache(pair: Pair) -> None:
    """vLLM does not encode it again, so only the hook before the step tells of it: it is offered all the same."""
    pair.encoder_cache[A] = rows(10, 3)
    params = pair.encode("e", {A: rows(10, 9)}, 10)
    asked = request("r", [A], 10, **params)
    assert pair.wait(asked)
    pair.read(asked)
    assert torch.equal(pair.language_cache[A], rows(10, 3))
    pair.fetcher.request_finished(asked)


def test_an_item_between_two_hooks(pair: Pair) -> None:
    """It is here from the answer "available" until the workers have copied it, whoever ends meanwhile, and whatever needs its memory."""
    params = pair.encode("e", {A: rows(10, 4)}, 10)
    first, second = request("r1", [A], 10, **params), request("r2", [A], 10, **params)
    assert pair.wait(first)
    assert pair.wait(second)
    pair.fetcher.request_finished(first)
    assert pair.fetcher.has_cache_item(A)
    pair.fetcher.update_state_after_alloc(second, 0)
    step = pair.step(pair.copier, pair.fetcher, pair.language_cache)
    pair.fetcher.request_finished(second)  # aborted when the step was on its way
    desk = pair.fetcher._fetcher.desk
    assert [entry for entry in desk._waiters if entry.startswith("step")] == ["step 1"]
    with step as output:
        pass
    pair.fetcher.update_connector_output(output)
    assert torch.equal(pair.language_cache[A], rows(10, 4))


@pytest.fixture(params=["V1", "V2"])
def both_ways(request: pytest.FixtureRequest, config: Callable[..., Any]) -> Iterator[Pair]:
    """The language server encodes what no encoder was named for. There is memory for ten rows."""
    made = Pair(config, request.param, local_encode=True, staging_bytes=10 * WIDTH * 4)
    yield made
    assert not made.fetcher._fetcher.desk._waiters
    made.close()


def raw(name: str, identifier: str, rows: int) -> Any:
    """A request whose picture came with its pixels, and without the name of an encoder."""
    asked = request(name, [identifier], rows)
    pixels = MultiModalFieldElem(torch.ones(3), MultiModalBatchedField(keep_on_cpu=False))
    asked.mm_features[0].data = MultiModalKwargsItem({"pixel_values": pixels})
    return asked


def test_what_came_for_another_request_is_not_encoded(both_ways: Pair) -> None:
    """vLLM counts on what it was told is here: it stays until it is read, whoever needs its memory."""
    pair = both_ways
    params = pair.encode("e", {A: rows(10, 4)}, 10)
    first = request("r1", [A], 10, **params)
    assert pair.wait(first)
    pair.fetcher.request_finished(first)  # before it ran, so that vLLM has not got it
    second = raw("r2", A, 10)
    assert pair.wait(second)
    assert pair.fetcher.has_cache_item(A)
    needy = request("r3", [B], 10, **pair.encode("e", {B: rows(10, 5)}, 10))
    assert not pair.fetcher.ensure_cache_available(needy, 0)
    assert pair.wait(second)
    pair.read(second)
    assert torch.equal(pair.language_cache[A], rows(10, 4))
    pair.fetcher.request_finished(second)
    assert pair.wait(needy)
    pair.fetcher.request_finished(needy)


def test_a_name_that_was_used_for_a_picture_of_another_size(both_ways: Pair) -> None:
    """A user may give two pictures one identifier. What is here has other rows than the prompt has places, so the picture is encoded."""
    pair = both_ways
    params = pair.encode("e", {A: rows(10, 4)}, 10)
    first, second = request("r1", [A], 10, **params), raw("r2", A, 5)
    assert pair.wait(first)
    assert pair.wait(second)
    assert not pair.fetcher.has_cache_item(A)
    pair.fetcher.update_state_after_alloc(second, 0)
    assert not pair.fetcher.build_connector_meta(SimpleNamespace(total_num_scheduled_tokens=1)).loads.handles
    for asked in (first, second):
        pair.fetcher.request_finished(asked)


def test_a_step_without_work_waits_for_items(pair: Pair, monkeypatch: Any) -> None:
    """Once a step, neither behind work nor before it, and not when others are new."""
    monkeypatch.setattr(consumer, "IDLE_WAIT_S", 10_000)
    fetcher, desk = pair.fetcher, pair.fetcher._fetcher.desk
    waits: list[float] = []
    monkeypatch.setattr(desk, "wait", lambda timeout_s: waits.append(timeout_s))
    here = request("here", [A], 40, **pair.encode("e", {A: rows(40, 4)}, 40))
    params = pair.encode("f", {B: rows(40, 5)}, 40)
    pair.keeper._keeper.shelf.expect(content_hash_of(COMING))
    params["embedwire"]["items"][COMING] = params["embedwire"]["items"][B]
    coming, other = request(COMING, [COMING], 40, **params), request("other", [COMING], 40, **params)
    assert pair.wait(here)

    working = pair.step(pair.copier, fetcher, pair.language_cache)
    assert not fetcher.ensure_cache_available(coming, 0)  # the last step had work
    with pair.step(pair.copier, fetcher, pair.language_cache, tokens=0):
        pass
    assert not fetcher.ensure_cache_available(coming, 0)  # which is not done yet
    with working as output:
        pass
    fetcher.update_connector_output(output)
    assert fetcher.ensure_cache_available(here, 0)
    assert not fetcher.ensure_cache_available(coming, 0)  # the next step has work
    assert waits == []
    with pair.step(pair.copier, fetcher, pair.language_cache, tokens=0):
        pass
    assert not fetcher.ensure_cache_available(other, 0)
    assert waits == []
    assert not fetcher.ensure_cache_available(coming, 0)
    assert not fetcher.ensure_cache_available(other, 0)
    assert waits == [10_000]
    for asked in (here, coming, other):
        fetcher.request_finished(asked)


def test_transfers_take_short_turns_on_a_core(pair: Pair) -> None:
    """On both sides: whatever else runs in these processes waits busily, or computes."""
    mine = [
        t.native_id for t in threading.enumerate() if t.name in ("embedwire-sender", "embedwire-receiver")
    ]
    assert len(mine) == 2
    told = [Path(f"/proc/self/task/{number}/sched").read_text() for number in (os.getpid(), *mine)]
    usual, *turns = [re.search(r"slice\s*:\s*(\d+)", text) for text in told]
    if usual is None or all(turn and turn[1] == usual[1] for turn in turns):
        pytest.skip("this system gives all threads the same turns, or does not tell")
    assert [turn and int(turn[1]) for turn in turns] == [cores.TURN_NS] * 2


def test_what_came_while_a_step_waited_is_in_it(pair: Pair, monkeypatch: Any) -> None:
    monkeypatch.setattr(consumer, "IDLE_WAIT_S", PATIENCE_S)
    asked = request("r", [A], 40, **pair.encode("e", {A: rows(40, 4)}, 40))
    with pair.step(pair.copier, pair.fetcher, pair.language_cache, tokens=0):
        pass
    assert pair.fetcher.ensure_cache_available(asked, 0)
    pair.fetcher.request_finished(asked)


def test_what_fails_alone(pair: Pair) -> None:
    """Each with its cause, and none takes another one with it."""
    params = pair.encode("e", {A: rows(10, 5), "../../x": rows(10, 6)}, 10)
    odd = next(name for name in params["embedwire"]["items"] if name != A)
    assert odd.startswith("../../x@"), "a name that is no content hash is the encoder's alone"
    good = request("good", [A, odd], 10, **params)
    assert pair.cause(request("r1", [A], 10)) == ("unknown_item", "no encoder was named for item 0")
    assert pair.cause(request("r2", [B], 10, **params)) == (
        "unknown_item",
        "no encoder was named for item 0",
    )
    assert pair.cause(request("r3", [A], 12, **params)) == (
        "violation", "item 0 has 10 rows, and the prompt a place for 12",
    )  # fmt: skip
    assert pair.cause(request("r4", [A], 10, embedwire={"items": 3}))[0] == "violation"
    assert pair.cause(request("r5", [A], 10, something="else"))[0] == "violation"
    address = params["embedwire"]["items"][A]["addresses"]
    lie = {"items": {A: {"addresses": address, "tokens": 12}, C: {"addresses": address, "tokens": 5}}}
    assert pair.cause(request("r6", [A], 12, embedwire=lie)) == (
        "violation", "the item has 10 rows, and the prompt a place for 12",
    )  # fmt: skip
    assert pair.cause(request("r7", [C], 5, embedwire=lie))[0] == "unknown_item"
    assert pair.wait(good)
    pair.read(good)
    assert torch.equal(pair.language_cache[odd], rows(10, 6))
    pair.fetcher.request_finished(good)


@pytest.mark.parametrize(
    ("identifier", "is_content"),
    [
        (A, True),
        (A * 2, True),
        (f"adapter:{A}", True),
        (f"{A}-3", True),
        ("renderer0-mm-1-image-0", False),
        ("adapter:renderer0-mm-1-image-0", False),
        (f"{A}-x", False),
        (A[:63], False),
        ("", False),
    ],
)
def test_what_an_item_is_offered_under(identifier: str, is_content: bool) -> None:
    """The same in each life of the encoder only where it follows from the content."""
    assert (name_of(identifier, "1") == name_of(identifier, "2")) == is_content
    assert (name_of(identifier, "1") == identifier) == is_content


def test_a_counted_name_is_of_one_process(config: Callable[..., Any]) -> None:
    """Two encoders that both call their first item the same: a reader gets from each what that one encoded."""
    pair, counted = Pair(config, "V1"), "renderer0-mm-1-image-0"
    found = []
    try:
        for life in range(2):
            params = pair.encode(f"e{life}", {counted: rows(10, life)}, 10)
            (name,) = params["embedwire"]["items"]
            asked = request(f"r{life}", [name], 10, **params)
            assert pair.wait(asked)
            pair.read(asked)
            pair.fetcher.request_finished(asked)
            found.append(pair.language_cache[name])
            for half in (pair.keeper, pair.teller):
                half.shutdown()
            pair.encoder_cache.clear()
            pair.keeper, pair.teller = pair.producer()
    finally:
        pair.close()
    assert [torch.equal(f, rows(10, life)) for life, f in enumerate(found)] == [True, True]


def test_an_item_of_another_shape_is_not_kept(pair: Pair) -> None:
    """Nor does the encoder fail: whoever asks hears that it is not there."""
    params = pair.encode(
        "e", {A: torch.zeros(10, WIDTH + 1), B: torch.zeros(10, WIDTH, dtype=torch.bfloat16)}, 10
    )
    for name in (A, B):
        assert pair.cause(request(f"r {name}", [name], 10, **params))[0] in ("unknown_item", "encoder_failed")


def test_an_item_that_never_comes(pair: Pair) -> None:
    """It ends within the deadline that was set, with the cause."""
    pair.fetcher._fetcher.desk._deadline_s = 0.5
    pair.keeper._keeper.shelf.expect(content_hash_of(LATE))
    late = {"items": {LATE: {"addresses": [pair.keeper._keeper.shelf.address], "tokens": 5}}}
    cause, detail = pair.cause(request("r", [LATE], 5, embedwire=late))
    assert (cause, detail) == ("deadline", "its items were not here within 0.5 s")


def test_a_request_that_is_aborted_lets_the_other_have_the_item(pair: Pair) -> None:
    """Two requests for one item share its room."""
    pair.keeper._keeper.shelf.expect(content_hash_of(SOON))
    soon = {"items": {SOON: {"addresses": [pair.keeper._keeper.shelf.address], "tokens": 5}}}
    first, second = (request(name, [SOON], 5, embedwire=soon) for name in ("r1", "r2"))
    assert not pair.fetcher.ensure_cache_available(first, 0)
    assert not pair.fetcher.ensure_cache_available(second, 0)
    assert sum(pair.fetcher._fetcher._receiver.stats().rooms.values()) == 1
    pair.fetcher.request_finished(first)
    pair.keeper._keeper.shelf.put(content_hash_of(SOON), {"embeddings": rows(5, 7).numpy()})
    assert pair.wait(second)
    pair.fetcher.request_finished(second)


def test_models_that_differ_are_refused_with_both_named(
    config: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    """At the first word between the two: the width, the dtype, and the model itself."""
    pair = Pair(config, "V1")
    params = pair.encode("e", {A: rows(10, 5)}, 10)
    try:
        other = config("ec_consumer", family="qwen3_vl")
        pair.fetcher.shutdown()
        pair.fetcher = EmbedwireECConnector(other, ECConnectorRole.SCHEDULER)
        cause, detail = pair.cause(request("r", [A], 10, **params))
        assert (cause, detail) == (
            "handshake",
            "refused: layouts differ at field 0: sender embeddings float32[128], receiver embeddings float32[512]",
        )
        same = config("ec_consumer")
        same.model_config.model = "another/model"
        pair.fetcher.shutdown()
        pair.fetcher = EmbedwireECConnector(same, ECConnectorRole.SCHEDULER)
        cause, detail = pair.cause(request("r", [A], 10, **params))
        assert cause == "handshake"
        assert detail.endswith(f"sender model {checkpoint('qwen2_5_vl')}, receiver model another/model")
    finally:
        pair.close()


def test_encoders_are_greeted_at_start(config: Callable[..., Any]) -> None:
    """One that makes other rows keeps the language server from starting, both values named; one that is away does not."""
    pair = Pair(config, "V1")
    away = "tcp://127.0.0.1:9"
    try:
        encoders = [pair.keeper._keeper.shelf.address, away]
        with pytest.raises(
            ConfigurationError, match=r"sender embeddings float32\[128\], receiver embeddings float32\[512\]"
        ):
            EmbedwireECConnector(
                config("ec_consumer", family="qwen3_vl", encoders=encoders), ECConnectorRole.SCHEDULER
            )
        for impatience in ({"peer_silence_s": 0.2}, {"item_deadline_s": 0.2}):
            right = config("ec_consumer", encoders=encoders, **impatience)
            EmbedwireECConnector(right, ECConnectorRole.SCHEDULER).shutdown()
    finally:
        pair.close()


def test_an_item_is_fetched_before_a_request_names_it(config: Callable[..., Any]) -> None:
    """With ``prefetch``, as soon as one of ``encoders`` has made it: the request that names it may run at once."""
    producing = config("ec_producer")
    keeper = EmbedwireECConnector(producing, ECConnectorRole.WORKER)
    keeper.start_worker_services()
    shelf = keeper._keeper.shelf
    consuming = config("ec_consumer", encoders=[shelf.address], prefetch=True)
    fetcher = EmbedwireECConnector(consuming, ECConnectorRole.SCHEDULER)
    keeper.save_caches({A: rows(10, 3)}, A)
    deadline = time.monotonic() + PATIENCE_S
    while fetcher._fetcher.desk.handle(ItemKey(content_hash_of(A), 10)) is None:
        assert time.monotonic() < deadline
        os.sched_yield()
    asked = request("r", [A], 10, embedwire={"items": {A: {"addresses": [shelf.address], "tokens": 10}}})
    assert fetcher.ensure_cache_available(asked, 0)
    fetcher.request_finished(asked)
    for half in (fetcher, keeper):
        half.shutdown()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_block": 3}, "unknown field `num_block`"),
        ({"transport": "pigeon"}, "Invalid enum value 'pigeon'"),
        ({"item_deadline_s": 0}, "> 0"),
    ],
)
def test_settings_are_checked_before_anything_is_held(
    config: Callable[..., Any], extra: dict[str, Any], words: str
) -> None:
    """The server does not start, and says which setting."""
    with pytest.raises(ConfigurationError, match=words):
        EmbedwireECConnector(config("ec_consumer", **extra), ECConnectorRole.SCHEDULER)


def test_pipelines_are_refused_at_start(config: Callable[..., Any]) -> None:
    """vLLM's V1 runner drops what other stages than the last report, so memory for items would never come back."""
    consuming = config("ec_consumer")
    consuming.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(ConfigurationError, match="pipeline_parallel_size 2"):
        EmbedwireECConnector(consuming, ECConnectorRole.SCHEDULER)


def test_a_tower_of_another_width_is_refused_at_start(config: Callable[..., Any]) -> None:
    """Measured by vLLM, and not what the language model reads."""
    with pytest.raises(
        ConfigurationError, match="image rows are 96 wide, where the language model expects 128"
    ):
        EmbedwireECConnector(config("ec_producer", widths={"image": 96}), ECConnectorRole.SCHEDULER)
