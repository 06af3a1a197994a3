"""From the arrays of a received room to the prompt that the language model reads. Copies nothing."""

from __future__ import annotations

from embedwire.endpoint import Received
from embedwire.language.interface import AssembledPrompt, TransferReport
from embedwire.limits import AUX_POSITION_DELTA
from embedwire.protocol.topology import ALONE, RankGroup


def assemble(received: Received, *, group: RankGroup = ALONE) -> AssembledPrompt:
    """The prompt of a MULTIMODAL room. Fields that the layout does not have are None. It has a key where each rank of a group has it."""
    arrays = received.arrays
    return AssembledPrompt(
        fill_ids=arrays["fill_ids"],
        input_embeddings=arrays["input_embeddings"],
        mrope_positions=arrays.get("mrope_positions"),
        mrope_position_delta=received.aux[AUX_POSITION_DELTA],
        deepstack_embeddings=arrays.get("deepstack_embeddings"),
        key=(received.room, received.attempt) if group.size > 1 else None,
    )


def report_of(received: Received, *, group: RankGroup = ALONE) -> TransferReport:
    """How the room got here, for the answer."""
    report = received.report
    return TransferReport(
        room=received.room,
        transport=report.transport,
        total_tokens=report.total_tokens,
        rounds=report.rounds,
        bytes=report.bytes,
        encode_ms=report.source_ms,
        transfer_ms=report.transfer_ms,
        wire_bytes=report.bytes * report.readers,
        ranks=group.size,
        delivery=group.delivery if group.size > 1 else None,
        extra={"wait_ms": report.wait_ms, "attempt": received.attempt},
    )
