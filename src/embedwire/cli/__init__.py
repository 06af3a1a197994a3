"""Floor 7: the ``embedwire`` command. What a command needs is imported when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line. Exit codes: 0 done; 1 a check did not hold; 2 an error, whose cause is the last line; 130 interrupted."""
    from embedwire.cli.app import app
    from embedwire.cli.screen import err
    from embedwire.errors import EmbedwireError

    try:
        app()
    except EmbedwireError as error:
        err.print(f"embedwire: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
