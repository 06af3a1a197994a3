"""``embedwire ask``: a question to a running router, with images."""

from __future__ import annotations

import base64
import json as json_text
import mimetypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedwire.cli.screen import JsonFile, check_writable, out, timeline, write_json
from embedwire.errors import EmbedwireError, InvalidRequestError

if TYPE_CHECKING:
    import httpx


def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    images: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]...", help="Image files, or http(s) URLs that the encoder fetches."),
    ] = None,
    *,
    url: Annotated[str, typer.Option(help="The router.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model [the only one there].", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Longest silence of the router.")] = 120.0,
    json: JsonFile = None,
) -> None:
    """Ask a running router, print the answer as it arrives, and then how its embedding was transferred.

    Exit code 0: answered; 2: an error, whose cause is the last line.
    """
    import httpx

    check_writable(json)
    with httpx.Client(base_url=url, timeout=timeout_s, trust_env=False) as client:
        try:
            body = {
                "model": model or _only_model(client),
                "messages": [{"role": "user", "content": content_of(question, images or ())}],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "stream": True,
            }
            text, passage = _show_answer(events(client, body))
        except httpx.HTTPError as error:
            raise EmbedwireError(f"router {url}: {error or type(error).__name__}") from None
    out.print()
    out.print(timeline(passage))
    write_json(json, {"answer": text, "embedwire": passage})


def content_of(question: str, images: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of a user's message: the images, then the question."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _url_of(image)}} for image in images
    ]
    return [*parts, {"type": "text", "text": question}]


def _url_of(image: str) -> str:
    if image.startswith(("http://", "https://", "data:")):
        return image
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"image {image}: {error.strerror}") from None
    kind = mimetypes.guess_type(image)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def events(client: httpx.Client, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer. Raises EmbedwireError with the router's message instead."""
    from embedwire.serve.openai import read_events

    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise EmbedwireError(refusal(response.status_code, response.read()))
        for data in read_events(response.iter_bytes()):
            chunk = json_text.loads(data)
            if "error" in chunk:
                raise EmbedwireError(chunk["error"]["message"])
            yield chunk


def refusal(status: int, content: bytes) -> str:
    """The router's error message, from the body of an answer that is not 200."""
    try:
        return f"{json_text.loads(content)['error']['message']} (HTTP {status})"
    except (ValueError, KeyError, TypeError):
        return f"the router answered with HTTP {status}"


def _only_model(client: httpx.Client) -> str:
    models = [entry["id"] for entry in client.get("/v1/models").raise_for_status().json()["data"]]
    if len(models) != 1:
        raise InvalidRequestError(f"say which model with --model; there is {', '.join(models) or 'none yet'}")
    return str(models[0])


def _show_answer(chunks: Iterator[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    text = ""
    passage: dict[str, Any] = {}
    for chunk in chunks:
        passage = chunk.get("embedwire") or passage
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            out.print(piece, end="", markup=False, soft_wrap=True)
    out.print()
    return text, passage
