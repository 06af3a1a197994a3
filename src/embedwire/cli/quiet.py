"""Keeps model libraries from drawing progress bars over what a command says. Called before it uses them, on the main thread."""

from __future__ import annotations

import os
from contextlib import suppress


def quieten() -> None:
    """What the user set himself stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with suppress(ImportError):
        from transformers.utils import logging

        logging.disable_progress_bar()
