"""Creates the parts of a server from settings: engine, endpoint, service, app; and closes them in the opposite order.

For servers of one process and, with a ``Membership``, for each rank of a group. It must not know processes or commands. Main thread.
Imports an engine only when it is created.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from embedwire.cli.screen import size
from embedwire.cli.settings import Settings
from embedwire.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from fastapi import FastAPI

    from embedwire.cli.ranks import Membership
    from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
    from embedwire.engines.transformers.encoder import TransformersEncoder
    from embedwire.group import FollowingSender
    from embedwire.memory.layout import Layout

Built = tuple["FastAPI", dict[str, Any]]
"""An app, and what its server reports when it is ready."""


def build_registry(settings: Settings) -> Built:
    """The registry's app."""
    from embedwire.registry import Registry
    from embedwire.serve.registry_app import registry_app
    from embedwire.serve.watch import WatchTimes

    table = Registry(misses_to_evict=settings.misses_to_evict)
    return registry_app(table, times=WatchTimes(interval_s=settings.check_interval_s)), {"role": "registry"}


def build_router(settings: Settings) -> Built:
    """The router's app, for the engine of the settings. Raises ConfigurationError unless there is either a registry or a list of
    workers."""
    return _vllm_router(settings) if settings.engine == "vllm" else _own_router(settings)


def _vllm_router(settings: Settings) -> Built:
    from embedwire.serve.vllm.app import VllmSettings, vllm_app
    from embedwire.serve.vllm.dispatch import VllmLimits
    from embedwire.serve.watch import WatchTimes

    if settings.worker_urls:
        raise ConfigurationError(
            "worker_urls are of this package's own servers; vLLM's are encoder and language"
        )
    limits = VllmLimits(
        attempts_max=settings.attempts_max,
        deadline_s=settings.deadline_s,
        item_deadline_s=settings.item_deadline_s,
        default_max_tokens=settings.default_max_tokens,
        remembered_max=settings.remembered_items,
    )
    app = vllm_app(
        VllmSettings(
            registry_url=settings.registry_url,
            encoder_urls=settings.encoder,
            language_urls=settings.language,
            media=settings.media,
            media_limits=_media_limits(settings),
            requests_max=settings.requests_max,
            misses_to_evict=settings.misses_to_evict,
            watch=WatchTimes(interval_s=settings.check_interval_s),
            limits=limits,
        )
    )
    return app, {"role": "router", "engine": "vllm"}


def _own_router(settings: Settings) -> Built:
    from embedwire.serve.dispatch import DispatchLimits
    from embedwire.serve.router_app import RouterSettings, router_app
    from embedwire.serve.watch import WatchTimes

    limits = DispatchLimits(
        attempts_max=settings.attempts_max,
        deadline_s=settings.deadline_s,
        default_max_tokens=settings.default_max_tokens,
    )
    app = router_app(
        RouterSettings(
            registry_url=settings.registry_url,
            worker_urls=settings.worker_urls,
            requests_max=settings.requests_max,
            misses_to_evict=settings.misses_to_evict,
            watch=WatchTimes(interval_s=settings.check_interval_s),
            limits=limits,
        )
    )
    return app, {"role": "router"}


@contextmanager
def built_encoder(
    model: str, settings: Settings, *, name: str, membership: Membership | None = None
) -> Iterator[Built]:
    """An encoder server's app; its parts are closed when the block ends. With ``membership`` it is rank 0 of a group."""
    from embedwire.encode import EncodeService
    from embedwire.serve.encoder_app import encoder_app
    from embedwire.serve.metrics import AppMetrics

    with ExitStack() as stack:
        engine = _encoder_engine(model, settings, membership)
        stack.callback(engine.close)
        endpoint = stack.enter_context(_sender_of(engine.layout, settings, membership))
        sender = stack.enter_context(membership.leading(endpoint)) if membership else endpoint
        service = EncodeService(
            engine, sender, batch_tokens=settings.batch_tokens, memory_wait_s=settings.memory_wait_s
        )
        stack.callback(service.close)
        app = encoder_app(
            service,
            model=name,
            layout=engine.layout,
            control_addresses=sender.addresses,
            media=_media(settings),
            metrics=AppMetrics({"sender": endpoint.stats, "encode": service.stats}),
            registry=_link(settings),
        )
        memory = size(settings.source_memory)
        yield (
            app,
            {"role": "encoder", "model": name, "rooms_at": ", ".join(sender.addresses), "memory": memory},
        )


@contextmanager
def built_language(
    model: str, settings: Settings, *, name: str, membership: Membership | None = None
) -> Iterator[Built]:
    """A language server's app; its parts are closed when the block ends. With ``membership`` it is rank 0 of a group."""
    from embedwire.language.service import LanguageService
    from embedwire.protocol.topology import ALONE
    from embedwire.serve.language_app import language_app
    from embedwire.serve.metrics import AppMetrics

    group = membership.group if membership else ALONE
    with ExitStack() as stack:
        engine = _language_engine(model, settings, membership)
        stack.callback(engine.close)
        receiver = stack.enter_context(receiver_of(engine.layout, settings, membership=membership))
        service = LanguageService(engine, receiver, group=group)
        stack.callback(service.close)
        if membership:
            membership.on_lost(service.lose)
        app = language_app(
            service,
            model=name,
            layout=engine.layout,
            metrics=AppMetrics({"receiver": receiver.stats, "language": service.stats}),
            registry=_link(settings),
            default_max_tokens=settings.default_max_tokens,
            readers=len(group.readers),
        )
        pool = f"{settings.num_blocks} blocks of {settings.block_size} tokens"
        memory = size(settings.assembly_memory)
        delivery = {"delivery": group.delivery} if membership else {}
        yield app, {"role": "language", "model": name, "pool": pool, "memory": memory} | delivery


@contextmanager
def following_encoder(model: str, settings: Settings, membership: Membership) -> Iterator[Callable[[], None]]:
    """The work of a rank above 0 of an encoder: its share of the images, and its part of every room."""
    engine = _encoder_engine(model, settings, membership)
    with (
        _sender_of(engine.layout, settings, membership) as endpoint,
        membership.following(endpoint) as sender,
    ):
        yield lambda: engine.follow(partial(_fill, sender))


def _fill(sender: FollowingSender, key: tuple[int, int] | None, arrays: Mapping[str, np.ndarray]) -> None:
    assert key is not None, "a service names all its prompts"
    sender.fill(key, arrays)


@contextmanager
def following_language(
    model: str, settings: Settings, membership: Membership
) -> Iterator[Callable[[], None]]:
    """The work of a rank above 0 of a language server: the steps of rank 0, with arrays of its own."""
    from embedwire.engines.transformers.ranks import TransformersFollower
    from embedwire.language.arrivals import Arrivals

    arrivals = Arrivals(timeout_s=settings.rank_timeout_s)
    follower = TransformersFollower(
        model,
        tensor_parallel=membership.tensor_parallel,
        dtype=settings.dtype,
        device=membership.device,
        threads=membership.threads,
        prompt_of=arrivals.prompt_of,
        on_read=arrivals.forget,
    )
    with receiver_of(follower.layout, settings, membership=membership, on_room=arrivals.enter):
        yield follower.run


def _encoder_engine(model: str, settings: Settings, membership: Membership | None) -> TransformersEncoder:
    """The encode half of a model, or one rank's."""
    import torch

    from embedwire.engines.transformers.encoder import TransformersEncoder

    if threads := membership.threads if membership else settings.threads:
        torch.set_num_threads(threads)
    return TransformersEncoder(
        model,
        dtype=settings.dtype,
        device=membership.device if membership else settings.device,
        max_image_pixels=settings.max_pixels,
        tensor_parallel=membership.tensor_parallel if membership else None,
    )


def _language_engine(model: str, settings: Settings, membership: Membership | None) -> Any:
    from embedwire.engines.transformers.generation import TransformersLanguage

    return TransformersLanguage(
        model,
        dtype=settings.dtype,
        device=membership.device if membership else settings.device,
        max_batch=settings.max_batch,
        max_waiting=settings.max_waiting,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        max_cache_tokens=settings.max_cache_tokens,
        threads=membership.threads if membership else settings.threads,
        tensor_parallel=membership.tensor_parallel if membership else None,
    )


def _sender_of(layout: Layout, settings: Settings, membership: Membership | None) -> SenderEndpoint:
    """The sender of an encoder, or of one rank of it."""
    from embedwire.endpoint import SenderEndpoint

    rank = membership.rank if membership else 0
    return SenderEndpoint(
        layout,
        host=settings.host,
        port=settings.control_port and settings.control_port + rank,
        rank=rank,
        ranks=membership.group.size if membership else 1,
        memory_bytes=settings.source_memory,
        transports=settings.transports,
        limits=settings.limits,
    )


def receiver_of(
    layout: Layout, settings: Settings, *, membership: Membership | None, on_room: Any = None
) -> ReceiverEndpoint:
    """The receiver of a language server, or of one rank of it."""
    from embedwire.endpoint import ReceiverEndpoint

    is_dummy = membership is not None and membership.group.is_dummy(membership.rank)
    return ReceiverEndpoint(
        layout,
        num_blocks=1 if is_dummy else settings.num_blocks,  # no sender writes into a dummy rank's pool
        block_size=settings.block_size,
        default_allocate_tokens=settings.default_allocate_tokens,
        assembly_bytes=settings.assembly_memory,
        host=settings.host,
        transports=settings.transports,
        limits=settings.limits,
        place=membership.rank_config(on_room) if membership else None,
    )


def _media(settings: Settings) -> Any:
    from embedwire.serve.media import MediaFetcher

    return MediaFetcher(_media_limits(settings))


def _media_limits(settings: Settings) -> Any:
    from embedwire.serve.media import MediaLimits

    return MediaLimits(
        items_max=settings.media_items_max,
        item_bytes_max=settings.media_item_size,
        timeout_s=settings.media_timeout_s,
        allow_private_media=settings.allow_private_media,
    )


def _link(settings: Settings) -> Any:
    from embedwire.serve.worker_app import RegistryLink

    return RegistryLink(url=settings.registry_url)
