"""A rank other than 0, as a process of its own that a test steers through a pipe; and rank 0's end of it.

The processes are forked from a server that has imported torch and transformers once; imported anew, they would take seconds each.
"""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedwire.engines.transformers.encoder import TransformersEncoder
from embedwire.engines.transformers.generation import TransformersLanguage
from embedwire.engines.transformers.language import LanguageHalf
from embedwire.engines.transformers.parallel import TensorParallel
from embedwire.engines.transformers.ranks import TransformersFollower
from embedwire.errors import RankError
from embedwire.language.interface import AssembledPrompt, Delta, SamplingParams

TIMEOUT_S = 60
STEPS = 32
"""Tokens of an answer, if nothing else is asked for."""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([TensorParallel.__module__, TransformersLanguage.__module__])


def follow(rank: int, settings: dict[str, Any], pipe: Connection) -> None:
    """Join the group; follow an engine a model that comes through the pipe; leave at None.

    The answers are what weights it holds, then how it ended and which keys were read. Own prompts are files in a folder.
    """
    torch.set_num_threads(1)
    group = TensorParallel(rank, **settings)
    while (model := pipe.recv()) is not None:
        if model == "time-outs":
            pipe.send(timeouts_of(group))
            continue
        if model[0] == "encode":
            pipe.send(encode(group, model[1]))
            continue
        path, prompts, dtype = model
        read: list[tuple[int, int]] = []

        def own_copy(key: tuple[int, int], prompts: Path = prompts) -> AssembledPrompt:
            return load_prompt(prompts, key)

        try:
            follower = TransformersFollower(
                str(path), tensor_parallel=group, dtype=dtype, prompt_of=own_copy, on_read=read.append
            )
            pipe.send(weights_of(follower._half))
            follower.run()
            pipe.send((None, read))
        except RankError as error:
            pipe.send((str(error), read))
            return
    group.close()


def encode(group: TensorParallel, path: Path) -> list[Any]:
    """Follow an encoder until it closes: keys with arrays, and in the end the rows that the tower made here."""
    engine = TransformersEncoder(str(path), dtype="float32", tensor_parallel=group)
    rows = count_rows(engine)
    encoded: list[Any] = []
    engine.follow(lambda key, arrays: encoded.append((key, arrays)))
    return [*encoded, rows]


def count_rows(engine: TransformersEncoder) -> list[int]:
    """A list to which each run of the tower adds its rows from now on."""
    rows: list[int] = []
    run = engine._run_tower

    def counted(*args: Any, **kwargs: Any) -> Any:
        made = run(*args, **kwargs)
        rows.append(len(made))
        return made

    engine._run_tower = counted  # type: ignore[method-assign]
    return rows


def timeouts_of(ranks: TensorParallel) -> list[float]:
    """Seconds: where a rank waits for the next step, and within one."""
    backends = (group._get_backend(torch.device("cpu")) for group in (ranks._signals, ranks.shard.group))
    return [backend.options._timeout.total_seconds() for backend in backends]


def weights_of(half: LanguageHalf) -> dict[str, tuple[int, int]]:
    """Of each parameter: how many numbers it has, and the bytes that its memory takes."""
    named = [*half._text.named_parameters(), ("head", half._head.weight)]
    return {name: (p.numel(), p.untyped_storage().nbytes()) for name, p in named}


def save_prompt(folder: Path, prompt: AssembledPrompt) -> None:
    """For :func:`load_prompt` of another rank."""
    assert prompt.key is not None
    names = ("fill_ids", "input_embeddings", "mrope_positions", "deepstack_embeddings")
    arrays = {name: getattr(prompt, name) for name in names}
    np.savez(folder / "{}-{}.npz".format(*prompt.key), **{n: a for n, a in arrays.items() if a is not None})


def load_prompt(folder: Path, key: tuple[int, int]) -> AssembledPrompt:
    with np.load(folder / "{}-{}.npz".format(*key)) as arrays:
        return AssembledPrompt(**arrays)


class Group:
    """Rank 0 in this process, with its followers."""

    def __init__(self, size: int, **settings: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        on_broken = settings.pop("on_broken", None)
        settings = {"size": size, "address": address, "start_timeout_s": TIMEOUT_S, **settings}
        self.processes: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []
        for rank in range(1, size):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=follow, args=(rank, settings, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)
        self.ranks = TensorParallel(0, on_broken=on_broken, **settings)

    @contextmanager
    def engine(
        self, path: Path, prompts: Path, *, dtype: str = "float32", **settings: Any
    ) -> Iterator[TransformersLanguage]:
        """Rank 0's engine; ``weights`` are the followers'. In the end all ranks are ready for another one."""
        for pipe in self.pipes:
            pipe.send((path, prompts, dtype))
        own = TransformersLanguage(str(path), dtype=dtype, tensor_parallel=self.ranks, **settings)
        self.weights = self.hear()
        try:
            yield own
        finally:
            own.close()

    def hear(self) -> list[Any]:
        """The next answer of each follower."""
        assert all(pipe.poll(TIMEOUT_S) for pipe in self.pipes)
        return [pipe.recv() for pipe in self.pipes]

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing, also when a test has failed in the middle."""
        for process in self.processes:
            process.kill()
        self.ranks.close()

    def close(self) -> list[int | None]:
        """Stop all. Returns the exit codes of the followers, None for one that has not ended."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        self.ranks.close()
        return self.exit_codes()

    def exit_codes(self) -> list[int | None]:
        for process in self.processes:
            process.join(TIMEOUT_S)
        return [process.exitcode for process in self.processes]


class Reader:
    """Collects an answer; ``wait`` returns it once its last delta has come."""

    def __init__(self, at: int = 0, act: Callable[[], None] | None = None) -> None:
        self.deltas: list[Delta] = []
        self._at, self._act = at, act
        self._ended = threading.Event()

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if self._act is not None and len(self.deltas) == self._at:
            self._act()
        if delta.finish_reason:
            self._ended.set()

    def wait(self) -> Reader:
        assert self._ended.wait(TIMEOUT_S), "the answer did not end"
        return self

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def end(self) -> str | None:
        return self.deltas[-1].finish_reason


def ask(engine: TransformersLanguage, prompt: AssembledPrompt, reader: Any = None, **params: Any) -> Any:
    reader = reader or Reader()
    sampling = SamplingParams(**{"max_tokens": STEPS, "ignore_eos": True} | params)
    reader.answer = engine.submit(prompt, sampling, on_delta=reader)
    return reader
