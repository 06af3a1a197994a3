"""The signals that end a server. Knows no server, and imports nothing heavy."""

from __future__ import annotations

import signal


def end_signals() -> tuple[signal.Signals, ...]:
    """Ctrl-C, SIGTERM, and SIGHUP for a terminal that is closed; not the last where whoever started this process has it ignored, as
    ``nohup`` does."""
    hang_up = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hang_up)
