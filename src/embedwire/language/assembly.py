"""From the arrays of a received room to the prompt that the language model reads. Copies nothing."""

from __future__ import annotations

from embedwire.endpoint import Received
from embedwire.language.interface import AssembledPrompt, TransferReport
from embedwire.limits import AUX_POSITION_DELTA


def assemble(received: Received) -> AssembledPrompt:
    """The prompt of a MULTIMODAL room. Fields that the layout does not have are None."""
    arrays = received.arrays
    return AssembledPrompt(
        fill_ids=arrays["fill_ids"],
        input_embeddings=arrays["input_embeddings"],
        mrope_positions=arrays.get("mrope_positions"),
        mrope_position_delta=received.aux[AUX_POSITION_DELTA],
        deepstack_embeddings=arrays.get("deepstack_embeddings"),
    )


def report_of(received: Received) -> TransferReport:
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
        extra={"wait_ms": report.wait_ms, "attempt": received.attempt},
    )
