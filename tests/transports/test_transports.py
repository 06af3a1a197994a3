"""The registry of wires."""

from __future__ import annotations

import subprocess
import sys

import pytest

from embedwire import transports
from embedwire.errors import ConfigurationError


@pytest.mark.parametrize("name", transports.names())
def test_every_name_opens_both_halves(name: str) -> None:
    try:
        inbound = transports.open_inbound(name, host="127.0.0.1")
    except ConfigurationError as reason:
        if name in transports.built_in():
            raise
        pytest.skip(f"{name} is not installed: {reason}")
    outbound = transports.open_outbound(name, host="127.0.0.1")
    assert (inbound.name, outbound.name) == (name, name)
    outbound.close()
    inbound.close()


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="'rdma' is not one of shm, tcp"):
        transports.open_inbound("rdma", host="127.0.0.1")


def test_a_wire_without_its_library_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "_WIRES", {"far": ("embedwire_no_such_module", "A", "B")})
    with pytest.raises(ConfigurationError, match="'far' can not be used here: No module"):
        transports.open_outbound("far", host="127.0.0.1")


def test_no_wire_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, embedwire.transports; print([m for m in sys.modules if 'shm' in m or '.tcp' in m])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
