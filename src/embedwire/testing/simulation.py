"""The simulation: two sides of the protocol over a seeded link in virtual time. For tests, and from the command line::

python -m embedwire.testing.simulation --seed 7 --runs 100
"""

from __future__ import annotations

import sys

from embedwire.testing.sim_link import Weather
from embedwire.testing.sim_random import main
from embedwire.testing.sim_transfer import Transfer
from embedwire.testing.sim_wire import FENCED, ONE_SIDED, InvariantBroken, WireFaults
from embedwire.testing.sim_world import World

__all__ = ["FENCED", "ONE_SIDED", "InvariantBroken", "Transfer", "Weather", "WireFaults", "World"]

if __name__ == "__main__":
    sys.exit(main())
