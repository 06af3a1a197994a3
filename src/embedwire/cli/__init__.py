"""Floor 8: the ``embedwire`` command.

========== ==============================================================================================
file       contents
========== ==============================================================================================
__main__   the commands by name, and exit codes
options    where the values of settings come from; the flags of commands; ``settings``
settings   every setting
screen     tables, lines and JSON files that commands write
demo       ``demo`` and ``tiny-model``
ask        ``ask``
stack      ``up``: all servers of a stack, of this package or of vLLM
servers    ``registry``, ``router``, ``encoder``, ``language``, a rank of one of them, a vLLM server
build      a server's parts, created from settings
ranks      a group of rank processes: its supervisor, and one rank's part in it
processes  starting, watching and ending a process
doctor     ``doctor``
bench      ``bench``
========== ==============================================================================================

A module that needs torch or a server library imports it when a command runs, so that ``--help`` is quick.
"""

from __future__ import annotations


def main() -> None:
    """The ``embedwire`` command. Imports the commands only here, so that importing one module of this package does not import all."""
    from embedwire.cli.__main__ import run

    run()
