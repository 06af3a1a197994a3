"""Keeps libraries from drawing progress bars and greeting the user. To be called before they are imported."""

from __future__ import annotations

import os


def quieten() -> None:
    """What the user set himself stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
