"""An encoder's two halves: the worker keeps what the tower made, the scheduler tells in the answer where it is.

The worker half of rank 0 owns the shelf; all ranks make the same, and one sends. The halves live in different processes: the worker
leaves the shelf's address in a file that both know by the engine's id. vLLM calls all of it on the main thread of its process.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from embedwire.encode.items import ItemShelf
from embedwire.engines.vllm.cores import rest_while, short_turns
from embedwire.engines.vllm.items import arrays_of, content_hash_of, name_of, to_host
from embedwire.engines.vllm.settings import ConnectorSettings
from embedwire.errors import ConfigurationError, EmbedwireError
from embedwire.memory.layout import Layout

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

METADATA_MAX = 65_536
"""Items of which the scheduler half remembers the grid: an item that vLLM finds in a cache of its own comes without it."""


class Whereabouts(NamedTuple):
    """What the worker half leaves for the scheduler half: the control address where items are requested, and a random name of this
    process, new after each restart."""

    address: str
    incarnation: str


class ProducerWorker:
    """Keeps each encoder output under the hash of its identifier. Made once the model is resident."""

    def __init__(self, layout: Layout, settings: ConnectorSettings, *, address_file: str) -> None:
        self._layout = layout
        self._address_file = address_file
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedwire-items")
        with short_turns():
            self.shelf = ItemShelf(
                layout,
                memory_bytes=settings.items_bytes,
                host=settings.host,
                port=settings.port,
                transports=settings.transports,
                limits=settings.limits,
            )
        self._incarnation = secrets.token_hex(8)
        write_address(address_file, Whereabouts(self.shelf.address, self._incarnation))
        rest_while(lambda: True)

    def save(self, identifier: str, output: torch.Tensor) -> None:
        """Take a copy now: outputs of a batch share their memory, and vLLM may use it again. What takes longer is done behind it; who asks
        meanwhile waits."""
        item = content_hash_of(name_of(identifier, self._incarnation))
        if not self.shelf.expect(item):
            return
        copy = output.detach().clone()
        ready = torch.cuda.current_stream().record_event() if copy.is_cuda else None
        self._thread.submit(self._keep, item, copy, ready)

    def save_cached(self, identifiers: Iterable[str], cache: Mapping[str, torch.Tensor]) -> None:
        """Items of this step that vLLM has encoded earlier, and will not encode again."""
        for identifier in identifiers:
            if identifier in cache:
                self.save(identifier, cache[identifier])

    def _keep(self, item: bytes, copy: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        try:
            if ready is not None:
                ready.synchronize()
            self.shelf.put(item, arrays_of(to_host(copy), self._layout))
        except EmbedwireError as error:
            logger.warning("an item is not kept: %s", error)
            self.shelf.give_up(item, str(error))
        except Exception as error:
            logger.exception("an item is not kept")
            self.shelf.give_up(item, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """End its rooms."""
        self._thread.shutdown()
        self.shelf.close()
        with suppress(FileNotFoundError):
            os.unlink(self._address_file)


class ProducerScheduler:
    """Names, in the answer to each encode request, the items and where they are asked for."""

    def __init__(self, *, address_file: str, resolver: Any) -> None:
        """Raises ConfigurationError when the worker half has not left an address."""
        self._worker = read_address(address_file)
        self._resolver = resolver
        self._wanted: set[str] = set()
        self._metadata: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def want(self, request: Request) -> None:
        """Its items are part of the next step, encoded or from the cache."""
        self._wanted.update(feature.identifier for feature in request.mm_features)

    def take_wanted(self) -> tuple[str, ...]:
        """For the workers of this step."""
        wanted, self._wanted = tuple(self._wanted), set()
        return wanted

    def answer(self, request: Request) -> dict[str, Any]:
        """``ec_transfer_params`` of the answer: an entry an item, by :func:`embedwire.engines.vllm.items.name_of`."""
        from vllm.distributed.ec_transfer.ec_connector.utils import collect_ec_item_metadata

        items: dict[str, dict[str, Any]] = collect_ec_item_metadata(request.mm_features, self._resolver)
        for index, feature in enumerate(request.mm_features):
            entry = items[feature.identifier]
            entry["addresses"] = [self._worker.address]
            entry["tokens"] = request.get_num_encoder_embeds(index)
            entry["metadata"] = self._remember(feature.identifier, entry["metadata"])
        return {name_of(identifier, self._worker.incarnation): entry for identifier, entry in items.items()}

    def _remember(self, identifier: str, metadata: dict[str, Any]) -> dict[str, Any]:
        known = metadata or self._metadata.get(identifier, {})
        self._metadata[identifier] = known
        self._metadata.move_to_end(identifier)
        while len(self._metadata) > METADATA_MAX:
            self._metadata.popitem(last=False)
        return known


def address_file_of(engine_id: str, data_parallel_rank: int) -> str:
    """Where the worker half leaves the shelf's address. The engine's id is random unless somebody set it; it may not lead elsewhere."""
    name = content_hash_of(f"{engine_id} {data_parallel_rank}").hex()[:32]
    return os.path.join(tempfile.gettempdir(), f"embedwire-ec-{name}.json")


def write_address(path: str, whereabouts: Whereabouts) -> None:
    """For this user's processes only; a file that an earlier process left is replaced."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(whereabouts._asdict(), file)


def read_address(path: str) -> Whereabouts:
    """Raises ConfigurationError when there is none of this user's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(fd) as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                raise ConfigurationError(f"{path} is another user's")
            return Whereabouts(**json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the worker half has not said where items are asked for: {error}"
        ) from error
