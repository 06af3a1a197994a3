"""What a reader of a measurement has to know of the machine that it was made on, transports that cannot run on it included. Reads; changes
nothing. Any thread."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from embedwire.errors import TransportError


@dataclass(frozen=True, slots=True)
class Host:
    """``cores`` are those that this process may use; ``load_1m`` is the load average before the measurement."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    load_1m: float


class UnusableTransport(TransportError):
    """A transport cannot run on this host; others may. The message names the transport and the remedy."""

    def __init__(self, transport: str, reason: object) -> None:
        super().__init__(f"{transport} was not measured: {reason}")


def this_host() -> Host:
    """The machine under this process."""
    return Host(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        load_1m=round(os.getloadavg()[0], 2),
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
