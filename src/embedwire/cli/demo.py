"""``embedwire demo``: a divided model, an embedding larger than the receive pool, and the proof that the answer is unchanged. And
``embedwire tiny-model``, which writes the checkpoint that the demo uses."""

from __future__ import annotations

import base64
import io
import json as json_text
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.status import Status

from embedwire.cli.ask import content_of, refusal
from embedwire.cli.processes import Cluster, end_in_order
from embedwire.cli.screen import (
    JsonFile,
    check_writable,
    err,
    out,
    quieten_libraries,
    size,
    table,
    timeline,
    write_json,
)
from embedwire.cli.settings import variables
from embedwire.cli.stack import start_stack
from embedwire.errors import ConfigurationError, EmbedwireError
from embedwire.limits import RANKS_MAX

NUM_BLOCKS, BLOCK_SIZE = 2, 16
"""A receive pool of 32 tokens, which three images never fit into."""
ROUNDS_MIN = 3
MAX_TOKENS = 32
QUESTION = "What is in these three images?"
IMAGE_SIZES = ((224, 168), (280, 280), (336, 196))
ANSWER_WAIT_S = 300.0

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen2_vl", "llava"]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it; made if it is not there.")]


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that the demo shows, and whether it held."""

    what: str
    holds: bool
    detail: str


def demo(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="A real model: directory or Hub name [a tiny random one].", show_default=False),
    ] = None,
    family: Annotated[Family, typer.Option(help="Architecture of the tiny model.")] = "qwen2_5_vl",
    transport: Annotated[
        Literal["auto", "shm", "tcp", "mooncake", "nixl"], typer.Option(help="How the embedding travels.")
    ] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of weights and embeddings.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1.")] = "cpu",
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, max=RANKS_MAX, help="Processes over which the language server is divided.")
    ] = 1,
    encoder_tensor_parallel_size: Annotated[
        int, typer.Option(min=1, max=RANKS_MAX, help="Processes over which an encoder is divided.")
    ] = 1,
    delivery: Annotated[
        Literal["share", "replicate"], typer.Option(help="How the embedding gets to all of them.")
    ] = "share",
    json: JsonFile = None,
) -> None:
    """Divide a model over two servers, send it three images, and prove that the answer is that of the undivided model.

    An encoder server and a language server each load only their half. The receive pool is far smaller than the embedding, so it
    comes in many rounds. The answer's token ids are then compared with those of plain transformers. With --tensor-parallel-size the
    language server is divided again, and with --encoder-tensor-parallel-size the encoder. Works on a fresh machine, without a GPU
    or network.

    Exit code 0: everything held; 1: something did not, and the table says what; 2: an error, whose cause is the last line.
    """
    check_writable(json)
    quieten_libraries()
    end_in_order(exit_code=None)
    settings = variables(
        dtype=dtype,
        device=device,
        transport=transport,
        tensor_parallel_size=tensor_parallel_size,
        delivery=delivery,
    )
    with (
        tempfile.TemporaryDirectory(prefix="embedwire-demo-") as directory,
        err.status("drawing a tiny model") as status,
    ):
        name = model or _write_tiny_model(Path(directory) / family, family)
        images = [_picture(number, *pixels) for number, pixels in enumerate(IMAGE_SIZES)]
        with Cluster(settings) as cluster:
            answer, claims = _serve_and_ask(
                cluster, name, images, status, encoder_ranks=encoder_tensor_parallel_size
            )
        status.update("asking the undivided model, in a process of its own")
        expected = _undivided_ids(name, images, dtype=dtype, device=device)
    ids = answer["choices"][0]["token_ids"]
    claims.insert(0, same_ids(ids, expected))
    _show(answer, claims, is_random=model is None)
    write_json(
        json,
        {
            "model": model or f"tiny {family}",
            "answer": answer["choices"][0]["message"]["content"],
            "token_ids": ids,
            "undivided_token_ids": expected,
            "embedwire": answer["embedwire"],
            "claims": [{"what": c.what, "holds": c.holds, "detail": c.detail} for c in claims],
        },
    )
    if not all(claim.holds for claim in claims):
        raise typer.Exit(1)


def _write_tiny_model(directory: Path, family: Family) -> str:
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    return str(write_tiny_model(directory, family))


def _serve_and_ask(
    cluster: Cluster, model: str, images: Sequence[bytes], status: Status, *, encoder_ranks: int
) -> tuple[dict[str, Any], list[Claim]]:
    stack = start_stack(
        cluster,
        model,
        name="demo",
        encoder_ranks=encoder_ranks,
        language_variables=variables(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE),
        on_step=status.update,
    )
    out.print("[bold]Each server a process of its own, each with its half of the model[/]")
    made = table("server", "url", "pid", "memory in use", "", right=("memory in use",))
    for child in stack.children:
        resident = size(sum(_resident_bytes(pid) for pid in child.pids))
        made.add_row(child.name, child.url, str(child.facts["pid"]), resident, child.in_words)
    out.print(made)
    status.update("asking")
    answer = _ask(stack.router.url, images)
    whole = _pool_is_whole(stack.languages[0].url)
    pids = [pid for child in stack.children for pid in child.pids]
    segments = {segment for pid in pids for segment in _segments(pid)}
    status.update("stopping the servers")
    codes = cluster.stop()
    return answer, [
        *_passage_claims(answer["embedwire"]),
        whole,
        ended_cleanly(codes, {*segments, *(f"/proc/{pid}" for pid in pids)}),
    ]


def _passage_claims(passage: Mapping[str, Any]) -> list[Claim]:
    rounds, ranks, delivery = passage["rounds"], passage["ranks"], passage["delivery"]
    claims = [
        Claim(
            "the embedding came in rounds",
            len(rounds) >= ROUNDS_MIN and sum(rounds) == passage["total_tokens"],
            f"{sum(rounds)} tokens through a pool of {NUM_BLOCKS * BLOCK_SIZE}, in {len(rounds)} rounds",
        )
    ]
    if delivery:
        times = ranks if delivery == "replicate" else 1
        claims.append(
            Claim(
                f"{ranks} ranks read it, the wire carried it {'once' if times == 1 else 'once for each'}",
                passage["wire_bytes"] == times * passage["bytes"],
                f"{delivery}: {passage['wire_bytes']} bytes for an embedding of {passage['bytes']}",
            )
        )
    return claims


def _ask(url: str, images: Sequence[bytes]) -> dict[str, Any]:
    urls = [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images]
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": content_of(QUESTION, urls)}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    try:
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=ANSWER_WAIT_S, trust_env=False)
    except httpx.HTTPError as error:
        raise EmbedwireError(f"router {url}: {error}") from None
    if response.status_code != 200:
        raise EmbedwireError(refusal(response.status_code, response.content))
    answer: dict[str, Any] = response.json()
    return answer


def _pool_is_whole(url: str) -> Claim:
    text = httpx.get(f"{url}/metrics", timeout=10, trust_env=False).raise_for_status().text
    found = {
        name: int(float(value))
        for name, value in re.findall(
            r"^embedwire_receiver_(blocks\w*|memory_reserved_bytes) (\S+)$", text, re.MULTILINE
        )
    }
    holds = found["blocks_free"] == found["blocks"] == NUM_BLOCKS and not found["memory_reserved_bytes"]
    quarantined, granted = found["blocks_quarantined"], found["blocks_granted"]
    return Claim(
        "the pool is whole again",
        holds,
        f"{found['blocks_free']} of {found['blocks']} blocks free, {granted} granted, {quarantined} in quarantine",
    )


def ended_cleanly(codes: Mapping[str, int], paths: set[str]) -> Claim:
    bad = [f"{name}: exit code {code}" for name, code in codes.items() if code]
    left = sorted(filter(os.path.exists, paths))
    detail = "; ".join([*bad, *(f"left behind: {path}" for path in left)])
    return Claim(
        "all servers ended cleanly",
        not detail,
        detail or f"{len(codes)} servers; no process and no shared memory left",
    )


def same_ids(ids: Sequence[int], expected: Sequence[int]) -> Claim:
    same = list(ids) == list(expected)
    where = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    different = len(set(ids))
    return Claim(
        "the answer is the undivided model's",
        same and len(ids) == MAX_TOKENS,
        f"{len(ids)} token ids equal, {different} of them different"
        if same
        else f"they differ from token {where} on",
    )


def _undivided_ids(model: str, images: Sequence[bytes], *, dtype: str, device: str) -> list[int]:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": QUESTION}]
    prompt = {
        "messages": [{"role": "user", "content": parts}],
        "media": [base64.b64encode(image).decode() for image in images],
        "max_tokens": MAX_TOKENS,
    }
    reference = [sys.executable, "-m", "embedwire.engines.transformers.reference", model]
    ended = subprocess.run(
        [*reference, "--dtype", dtype, "--device", device],
        input=json_text.dumps(prompt),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["no output"]
        raise EmbedwireError(f"the undivided model failed: {last[0]}")
    ids: list[int] = json_text.loads(ended.stdout.splitlines()[-1])["token_ids"]
    return ids


def _picture(number: int, width: int, height: int) -> bytes:
    """A PNG of a few overlapping shapes, different for each number."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), ("white", "lightyellow", "lavender")[number % 3])
    draw = ImageDraw.Draw(image)
    colours = ("crimson", "seagreen", "royalblue", "orange", "purple")
    for shape in range(5):
        turn = 2 * math.pi * (shape / 5 + number / 7)
        x, y = width * (0.5 + 0.3 * math.cos(turn)), height * (0.5 + 0.3 * math.sin(turn))
        reach = min(width, height) * (0.1 + 0.03 * shape)
        paint = draw.ellipse if (shape + number) % 2 else draw.rectangle
        paint((x - reach, y - reach, x + reach, y + reach), fill=colours[(shape + number) % 5])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _segments(pid: int) -> set[str]:
    """Shared-memory files that a process has mapped."""
    return set(re.findall(r"/dev/shm/embedwire-\w+", Path(f"/proc/{pid}/maps").read_text()))


def _show(answer: Mapping[str, Any], claims: Sequence[Claim], *, is_random: bool) -> None:
    out.print("\n[bold]The answer[/]")
    out.print(repr(answer["choices"][0]["message"]["content"]), markup=False)
    if is_random:
        out.print(
            "(Gibberish: the tiny model's weights are random. What counts is that every token is the right one.)"
        )
    out.print("\n[bold]How the embedding came[/]")
    out.print(timeline(answer["embedwire"]))
    out.print("\n[bold]What this shows[/]")
    made = table("", "", "")
    made.show_header = False
    for claim in claims:
        made.add_row("[green]yes[/]" if claim.holds else "[red]NO[/]", claim.what, claim.detail)
    out.print(made)


def tiny_model(
    directory: Directory,
    *,
    family: Annotated[Family, typer.Option(help="Architecture.")] = "qwen2_5_vl",
    scale: Annotated[
        Literal["tiny", "small", "400m"],
        typer.Option(help="About 200,000 parameters; 700,000, for vLLM too; or 400 million."),
    ] = "tiny",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
) -> None:
    """Write a small checkpoint with random weights into DIR. Its answers are gibberish; everything else about it is real.

    It loads with plain transformers too. Exit code 0: written; 2: an error, whose cause is the last line.
    """
    quieten_libraries()
    from embedwire.engines.transformers.tiny_model import write_tiny_model

    try:
        write_tiny_model(directory, family, scale=scale, dtype=dtype, seed=seed)
    except OSError as error:
        raise ConfigurationError(f"{directory}: {error}") from None
    nbytes = sum(file.stat().st_size for file in directory.iterdir())
    out.print(f"{directory}: {family}, {scale}, {dtype}, {size(nbytes)}", soft_wrap=True, markup=False)
