"""``embedwire encoder-rank`` and ``language-rank``: one process of a server that has several. Started by ``supervise.py`` alone.

Owns what a rank does from its start to its end; ``membership.py`` knows how it is joined to the others. Main thread.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedwire.cli.build import Built
from embedwire.cli.groups import Bounds, Encoder, Engine, Language, Media, Member, Ranks, Server, Wire
from embedwire.cli.membership import Membership, tell
from embedwire.cli.options import takes
from embedwire.cli.process import Voice, begin, serve
from embedwire.cli.servers import IsChild, Model
from embedwire.cli.settings import Loaded, Settings
from embedwire.errors import EmbedwireError, RankError
from embedwire.serve.signals import end_signals

if TYPE_CHECKING:
    import numpy as np

    from embedwire.endpoint.sender_group import FollowingSender

GivenName = Annotated[str, typer.Option("--name")]
Rank = Annotated[int, typer.Option("--rank")]
Directory = Annotated[Path, typer.Option("--group-dir")]


@takes(Server, Member, Engine, Wire, Encoder, Media, Ranks, Bounds)
def encoder_rank(
    loaded: Loaded, *, model: Model, name: GivenName, rank: Rank, group_dir: Directory, child: IsChild = False
) -> None:
    """Run one rank of an encoder server. Exit code 0: stopped; 2: an error, which the supervisor says."""
    from embedwire.cli.build import built_encoder

    with _member(loaded.settings, rank=rank, directory=group_dir, is_child=child) as member:
        if rank:
            _follow(_encoding(model, loaded.settings, member), rank=rank, is_child=child)
        else:
            _lead(built_encoder(model, loaded.settings, name=name, membership=member), loaded, is_child=child)


@takes(Server, Member, Engine, Wire, Language, Ranks, Bounds)
def language_rank(
    loaded: Loaded, *, model: Model, name: GivenName, rank: Rank, group_dir: Directory, child: IsChild = False
) -> None:
    """Run one rank of a language server. Exit code 0: stopped; 2: an error, which the supervisor says."""
    from embedwire.cli.build import built_language

    with _member(loaded.settings, rank=rank, directory=group_dir, is_child=child) as member:
        if rank:
            _follow(_reading(model, loaded.settings, member), rank=rank, is_child=child)
        else:
            _lead(
                built_language(model, loaded.settings, name=name, membership=member), loaded, is_child=child
            )


@contextmanager
def _member(settings: Settings, *, rank: int, directory: Path, is_child: bool) -> Iterator[Membership]:
    begin(settings, is_child=is_child)
    try:
        with Membership(settings, rank=rank, directory=directory) as membership:
            yield membership
    except EmbedwireError as error:
        tell(str(error))
        sys.exit(2)


def _lead(building: AbstractContextManager[Built], loaded: Loaded, *, is_child: bool) -> None:
    with building as (app, facts):
        serve(app, loaded.settings, facts, voice=Voice(None, is_child))


def _follow(building: AbstractContextManager[Callable[[], None]], *, rank: int, is_child: bool) -> None:
    with building as run:
        for number in end_signals():
            signal.signal(number, signal.SIG_IGN)  # it ends with rank 0
        Voice(None, is_child).say({"role": "rank", "rank": rank})
        try:
            run()
        except RankError:
            os._exit(
                2
            )  # it has told why; were it to leave the turns in order, that would look like the cause


@contextmanager
def _encoding(model: str, settings: Settings, member: Membership) -> Iterator[Callable[[], None]]:
    """What another rank of an encoder does: its share of the images, and its part of every room."""
    from embedwire.cli.build import encoder_engine, sender_of

    engine = encoder_engine(model, settings, member)
    with sender_of(engine.layout, settings, member) as endpoint, member.following(endpoint) as sender:
        yield lambda: engine.follow(partial(_fill, sender))


def _fill(sender: FollowingSender, key: tuple[int, int] | None, arrays: Mapping[str, np.ndarray]) -> None:
    assert key is not None, "a service names all its prompts"
    sender.fill(key, arrays)


@contextmanager
def _reading(model: str, settings: Settings, member: Membership) -> Iterator[Callable[[], None]]:
    """What another rank of a language server does: the steps of rank 0, with arrays of its own."""
    from embedwire.cli.build import receiver_of
    from embedwire.engines.transformers.ranks import TransformersFollower
    from embedwire.language.arrivals import Arrivals

    arrivals = Arrivals(timeout_s=settings.rank_timeout_s)
    follower = TransformersFollower(
        model,
        tensor_parallel=member.tensor_parallel,
        dtype=settings.dtype,
        device=member.device,
        threads=member.threads,
        prompt_of=arrivals.prompt_of,
        on_read=arrivals.forget,
    )
    with receiver_of(follower.layout, settings, membership=member, on_room=arrivals.enter):
        yield follower.run
