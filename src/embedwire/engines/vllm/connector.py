"""``EmbedwireECConnector``: vLLM's encoder cache over Embedwire's rooms, loaded from outside vLLM.

    --ec-transfer-config '{"ec_connector": "EmbedwireECConnector",
                           "ec_connector_module_path": "embedwire.engines.vllm.connector",
                           "ec_role": "ec_producer", "ec_connector_extra_config": {...}}'

It only says which hook of vLLM is whose: ``producer.py`` and ``consumer.py`` do the work, each with a half in the workers and one in the
scheduler. The API server imports this module too, so nothing happens at import. Written against vLLM 0.32; docs/how-to/serve-with-vllm.md
lists what of its interface is relied on.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)

from embedwire.engines.vllm.consumer import ConsumerScheduler, ConsumerWorker, Loads, steps_of
from embedwire.engines.vllm.deepstack import keep_deepstack
from embedwire.engines.vllm.items import item_layout
from embedwire.engines.vllm.producer import ProducerScheduler, ProducerWorker, address_file_of
from embedwire.engines.vllm.settings import read_settings
from embedwire.errors import ConfigurationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ECConnectorOutput
    from vllm.v1.request import Request


@dataclass
class StepMetadata(ECConnectorMetadata):
    """From the scheduler to all workers, for one step: items to copy in, and items to keep that are encoded already."""

    loads: Loads
    cached: tuple[str, ...] = ()


@dataclass
class StepReport(ECConnectorWorkerMetadata):
    """From the workers to the scheduler: the last step of each whose items are copied."""

    steps: list[int] = field(default_factory=list)

    def aggregate(self, other: StepReport) -> StepReport:
        return StepReport(self.steps + other.steps)


class EmbedwireECConnector(ECConnectorBase):
    """Both roles, both halves. Raises ConfigurationError for settings that do not hold, before the server answers anything."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        config = vllm_config.ec_transfer_config
        self._settings = read_settings(config.ec_connector_extra_config)
        self._layout = item_layout(vllm_config)
        self._address_file = address_file_of(
            str(config.engine_id), vllm_config.parallel_config.data_parallel_rank
        )
        self._keeper: ProducerWorker | None = None
        self._copier: ConsumerWorker | None = None
        self._teller: ProducerScheduler | None = None
        self._fetcher: ConsumerScheduler | None = None
        if role is ECConnectorRole.SCHEDULER:
            self._begin_scheduler(vllm_config)
        elif self.is_consumer:
            keep_deepstack(vllm_config)
            self._copier = ConsumerWorker(self._layout)

    def _begin_scheduler(self, vllm_config: VllmConfig) -> None:
        from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver

        model = vllm_config.model_config
        resolver = PlaceholderMetadataResolver(model)
        if self.is_producer:
            self._check_widths(vllm_config.ec_transfer_config.mm_encoder_output_widths)
            self._teller = ProducerScheduler(address_file=self._address_file, resolver=resolver)
        if self.is_consumer:
            stages = vllm_config.parallel_config.pipeline_parallel_size
            if stages > 1:
                raise ConfigurationError(
                    f"pipeline_parallel_size {stages}: a server that reads embeddings can not be divided in stages, "
                    "since the first one's reports do not reach the scheduler; divide it by tensors"
                )
            has_tower = not model.get_multimodal_config().language_model_only
            may_encode = has_tower and (self._settings.local_encode or self.is_producer)
            self._fetcher = ConsumerScheduler(
                self._layout, self._settings, resolver=resolver, may_encode=may_encode
            )
            self._greet(self._fetcher)

    def _greet(self, fetcher: ConsumerScheduler) -> None:
        try:
            fetcher.greet(self._settings.encoders, timeout_s=self._settings.item_deadline_s)
        except ConfigurationError:
            fetcher.close()
            raise

    def _check_widths(self, measured: dict[str, int]) -> None:
        (width,) = self._layout.fields[0].shape
        for modality, other in measured.items():
            if other != width:
                raise ConfigurationError(
                    f"the encoder's {modality} rows are {other} wide, where the language model expects {width}"
                )

    def shutdown(self) -> None:
        for half in (self._fetcher, self._keeper):
            if half is not None:
                half.close()
        self._fetcher = self._keeper = None

    # ------------------------------------------------------------------ in the workers

    def start_worker_services(self) -> None:
        if self.is_producer and _is_first_rank():
            self._keeper = ProducerWorker(self._layout, self._settings, address_file=self._address_file)

    def start_save_caches(self, **kwargs: Any) -> None:
        if self._keeper is not None:
            self._keeper.save_cached(self._metadata().cached, kwargs["encoder_cache"])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        if self._keeper is not None:
            self._keeper.save(mm_hash, encoder_cache[mm_hash])

    def start_load_caches(self, encoder_cache: MutableMapping[str, torch.Tensor], **kwargs: Any) -> None:
        if self._copier is not None:
            self._copier.load(self._metadata().loads, encoder_cache, _device())

    def build_connector_worker_meta(self) -> StepReport | None:
        return None if self._copier is None else StepReport([self._copier.take_step()])

    def _metadata(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    # ------------------------------------------------------------------ in the scheduler

    def has_cache_item(self, identifier: str) -> bool:
        return self._fetcher is not None and self._fetcher.has(identifier)

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        if self._teller is not None:
            self._teller.want(request)
        return self._fetcher is None or self._fetcher.is_available(request, num_computed_tokens)

    def take_unavailable_requests(self) -> set[str]:
        return set() if self._fetcher is None else self._fetcher.take_unavailable()

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        if self._fetcher is not None:
            self._fetcher.load(request, index)

    def update_state_after_free(self, request: Request, index: int) -> None:
        if self._fetcher is not None:
            self._fetcher.read(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepMetadata:
        loads = (
            Loads(0)
            if self._fetcher is None
            else self._fetcher.take_loads(scheduler_output.total_num_scheduled_tokens)
        )
        return StepMetadata(loads, () if self._teller is None else self._teller.take_wanted())

    def update_connector_output(self, connector_output: ECConnectorOutput) -> None:
        report = connector_output.ec_connector_worker_meta
        if self._fetcher is not None and isinstance(report, StepReport):
            self._fetcher.on_loaded(steps_of(report.steps))

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        answer: dict[str, Any] = {}
        if self._teller is not None:
            answer |= self._teller.answer(request)
        if self._fetcher is not None:
            answer |= self._fetcher.end(request)
        return False, answer or None


def _is_first_rank() -> bool:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return bool(get_tp_group().rank_in_group == 0 and get_pp_group().is_first_rank)


def _device() -> str:
    from vllm.platforms import current_platform

    kind = str(current_platform.device_type)
    return f"{kind}:{current_platform.current_device()}" if current_platform.is_cuda_alike() else kind
