"""The connector's worker halves without vLLM: what a tower left on its device is what the model finds on its own. ``--device cuda`` runs
them on a GPU, where the encoder's work is still queued while its output is taken, and its memory is used again behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from embedwire.endpoint import ReceiverEndpoint
from embedwire.engines.vllm import producer
from embedwire.engines.vllm.consumer import ConsumerWorker, Loads
from embedwire.engines.vllm.items import content_hash_of
from embedwire.engines.vllm.producer import ProducerWorker
from embedwire.engines.vllm.settings import ConnectorSettings
from embedwire.language.items import ItemDesk, ItemKey, Verdict
from embedwire.memory.layout import item

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]
WIDTH = 1024
ITEMS, ROWS = 6, 700
LAYOUT = item(WIDTH, dtype="bfloat16", model="a model")
DEADLINE_S = 30.0


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProducerWorker]:
    """An encoder's worker half; vLLM's busy wait is not there to be changed."""
    monkeypatch.setattr(producer, "rest_while", lambda _: None)
    made = ProducerWorker(LAYOUT, ConnectorSettings(), address_file=str(tmp_path / "address.json"))
    yield made
    made.close()


@pytest.fixture
def desk() -> Iterator[ItemDesk]:
    """What the consumer's scheduler half fetches with, through a pool far smaller than an item."""
    with ExitStack() as stack:
        receiver = ReceiverEndpoint(LAYOUT, num_blocks=2, block_size=64)
        made = ItemDesk(receiver, memory_bytes=64 * 2**20, deadline_s=DEADLINE_S)
        stack.callback(made.close)
        stack.callback(receiver.close)
        yield made


def tower(output: torch.Tensor, work: torch.Tensor, seed: int) -> None:
    """Queue some work, and then an output of (ROWS, WIDTH) into memory that the next call uses again."""
    for _ in range(20):
        work.copy_(work @ work / work.shape[0])
    output.copy_(expected(seed), non_blocking=True)


def expected(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_items_go_from_device_to_device(keeper: ProducerWorker, desk: ItemDesk, device: str) -> None:
    """Every bit, although each output's memory is overwritten as soon as it was saved."""
    output = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device=device)
    side = 512 if device == "cpu" else 4096
    work = torch.ones(side, side, device=device)
    with torch.cuda.stream(torch.cuda.Stream()) if output.is_cuda else nullcontext():  # as in vLLM
        for number in range(ITEMS):
            tower(output, work, seed=number)
            keeper.save(f"{number:064x}", output)
            output.fill_(float("nan"))
    keys = {f"{n:064x}": ItemKey(content_hash_of(f"{n:064x}"), ROWS) for n in range(ITEMS)}
    wanted = dict.fromkeys(keys.values(), keeper.shelf.address)
    while (verdict := desk.ask("a request", wanted)) is Verdict.PENDING:
        desk.wait(timeout_s=DEADLINE_S)
    assert verdict is Verdict.READY, desk.failure_of("a request")

    copier, cache = ConsumerWorker(LAYOUT), dict[str, torch.Tensor]()
    handles: dict[str, Any] = {name: desk.handle(key) for name, key in keys.items()}
    copier.load(Loads(1, handles), cache, device)
    desk.forget("a request")
    for number in range(ITEMS):
        found = cache[f"{number:064x}"]
        assert found.device.type == torch.device(device).type
        assert torch.equal(found.cpu(), expected(number)), f"{number:064x}"
    assert max(desk.report(key).rounds[0] for key in keys.values()) < ROWS
