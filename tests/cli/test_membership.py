"""One rank's part in its group: what is left of the place where the ranks met."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from embedwire.cli.membership import Membership
from embedwire.cli.settings import load
from embedwire.engines.transformers import parallel

pytestmark = pytest.mark.model


class Alone:
    """In place of ``TensorParallel``: a rank that joins nobody."""

    def __init__(self, *args: Any, **more: Any) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.failure_mode("leftovers-of-a-dead-process")
def test_the_last_to_leave_removes_what_the_first_could_not(tmp_path: Path, monkeypatch: Any) -> None:
    """A rank may write into torch's file once more while rank 0 removes the directory; the last rank to leave removes it."""
    monkeypatch.setattr(parallel, "TensorParallel", Alone)
    directory = tmp_path / "group"
    directory.mkdir()
    (directory / "store").touch()
    settings = load({"tensor_parallel_size": 2}).settings
    first, last = (Membership(settings, rank=rank, directory=directory) for rank in range(2))
    with monkeypatch.context() as patched:

        def rmdir(*args: Any, **more: Any) -> None:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

        patched.setattr(os, "rmdir", rmdir)
        first.__exit__()
    assert directory.exists()
    last.__exit__()
    assert not directory.exists()
