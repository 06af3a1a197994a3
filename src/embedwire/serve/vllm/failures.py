"""What follows when a vLLM language server failed a request with media: whom to avoid, what to forget, whether to go on.

Owns the meaning of causes; it must not know calls. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedwire.errors import TransferError
from embedwire.protocol.messages import Cause
from embedwire.serve.faults import Fault, fault_of
from embedwire.serve.vllm.ends import End
from embedwire.serve.vllm.items import Encoded

UNKNOWN_ITEM = "unknown_item"
"""The encoder has evicted the item: it is asked again, and nobody is to blame."""
FINAL_CAUSES = frozenset({Cause.ABORTED, Cause.DEADLINE, Cause.NEVER_FITS})
"""Another attempt would end the same way, or has no time left."""
LANGUAGE_CAUSES = frozenset({Cause.OVERLOADED, Cause.RANK_LOST})
"""The language server is to blame, not the encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``fault`` is what the client hears if nothing helps. The next attempt, unless the failure ``is_final``, avoids the worker at
    ``to_blame``, rather goes to another than the one ``doubted``, and asks anew for the items ``lost`` and for all that the encoder
    ``lost_encoder`` had."""

    fault: Fault
    is_final: bool = False
    to_blame: str | None = None
    lost: frozenset[str] = frozenset()
    lost_encoder: str | None = None
    doubted: str | None = None


def judge(
    said: Fault, end: End | None, encoded: Sequence[Encoded], *, language_url: str, began_s: float
) -> Verdict:
    """``said`` is vLLM's own word, ``end`` the cause that its connector told, if any; the attempt with the answers ``encoded`` began
    at ``began_s``."""
    everything = frozenset(name for answer in encoded for name in answer.offered)
    if end is None:
        return Verdict(fault=said, lost=everything, doubted=language_url)
    fault = fault_of(TransferError(end.cause, end.words))
    if end.cause in FINAL_CAUSES:
        return Verdict(fault=fault, is_final=True)
    if end.cause in LANGUAGE_CAUSES:
        return Verdict(fault=fault, to_blame=language_url)
    if end.cause == UNKNOWN_ITEM:
        return Verdict(fault=fault, lost=frozenset({end.identifier}) if end.identifier else everything)
    source = _source_of(end, encoded)
    if source is None:
        return Verdict(fault=fault, lost=everything)
    # What was remembered may be of an earlier life of the encoder; only a fresh answer proves that it fails now.
    is_fresh = source.at_s >= began_s
    return Verdict(fault=fault, lost_encoder=source.encoder, to_blame=source.encoder if is_fresh else None)


def _source_of(end: End, encoded: Sequence[Encoded]) -> Encoded | None:
    """The answer that an end is about."""
    for answer in encoded:
        if end.identifier in answer.offered or any(
            end.address in entry.addresses for entry in answer.offered.values()
        ):
            return answer
    return None
