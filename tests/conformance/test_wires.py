"""Every wire of this package against the public conformance suite, the fake one too, since other tests depend on it.

The suite covers pieces in any order, ends in mid-write, and peers that stop or die.
"""

from __future__ import annotations

import os
import threading
import weakref

import pytest

from embedwire.errors import ConfigurationError
from embedwire.testing import wires
from embedwire.testing.conformance import Conformance
from embedwire.testing.wires import NotApplicable

WIRES = {
    "shm": wires.shm,
    "tcp": wires.tcp,
    "mooncake": wires.mooncake,
    "nixl": wires.nixl,
    "fake": wires.fake,
    "fake_one_sided": wires.fake_one_sided,
}


@pytest.mark.failure_mode(
    "scattered-blocks",
    "reuse-during-write",
    "frozen-peer-holds-blocks",
    "encoder-killed",
    "language-server-killed",
)
@pytest.mark.invariant("no-early-reuse")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("check", Conformance.checks())
@pytest.mark.parametrize("wire", WIRES)
def test_wire(wire: str, check: str) -> None:
    """Each check of the suite is described at its method in ``embedwire.testing.conformance``."""
    try:
        suite = Conformance(WIRES[wire]())
    except ConfigurationError as reason:
        pytest.skip(f"{wire} is not installed: {reason}")
    try:
        suite.run(check)
    except NotApplicable as reason:
        pytest.skip(f"{wire}: {reason}")


def test_what_others_left_is_not_counted() -> None:
    """Garbage from before may go while a check runs, and descriptors with it."""
    suite = Conformance(wires.fake())
    garbage = threading.Event()
    garbage.itself = garbage  # type: ignore[attr-defined]
    weakref.finalize(garbage, os.close, os.eventfd(0))
    del garbage
    suite.run(Conformance.checks()[0])
