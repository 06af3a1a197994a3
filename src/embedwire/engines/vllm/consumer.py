"""A language server's two halves: the scheduler fetches items and decides, the workers only copy.

The scheduler half owns the receiver, so a transfer never waits for a step of the model. What it holds for a request goes through an
``ItemDesk``; this file knows when vLLM asks, frees and ends. The worker half maps what the metadata of a step names. vLLM calls all of it
on the main thread of its process.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from msgspec import Meta, Struct

from embedwire.endpoint import ReceiverEndpoint
from embedwire.engines.vllm.causes import CauseReporter
from embedwire.engines.vllm.cores import rest_while, short_turns
from embedwire.engines.vllm.items import content_hash_of, tensor_of, without_media
from embedwire.engines.vllm.settings import ConnectorSettings
from embedwire.errors import ConfigurationError, TransferError
from embedwire.language.items import ItemDesk, ItemFailure, ItemKey, Verdict
from embedwire.limits import ROOM_MAX, TOKENS_MAX
from embedwire.memory.layout import Layout
from embedwire.memory.shared import Handle, attach
from embedwire.protocol.messages import Cause

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.01
"""How long one step is put off for items when there is nothing else to do; what else comes in may wait as long."""
NO_ITEM = b"greeting"
"""Shorter than any hash, so never that of an item."""


class OfferedItem(Struct, frozen=True):
    """Where a router says that an item is: control addresses of encoders that keep it (the first is asked), and its rows."""

    addresses: Annotated[tuple[str, ...], Meta(min_length=1)]
    tokens: Annotated[int, Meta(ge=1, le=TOKENS_MAX)]


class Ask(Struct, frozen=True):
    """What a router adds to a request: under which ticket it wants to hear why it failed, and its items by identifier."""

    ticket: str = ""
    items: dict[str, OfferedItem] = {}


class Params(Struct, frozen=True):
    """``ec_transfer_params`` of a request."""

    embedwire: Ask


@dataclass(slots=True)
class _Asked:
    ticket: str
    wanted: dict[str, tuple[ItemKey, str]]
    came: dict[str, dict[str, Any]] = field(default_factory=dict)
    was_told: bool = False


@dataclass(frozen=True, slots=True)
class Loads:
    """For the workers: which items this step reads, and where they lie."""

    step: int
    handles: Mapping[str, Handle] = field(default_factory=dict)


class ConsumerScheduler:
    """Decides which requests may run. ``resolver`` knows which data of an item are metadata only; ``may_encode``: what no encoder was
    named for is encoded here."""

    def __init__(
        self, layout: Layout, settings: ConnectorSettings, *, resolver: Any, may_encode: bool
    ) -> None:
        self._resolver = resolver
        self._may_encode = may_encode
        with short_turns():
            self._receiver = ReceiverEndpoint(
                layout,
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                default_allocate_tokens=settings.num_blocks * settings.block_size,
                assembly_bytes=settings.staging_bytes,
                host=settings.host,
                transports=settings.transports,
                limits=settings.limits,
            )
        self.desk = ItemDesk(
            self._receiver, memory_bytes=settings.staging_bytes, deadline_s=settings.item_deadline_s
        )
        for address in settings.encoders if settings.prefetch else ():
            self._receiver.subscribe(address, self._on_kept)
        rest_while(lambda: self._receiver.is_receiving)
        self._reporter = CauseReporter(settings.report_to)
        self._asked: dict[str, _Asked] = {}
        self._unavailable: set[str] = set()
        self._loads: dict[str, Handle] = {}
        self._here: dict[
            str, ItemKey
        ] = {}  # items of the request that vLLM works on, by identifier; all pinned
        self._step = 0
        self._steps_under_way: list[int] = []
        self._last_work = self._last_done = 0
        self._patience_s = IDLE_WAIT_S

    def greet(self, addresses: Sequence[str], *, timeout_s: float) -> None:
        """Ask encoders for an item that nobody has. Raises ConfigurationError for one that makes other rows than this server reads; one
        that is not there yet may come later."""
        asked = {a: self._receiver.open(secrets.randbelow(ROOM_MAX), a, item=NO_ITEM) for a in addresses}
        for address, reception in asked.items():
            try:
                reception.result(timeout_s)
            except TransferError as error:
                if error.cause == Cause.HANDSHAKE:
                    raise ConfigurationError(f"encoder {address}: {error.detail}") from None
                if error.cause != Cause.UNKNOWN_ITEM:
                    logger.warning("encoder %s is not there yet: %s", address, error)
            except TimeoutError:
                reception.cancel()
                logger.warning("encoder %s is not there yet, or busy", address)

    def _on_kept(self, address: str, content_hash: bytes, tokens: int) -> None:
        """On the receiver's thread. The request that will want it is most often still being preprocessed."""
        self.desk.prefetch(ItemKey(content_hash, tokens), address)

    # ------------------------------------------------------------------ what vLLM asks

    def is_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether all items that this request still reads are here. One that can not get them is named by :meth:`take_unavailable`.

        A step without work goes out to all workers like any other, and the items that come meanwhile wait for the next one. So when
        nobody else has work, the step waits here for them; but of several new requests none before all have asked for theirs.
        """
        name = request.request_id
        if is_new := name not in self._asked:
            self._asked[name] = self._read(request)
            self._leave_media(request, self._asked[name])
        asked, wanted = self._asked[name], dict[ItemKey, str]()
        unread = [
            index
            for index, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > num_computed_tokens
        ]
        if self.desk.failure_of(name) is None:
            for index in unread:
                wanted |= self._need(request, index, asked)
        verdict = self.desk.ask(name, wanted)
        may_wait = self._patience_s > 0 and self._is_idle and not (is_new and len(self._asked) > 1)
        if verdict is Verdict.PENDING and may_wait:
            self.desk.wait(timeout_s=self._patience_s)
            self._patience_s = 0.0
            verdict = self.desk.ask(name, wanted)
        if verdict is Verdict.READY:
            self._patience_s = 0.0  # the next step has work
        if verdict is Verdict.FAILED:
            self._give_up(name, asked)
        self._here = {n: key for n, (key, _) in asked.wanted.items() if key in wanted}
        if verdict is Verdict.READY:
            asked.came = asked.came or {n: self._came(key) for n, key in self._here.items()}
            self._here |= self._pin_what_is_here(request, unread)
        else:
            self._here = {}
            self.desk.forget(_happens_to_be_here(name))  # who waits holds nothing
        return verdict is Verdict.READY

    def has(self, identifier: str) -> bool:
        """Whether an item is here: asked right after :meth:`is_available`, for one of that request's. What is said to be here is not
        encoded, so it stays until it is read."""
        return identifier in self._here

    def load(self, request: Request, index: int) -> None:
        """The next step reads this item, into the place that vLLM has for it. Called right after :meth:`has`; one that is not here is
        encoded in that step."""
        identifier = request.mm_features[index].identifier
        if identifier in self._here:
            handle = self.desk.pin(f"step {self._step + 1}", self._here[identifier])
            assert handle is not None, "this request holds it"
            self._loads[identifier] = handle

    def take_loads(self, scheduled_tokens: int) -> Loads:
        """What the next step reads. Its items stay here until the workers have said that they are past it."""
        self._step += 1
        self._patience_s = IDLE_WAIT_S
        if scheduled_tokens:
            self._last_work = self._step
        loads, self._loads = Loads(self._step, self._loads), {}
        if loads.handles:
            self._steps_under_way.append(self._step)
        return loads

    def on_loaded(self, step: int) -> None:
        """All workers are past this step, and so past those before, whether they had work for them or not."""
        self._last_done = max(self._last_done, step)
        done = [number for number in self._steps_under_way if number <= step]
        self._steps_under_way = [number for number in self._steps_under_way if number > step]
        for number in done:
            self.desk.forget(f"step {number}")

    def read(self, request: Request, index: int) -> None:
        """The model has read an item of this request. Another place of its prompt may want the same one."""
        feature = request.mm_features[index]
        if all(other.identifier != feature.identifier for other in request.mm_features[index + 1 :]):
            key = ItemKey(content_hash_of(feature.identifier), request.get_num_encoder_embeds(index))
            for name in (request.request_id, _happens_to_be_here(request.request_id)):
                self.desk.let_go(name, key)

    def take_unavailable(self) -> set[str]:
        """Requests that have to fail."""
        taken, self._unavailable = self._unavailable, set()
        return taken

    def end(self, request: Request) -> dict[str, Any]:
        """The request is over, however it went. For its answer: how each item came here."""
        asked = self._asked.pop(request.request_id, None)
        self._unavailable.discard(request.request_id)
        self.desk.forget(request.request_id)
        self.desk.forget(_happens_to_be_here(request.request_id))
        return {"embedwire": {"items": asked.came}} if asked is not None and asked.came else {}

    def close(self) -> None:
        """End all rooms and free all memory."""
        self._reporter.close()
        self._receiver.close()
        self.desk.close()

    # ------------------------------------------------------------------ what a request says

    def _read(self, request: Request) -> _Asked:
        params = request.ec_transfer_params
        if not params:
            return _Asked("", {})
        try:
            ask = msgspec.convert(params, Params).embedwire
        except msgspec.ValidationError as error:
            self._refuse(request.request_id, Cause.VIOLATION, f"ec_transfer_params: {error}")
            return _Asked("", {})
        offered = {
            name: (ItemKey(content_hash_of(name), item.tokens), item.addresses[0])
            for name, item in ask.items.items()
        }
        return _Asked(ask.ticket, offered)

    def _leave_media(self, request: Request, asked: _Asked) -> None:
        """What comes from an encoder is never encoded here, so its pixels do not go out to the workers: megabytes a picture."""
        for feature in request.mm_features:
            if feature.identifier in asked.wanted:
                feature.data = without_media(feature.data, self._resolver.fields_for(feature.modality))

    @property
    def _is_idle(self) -> bool:
        """The last step had no work, and none with work is under way."""
        return self._last_work < self._step and self._last_work <= self._last_done

    def _need(self, request: Request, index: int, asked: _Asked) -> dict[ItemKey, str]:
        feature = request.mm_features[index]
        rows = request.get_num_encoder_embeds(index)
        if feature.identifier in asked.wanted:
            key, address = asked.wanted[feature.identifier]
            if key.tokens == rows:
                return {key: address}
            detail = f"item {index} has {key.tokens} rows, and the prompt a place for {rows}"
            self._refuse(request.request_id, Cause.VIOLATION, detail, key, address)
        elif not (self._may_encode and self._is_raw(feature)):
            self._refuse(request.request_id, Cause.UNKNOWN_ITEM, f"no encoder was named for item {index}")
        return {}

    def _pin_what_is_here(self, request: Request, indices: Sequence[int]) -> dict[str, ItemKey]:
        """Items that no encoder was named for, and that came for another request."""
        here: dict[str, ItemKey] = {}
        for index in indices:
            identifier = request.mm_features[index].identifier
            if identifier not in self._here:
                key = ItemKey(content_hash_of(identifier), request.get_num_encoder_embeds(index))
                if self.desk.pin(_happens_to_be_here(request.request_id), key) is not None:
                    here[identifier] = key
        return here

    def _came(self, key: ItemKey) -> dict[str, Any]:
        report = self.desk.report(key)
        return {
            "tokens": report.total_tokens,
            "rounds": report.rounds,
            "bytes": report.bytes,
            "transport": report.transport,
            "transfer_ms": round(report.transfer_ms, 3),
        }

    def _is_raw(self, feature: Any) -> bool:
        """Whether it came with what a tower needs, and not with the metadata of one that another server has."""
        names = set(feature.data.get_data()) if feature.data is not None else set()
        return bool(names - self._resolver.fields_for(feature.modality))

    def _refuse(
        self, name: str, cause: Cause, detail: str, key: ItemKey | None = None, address: str = ""
    ) -> None:
        self.desk.refuse(name, ItemFailure(cause, detail, key, address))

    def _give_up(self, name: str, asked: _Asked) -> None:
        self._unavailable.add(name)
        failure = self.desk.failure_of(name)
        if asked.was_told or failure is None:
            return
        asked.was_told = True
        logger.warning("request %s fails: %s: %s", name, failure.cause.value, failure.detail)
        if asked.ticket:
            identifier = next((n for n, (key, _) in asked.wanted.items() if key == failure.key), "")
            self._reporter.tell(
                {
                    "ticket": asked.ticket,
                    "cause": failure.cause.value,
                    "detail": failure.detail,
                    "identifier": identifier,
                    "address": failure.address,
                }
            )


def _happens_to_be_here(request: str) -> str:
    """Under which name a request holds what it did not have to ask for."""
    return f"{request} (happens to be here)"


class ConsumerWorker:
    """Copies what a step reads into vLLM's encoder cache."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._step = 0

    def load(
        self, loads: Loads, cache: MutableMapping[str, torch.Tensor], device: torch.device | str
    ) -> None:
        """Map and copy. All was checked before the scheduler named it, so what fails here is our own fault, and the step's."""
        for identifier, handle in loads.handles.items():
            if identifier not in cache:
                arrays, _ = attach(handle, self._layout)
                cache[identifier] = tensor_of(arrays, device)
        self._step = loads.step

    def take_step(self) -> int:
        """The last step whose items it has copied."""
        return self._step


def steps_of(reports: Sequence[int]) -> int:
    """The step that all workers are past."""
    return min(reports)
