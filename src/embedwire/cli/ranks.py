"""``embedwire language-rank``: one process of a language server that has several. Started by ``supervise.py``, and by nobody else.

Owns how a rank joins its group, and how it tells its supervisor that it can not go on. Main thread; a loss is heard of on any thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from embedwire.cli.groups import Bounds, Engine, Language, Member, Ranks, Server, Wire
from embedwire.cli.options import takes
from embedwire.cli.process import Voice, begin, serve
from embedwire.cli.servers import IsChild, Model
from embedwire.cli.settings import Loaded, Settings
from embedwire.errors import EmbedwireError


@takes(Server, Member, Engine, Wire, Language, Ranks, Bounds)
def language_rank(
    loaded: Loaded,
    *,
    model: Model,
    name: Annotated[str, typer.Option()],
    rank: Annotated[int, typer.Option()],
    group_dir: Annotated[Path, typer.Option()],
    child: IsChild = False,
) -> None:
    """Run one rank of a language server. Exit code 0: stopped; 2: an error, which the supervisor says."""
    settings, voice = loaded.settings, Voice(None, child)
    begin(settings, is_child=child)
    try:
        with Membership(settings, rank=rank, directory=group_dir) as membership:
            if rank == 0:
                from embedwire.cli.build import built_language

                with built_language(model, settings, name=name, membership=membership) as (app, facts):
                    serve(app, settings, facts, voice=voice)
            else:
                with _built_follower(model, settings, membership) as follower:
                    for number in (signal.SIGINT, signal.SIGTERM):
                        signal.signal(number, signal.SIG_IGN)  # it ends with rank 0
                    voice.say({"role": "language rank", "rank": rank})
                    follower.run()
    except EmbedwireError as error:
        _tell(str(error))
        sys.exit(2)


def _tell(detail: str) -> None:
    os.write(
        sys.stdout.fileno(), json.dumps({"error": detail}).encode() + b"\n"
    )  # one write, so that lines of threads do not mix


class Membership:
    """This process's part in the group of ranks that ``directory`` belongs to. The block around it ends when all have left."""

    def __init__(self, settings: Settings, *, rank: int, directory: Path) -> None:
        """Returns when all ranks are there. Raises RankError."""
        from embedwire.endpoint.turns import Seat
        from embedwire.engines.gloo import GlooCollective
        from embedwire.engines.transformers.parallel import TensorParallel
        from embedwire.protocol.topology import RankGroup

        size, on_cuda = settings.tensor_parallel_size, settings.device.startswith("cuda")
        self.rank = rank
        self.group = RankGroup.on_one_host(
            size, delivery="share" if settings.delivery == "auto" else settings.delivery
        )
        self.device = f"cuda:{rank}" if on_cuda else settings.device
        self.threads = max(1, (settings.threads or len(os.sched_getaffinity(0))) // size)
        self._on_lost: list[Callable[[str], None]] = []
        self.tensor_parallel = TensorParallel(
            rank,
            size=size,
            address=f"file://{directory}/store",
            backend="nccl" if on_cuda else "gloo",
            timeout_s=settings.rank_timeout_s,
            on_broken=lambda error: self.lose(str(error)),
        )
        collective = GlooCollective(self.tensor_parallel.new_gloo_group())
        self.seat = Seat(self.group, rank, f"ipc://{directory}/turns", collective, settings.rank_timeout_s)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """To be called with the reason when the group can not go on, on any thread; it must not block."""
        self._on_lost.append(callback)

    def lose(self, detail: str) -> None:
        """The group can not go on: whoever waits for it hears so, and then the supervisor, which ends it."""
        for callback in self._on_lost:
            callback(detail)
        _tell(detail)

    def __enter__(self) -> Membership:
        return self

    def __exit__(self, *raised: object) -> None:
        self.tensor_parallel.close()


@contextmanager
def _built_follower(model: str, settings: Settings, membership: Membership) -> Iterator[Any]:
    """A rank other than 0, with its own receiver."""
    from embedwire.cli.build import receiver_of
    from embedwire.engines.transformers.ranks import TransformersFollower
    from embedwire.language.arrivals import Arrivals

    arrivals = Arrivals(timeout_s=settings.rank_timeout_s)
    follower = TransformersFollower(
        model,
        tensor_parallel=membership.tensor_parallel,
        dtype=settings.dtype,
        device=membership.device,
        threads=membership.threads,
        prompt_of=arrivals.prompt_of,
        on_read=arrivals.forget,
    )
    with receiver_of(follower.layout, settings, membership=membership, on_room=arrivals.enter):
        yield follower
