"""The libraries behind the mooncake and nixl wires: one that is missing, a process that ends, and GPU memory."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from embedwire.errors import ConfigurationError
from embedwire.testing import wires
from embedwire.transports import built_in, mooncake, names, nixl, open_inbound, open_outbound
from embedwire.transports.onesided.engine import EngineError

ADAPTERS: dict[str, ModuleType] = {"mooncake": mooncake, "nixl": nixl}
MOVE = """
import sys
from embedwire.testing import wires
getattr(wires, sys.argv[1])()
print("moved")
"""


def load_or_skip(wire: str) -> None:
    """Skips where the library, or one that it needs, is not installed."""
    if find_spec(wire) is None:
        pytest.skip(f"{wire} is not installed")
    try:
        ADAPTERS[wire].load()
    except ConfigurationError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("wire", ADAPTERS)
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named x"), {"mooncake": mooncake.PACKAGE, "nixl": nixl.PACKAGE}),
        (
            ImportError("libx.so.1: cannot open shared object file"),
            {"mooncake": mooncake.SYSTEM_PACKAGES, "nixl": "shared library"},
        ),
    ],
    ids=["package", "system"],
)
def test_a_missing_library_is_named(
    wire: str, error: ImportError, words: dict[str, str], monkeypatch: Any
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(ADAPTERS[wire], "import_module", fail)
    for open_half in (open_inbound, open_outbound):
        with pytest.raises(ConfigurationError, match=words[wire]):
            open_half(wire, host="127.0.0.1")


def test_libraries_of_others_are_chosen_by_name_only() -> None:
    assert built_in() == ("shm", "tcp")
    assert set(names()) - set(built_in()) == set(ADAPTERS)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("wire", ADAPTERS)
def test_a_process_that_used_it_ends_well(wire: str) -> None:
    """And says nothing of its own. Two copies of one library of the system, in one process, have made it end with a fault."""
    load_or_skip(wire)
    ended = subprocess.run(
        [sys.executable, "-c", MOVE, wire], capture_output=True, text=True, check=False, timeout=100
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "moved\n", "")


REFUSED = """
import numpy as np
from embedwire.transports import nixl
plugin = any("libplugin_UCX" in line for line in open("/proc/self/maps"))
inbound, outbound = nixl.NixlInbound(host="127.0.0.1"), nixl.NixlOutbound(host="127.0.0.1")
print("loaded before:", plugin, "after:", any("libplugin_UCX" in line for line in open("/proc/self/maps")))
memory = np.zeros(16, np.uint8)
receiving = nixl.NixlReceivingEngine(memory.ctypes.data, memory.nbytes)
address = receiving.address()
receiving.close()
try:
    nixl.NixlSendingEngine().connect(address)
except Exception as error:
    print(type(error).__name__)
"""


def test_nixl_is_ready_before_the_first_session_and_keeps_the_output_clean() -> None:
    """UCX takes half a second to load, which a first session had to afford out of its time-out; and it reports on standard output."""
    try:
        nixl.load()
    except ConfigurationError as reason:
        pytest.skip(f"nixl is not installed: {reason}")
    ended = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True, timeout=100
    )
    assert ended.stdout == "loaded before: False after: True\nEngineError\n"


def test_what_the_user_wants_to_hear_of_mooncake_is_heard(monkeypatch: Any) -> None:
    load_or_skip("mooncake")
    monkeypatch.setenv("MC_LOG_LEVEL", "ERROR")
    ended = subprocess.run(
        [sys.executable, "-c", MOVE, "mooncake"], capture_output=True, text=True, check=True, timeout=100
    )
    assert "transfer_metadata" in ended.stderr


def test_a_nixl_agent_has_no_thread_that_spins() -> None:
    """The one that receives has a thread, which sleeps until something comes; the one that sends needs none."""
    try:
        wires.nixl()
    except ConfigurationError as reason:
        pytest.skip(f"nixl is not installed: {reason}")
    memory = np.zeros(4096, np.uint8)
    first = nixl.NixlSendingEngine()  # with it comes a thread of UCX, for all of them
    before = tasks()
    sending = nixl.NixlSendingEngine()
    assert not tasks() - before
    receiving = nixl.NixlReceivingEngine(memory.ctypes.data, memory.nbytes)
    (thread,) = tasks() - before
    assert is_asleep(thread), "it has not slept within 1000 looks"
    receiving.close()
    sending.close()
    assert not tasks() - before
    first.close()


def tasks() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def is_asleep(thread: str) -> bool:
    """Whether the thread sleeps at any of many looks: one that spins is running, or waits for a processor, at all of them."""
    states = set()
    for _ in range(1000):
        with open(f"/proc/self/task/{thread}/stat") as stat:
            states.add(stat.read().rpartition(")")[2].split()[0])
        os.sched_yield()
    return "S" in states


@pytest.mark.parametrize("address", [b"", b"\xff\xfe", b"127.0.0.1:1", b"127.0.0.1:1 x"])
def test_an_address_that_is_none_is_the_receivers_fault(address: bytes) -> None:
    """A hostile receiver answers a greeting with it."""
    load_or_skip("mooncake")
    engine = mooncake.MooncakeSendingEngine(host="127.0.0.1")
    with pytest.raises(EngineError):
        engine.connect(address)
    engine.close()


def test_a_descriptor_that_is_reused_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads open and close descriptors while Mooncake's listener is searched for: a number may be a socket's no more."""
    read_end, write_end = os.pipe()
    monkeypatch.setattr(os, "readlink", lambda _: "socket:[1]")
    before = len(os.listdir("/proc/self/fd"))
    mooncake._shorten_destructor("127.0.0.1", 1)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("wire", ADAPTERS)
def test_gpu_memory_is_refused_as_long_as_no_wire_takes_it(wire: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    load_or_skip(wire)
    inbound = open_inbound(wire, host="127.0.0.1")
    with pytest.raises((TypeError, ValueError)):
        inbound.register(memoryview(torch.zeros(4096, dtype=torch.uint8, device="cuda")))
    inbound.close()
