"""``embedwire bench``: measurements with a baseline from the same run. Shows them; ``embedwire.bench`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.progress import Progress

from embedwire.cli.screen import JsonFile, check_writable, err, out, size, table, write_json
from embedwire.limits import DEFAULT_LIMITS
from embedwire.protocol.topology import Delivery

if TYPE_CHECKING:
    from embedwire.bench.transfer import Case, Subject
    from embedwire.bench.wires import WireCase

S = TypeVar("S")
C = TypeVar("C")

app = typer.Typer(no_args_is_help=True, help="Measure, against a baseline from the same run.")

DEFAULTS: tuple[tuple[int, int, tuple[int, ...]], ...] = ((16384, 4096, (2048,)), (256, 4096, ()))
"""(tokens, bytes a token, pools in tokens): 64 MiB in one round and in sixteen, and 1 MiB."""


@app.callback()
def callback() -> None:
    """Measure, against a baseline from the same run."""


@app.command()
def transfer(
    *,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of the embedding; may be repeated.")
    ] = None,
    token_bytes: Annotated[
        list[int] | None, typer.Option(help="Bytes of a token, a multiple of 8 [4096].")
    ] = None,
    pool_tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="Size of the receive pool. A smaller one than the embedding makes it resume; may be repeated."
        ),
    ] = None,
    transport: Annotated[
        list[str] | None, typer.Option(help="shm, tcp, mooncake or nixl; may be repeated [the first two].")
    ] = None,
    window: Annotated[
        int, typer.Option(min=1, help="Rounds of one embedding that may be open at a time.")
    ] = DEFAULT_LIMITS.window_rounds,
    ranks: Annotated[
        list[int] | None,
        typer.Option(help="Ranks of the language side, each a process; may be repeated [1]."),
    ] = None,
    delivery: Annotated[
        Delivery, typer.Option(help="How ranks get it: share (once a host) or replicate (once each).")
    ] = "share",
    repeat: Annotated[int, typer.Option(help="Measured transfers a case, after two to warm up.")] = 9,
    json: JsonFile = None,
) -> None:
    """How fast does an embedding come from a sender's process into one tensor of the receiver?

    Without sizes: 64 MiB in one round, the same in sixteen (through a pool of an eighth, half of it a round), and 1 MiB.

    The baseline makes the same copies with nothing but the operating system: two copies in memory for shm; for tcp a blocking
    socket between two processes and one copy. ratio is its time over ours: 1 is as fast, more is faster. resume is our time over
    that of the same embedding in one round. With --ranks, ranks is the time to one rank, into fresh memory, over that to all of
    them: 1 says that the others cost nothing. The source is ready, and its sum made, before the clock starts. Everything is warmed
    up, measured in turns, and checked byte for byte.

    Run it on an idle machine with two cores or more: ours overlaps two processes, so whatever else runs costs it more than the
    baseline. A transport that cannot run here is named, with the remedy, and the others are measured. Exit code 0: measured, whatever
    the numbers; 2: one that was named, or none at all, could not be measured, with the cause.
    """
    from embedwire.bench.host import this_host
    from embedwire.bench.transfer import measure, steps

    check_writable(json)
    wanted = [
        replace(subject, ranks=size, delivery=delivery)
        for size in ranks or (1,)
        for subject in _subjects(transport or ("shm", "tcp"), tokens, token_bytes, pool_tokens, window)
    ]
    host = this_host()
    out.print(
        f"{host.cpu}, {host.cores} cores, {size(host.memory_bytes)}, load {host.load_1m}, Python {host.python}"
    )
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("measuring", total=sum(steps(s, repeat=repeat) for s in wanted))

        def one(subject: Subject) -> list[Case]:
            return measure(subject, repeat=repeat, on_progress=lambda: progress.advance(bar))

        cases, reasons = _what_can_run(wanted, one)
    if cases:
        _show(cases)
        write_json(json, {"host": asdict(host), "cases": [asdict(case) for case in cases]})
    _report(reasons, is_failure=bool(transport) or not cases)


@app.command()
def vllm(
    *,
    router: Annotated[str, typer.Option(help="Ours: a router in front of vLLM servers.")] = "",
    encoder: Annotated[str, typer.Option(help="Ours without a router: an encoder with our connector.")] = "",
    language: Annotated[str, typer.Option(help="And its language server.")] = "",
    baseline_router: Annotated[
        str, typer.Option(help="The baseline: any router or proxy in front of vLLM servers.")
    ] = "",
    baseline_encoder: Annotated[
        str, typer.Option(help="The baseline without a router: an encoder with ECExampleConnector.")
    ] = "",
    baseline_language: Annotated[str, typer.Option(help="And its language server.")] = "",
    images: Annotated[list[int] | None, typer.Option(help="Pictures a request; may be repeated [1].")] = None,
    side: Annotated[int, typer.Option(min=28, help="Width and height of a picture, in pixels.")] = 448,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, for requests a second.")] = 8,
    repeat: Annotated[int, typer.Option(min=1, help="Measured requests one at a time, and batches.")] = 9,
    json: JsonFile = None,
) -> None:
    """How soon does the first token come, and how many requests a second, beside vLLM's own file-based connector, or another router?

    Of each stack name either its router, or one encoder and one language server: then the command asks them itself, one after the
    other, and connector stands beside connector. The servers have to run already, all with one model: docs/benchmarks.md has the
    commands. Both stacks get the same requests in turns, with pictures that neither has seen, and have to give the same answers; one
    without a token is counted as lost. Ratios above 1 say that ours is sooner, or more.

    Exit code 0: measured, whatever the numbers; 2: not measured, with the cause.
    """
    from embedwire.bench import vllm as bench
    from embedwire.bench.host import this_host

    check_writable(json)
    ours = bench.Stack(router=router, encoder=encoder, language=language)
    baseline = bench.Stack(router=baseline_router, encoder=baseline_encoder, language=baseline_language)
    loads = [
        bench.Load(images=count, side=side, tokens=tokens, concurrency=concurrency, repeat=repeat)
        for count in images or (1,)
    ]
    host, cases = this_host(), []
    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task("measuring", total=sum(map(bench.steps, loads)))
        for load in loads:
            cases.append(bench.measure(ours, baseline, load, on_progress=lambda: progress.advance(bar)))
    numbers = ("images", "first token", "baseline", "ratio", "requests/s", "baseline/s", "rate")
    made = table("picture", *numbers, right=numbers)
    for case in cases:
        made.add_row(
            f"{case.side}×{case.side}",
            str(case.images),
            f"{case.ttft_median_s * 1000:.0f} ms",
            f"{case.baseline_ttft_median_s * 1000:.0f} ms",
            f"{case.ttft_ratio:.2f}",
            f"{case.requests_per_s:.1f}",
            f"{case.baseline_requests_per_s:.1f}",
            f"{case.rate_ratio:.2f}",
        )
    out.print(made)
    for case in cases:
        for who, lost in (("ours", case.lost_answers), ("the baseline", case.baseline_lost_answers)):
            if lost:
                asked = case.repeat * (1 + case.concurrency)
                out.print(f"With {case.images} a request, {who} answered {lost} of {asked} without a token.")
    write_json(json, {"host": asdict(host), "cases": [asdict(case) for case in cases]})


@app.command()
def wires(
    *,
    transport: Annotated[
        list[str] | None, typer.Option(help="mooncake or nixl; may be repeated [both].")
    ] = None,
    mebibytes: Annotated[int, typer.Option(min=1, help="Of a batch, in pieces of 1 MiB.")] = 64,
    repeat: Annotated[
        int, typer.Option(min=1, help="Measured batches each way, after three to warm up.")
    ] = 25,
    json: JsonFile = None,
) -> None:
    """What does our contract cost over a vendor's engine?

    The same batch of registered memory goes through our wire and, in turns, straight through the engine. ratio is the engine's time over
    ours: 1 is as fast. A wire that cannot run here is named, with the remedy. Exit code 0: measured, whatever the numbers; 2: one that was
    named, or none at all, could not be measured, with the cause.
    """
    from embedwire.bench.host import this_host
    from embedwire.bench.wires import WIRES, measure

    check_writable(json)

    def one(wire: str) -> list[WireCase]:
        return [measure(wire, nbytes=mebibytes * 2**20, piece_bytes=2**20, repeat=repeat)]

    cases, reasons = _what_can_run(transport or WIRES, one)
    if cases:
        _show_wires(cases)
        write_json(json, {"host": asdict(this_host()), "cases": [asdict(case) for case in cases]})
    _report(reasons, is_failure=bool(transport) or not cases)


def _what_can_run(subjects: Iterable[S], measure: Callable[[S], list[C]]) -> tuple[list[C], list[str]]:
    """The cases of all subjects whose transport can run here, and the reasons why others cannot."""
    from embedwire.bench.host import UnusableTransport

    cases: list[C] = []
    reasons: dict[str, None] = {}  # each once, in order
    for subject in subjects:
        try:
            cases += measure(subject)
        except UnusableTransport as error:
            reasons[str(error)] = None
    return cases, list(reasons)


def _report(reasons: Sequence[str], *, is_failure: bool) -> None:
    for reason in reasons:
        err.print(f"embedwire: {reason}", markup=False, soft_wrap=True)
    if reasons and is_failure:
        raise typer.Exit(2)


def _show_wires(cases: Sequence[WireCase]) -> None:
    numbers = ("size", "median", "direct", "ratio")
    made = table("wire", *numbers, right=numbers)
    for case in cases:
        made.add_row(
            case.transport,
            size(case.bytes),
            f"{case.median_s * 1000:.2f} ms",
            f"{case.direct_median_s * 1000:.2f} ms",
            f"{case.ratio:.2f}",
        )
    out.print(made)


def _subjects(
    transports: Sequence[str],
    tokens: Sequence[int] | None,
    token_bytes: Sequence[int] | None,
    pools: Sequence[int] | None,
    window: int,
) -> list[Subject]:
    from embedwire.bench.transfer import Subject

    sizes = DEFAULTS
    if tokens or token_bytes or pools:
        sizes = tuple((t, b, tuple(pools or ())) for t in tokens or (16384,) for b in token_bytes or (4096,))
    return [
        Subject(transport=wire, tokens=t, token_bytes=b, pools_tokens=p, window_rounds=window)
        for wire in transports
        for t, b, p in sizes
    ]


def _show(cases: Sequence[Case]) -> None:
    with_ranks = any(case.ranks > 1 for case in cases)
    rows = [_numbers(case, with_ranks=with_ranks) for case in cases]
    made = table("wire", *rows[0], right=tuple(rows[0]))
    for case, row in zip(cases, rows, strict=True):
        made.add_row(case.transport, *row.values())
    out.print(made)


def _numbers(case: Case, *, with_ranks: bool) -> dict[str, str]:
    """Column to cell. With ranks, which are compared with one rank, the baseline makes room, so that a row fits into 80 characters."""
    cells = {
        "size": size(case.bytes),
        "tokens": str(case.tokens),
        "pool": str(case.pool_tokens),
        "rounds": str(case.rounds),
        "median": f"{case.median_s * 1000:.2f} ms",
        "GiB/s": f"{case.bytes / case.median_s / 2**30:.2f}",
        "baseline": f"{case.baseline_median_s * 1000:.2f} ms",
        "ratio": f"{case.ratio:.2f}",
        "resume": "" if case.resume_cost is None else f"{case.resume_cost:.2f}",
    }
    if with_ranks:
        del cells["GiB/s"], cells["baseline"], cells["ratio"]
        cells["ranks"] = _ranks(case)
    return cells


def _ranks(case: Case) -> str:
    return "1" if case.ranks_ratio is None else f"{case.ranks} {case.delivery}: {case.ranks_ratio:.2f}"
