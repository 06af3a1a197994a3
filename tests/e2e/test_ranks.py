"""Language servers of several ranks, behind routers: what they answer, what the wire carries for them, and how they lose a rank."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from embedwire.protocol.topology import lanes_of_sender

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(300)]
WAIT_S = 120
TOKENS = 32
ENCODER_RANKS = 2
GROUPS = {"share": 2, "replicate": 4}
"""Ranks of each of the two servers, by delivery."""

Body = dict[str, Any]
Chat = Callable[..., Body]
Picture = Callable[..., bytes]


class Fleet:
    """An encoder of two ranks and two language servers of several. ``routers`` has one for each of these, and ``"both"``."""

    def __init__(self, start_server: Callable[..., Server], model: str) -> None:
        named = (model, "--name", "tiny")
        common = {"ASSEMBLY_MEMORY": "2MiB", "RANK_TIMEOUT_S": 6, "CHECK_INTERVAL_S": 0.3}
        self.encoder = start_server(
            "encoder", *named, TENSOR_PARALLEL_SIZE=ENCODER_RANKS, THREADS=2, **common
        )
        self.languages = {
            delivery: start_server(
                "language", *named, TENSOR_PARALLEL_SIZE=ranks, DELIVERY=delivery, THREADS=ranks, **common
            )
            for delivery, ranks in GROUPS.items()
        }
        for server in (self.encoder, *self.languages.values()):
            server.wait_ready()
        urls = {delivery: [server.url] for delivery, server in self.languages.items()}
        urls["both"] = [server.url for server in self.languages.values()]
        self.routers = {
            name: start_server("router", WORKER_URLS=",".join([self.encoder.url, *found]), **common)
            for name, found in urls.items()
        }
        for router in self.routers.values():
            router.wait_ready()
        self.client = httpx.Client(timeout=WAIT_S, trust_env=False)

    def ask(self, name: str, body: Body) -> dict[str, Any]:
        """An answer through one of the routers, streamed or not, as one object. It has to be one."""
        answer = self.client.post(f"{self.routers[name].url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            return {"ids": answer.json()["choices"][0]["token_ids"], **answer.json()["embedwire"]}
        chunks = events(answer.text)
        ids = [i for chunk in chunks for choice in chunk["choices"] for i in choice["token_ids"]]
        return {"ids": ids, **chunks[-1]["embedwire"]}

    @contextmanager
    def streaming(self, name: str, body: Body) -> Iterator[Iterator[str]]:
        """An endless answer, after its first tokens: the lines that follow."""
        endless = body | {"stream": True, "max_tokens": 100_000}
        url = f"{self.routers[name].url}/v1/chat/completions"
        with self.client.stream("POST", url, json=endless) as stream:
            assert stream.status_code == 200, stream.read()
            lines = (line for line in stream.iter_lines() if line)
            assert "choices" in next(lines)
            yield lines

    def pid(self, name: str, rank: int) -> int:
        """Of one rank's process."""
        return int(self.languages[name].facts["rank_pids"][rank])

    def known(self, name: str, role: str = "language") -> int:
        """To how many servers of that role a router would send requests."""
        health = self.client.get(f"{self.routers[name].url}/health").raise_for_status().json()
        return int(health["workers"][role])

    def wait_restarted(self, name: str, wait_until: Any) -> None:
        """Until all ranks of a server have started anew, at the same address, and the routers send requests there again."""
        before, server = self.languages[name].facts, self.languages[name]
        server.wait_ready()
        assert server.url == before["url"]
        assert not any(psutil.pid_exists(pid) for pid in before["rank_pids"])
        wait_until(lambda: (self.known(name), self.known("both")) == (1, 2))

    def wait_at_rest(self, wait_until: Any) -> None:
        """Until nobody holds anything."""
        names = (
            "receiver_rooms",
            "receiver_memory_reserved_bytes",
            "language_transferring",
            "language_generating",
        )
        servers = self.languages.values()
        wait_until(lambda: not any(server.metrics().total(name) for server in servers for name in names))
        wait_until(lambda: not self.encoder.metrics().total("sender_memory_reserved_bytes"))


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def shared_fleet(start_server: Callable[..., Server], tiny_model_dir: Callable[[str], Path]) -> Fleet:
    return Fleet(start_server, str(tiny_model_dir("qwen2_5_vl")))


@pytest.fixture
def fleet(shared_fleet: Fleet, wait_until: Any) -> Iterator[Fleet]:
    yield shared_fleet
    shared_fleet.wait_at_rest(wait_until)


@pytest.fixture(scope="module")
def expected(tiny_model_dir: Callable[[str], Path]) -> Callable[..., list[int]]:
    """``expected(text, picture, …)``: what the undivided model says."""
    from embedwire.encode import ChatPrompt
    from embedwire.engines.transformers.reference import greedy_ids

    def ids(text: str, *pictures: bytes) -> list[int]:
        parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
        prompt = ChatPrompt([{"role": "user", "content": parts}], list(pictures))
        return greedy_ids(str(tiny_model_dir("qwen2_5_vl")), prompt, max_tokens=TOKENS, dtype="float32")

    return ids


@pytest.mark.failure_mode("ranks-see-different-totals", "rank-counts-differ", "part-taken-for-whole-room")
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("pictures", [0, 1, 3])
def test_it_is_the_answer_of_the_undivided_model(
    fleet: Fleet, name: str, pictures: int, chat: Chat, picture: Picture, expected: Any
) -> None:
    """Two encoder ranks to two and to four language ranks, streamed or not, through a pool smaller than each image."""
    drawn = [picture(280, 224, seed=seed) for seed in range(pictures)]
    body = chat("What are these?", *drawn, max_tokens=TOKENS)
    answers = [fleet.ask(name, body | {"stream": stream}) for stream in (False, True)]
    assert [answer["ids"] for answer in answers] == [expected("What are these?", *drawn)] * 2
    assert len(set(answers[0]["ids"])) > 3
    if pictures:
        assert all(len(answer["rounds"]) > 1 for answer in answers)


@pytest.mark.failure_mode("shared-assembly-reused-early")
@pytest.mark.parametrize(("name", "times"), [("share", 1), ("replicate", 4)])
def test_what_the_wire_carries(
    fleet: Fleet, name: str, times: int, chat: Chat, picture: Picture, wait_until: Any
) -> None:
    """With ``share`` an embedding crosses the wire once for all ranks, else once for each rank."""
    servers = (fleet.encoder, fleet.languages[name])
    before = [server.metrics() for server in servers]
    passage = fleet.ask(name, chat("What is this?", picture(280, 224)))
    fleet.wait_at_rest(wait_until)
    sent, received = (
        server.metrics().total(metric) - was.total(metric)
        for server, was, metric in zip(
            servers, before, ("sender_bytes_total", "language_wire_bytes_total"), strict=True
        )
    )
    assert (passage["ranks"], passage["delivery"]) == (GROUPS[name], name)
    assert passage["wire_bytes"] == times * passage["bytes"] == received
    token_bytes, lanes = (
        passage["bytes"] // passage["total_tokens"],
        lanes_of_sender(0, senders=2, readers=times),
    )
    assert sent == token_bytes * sum(len(lane.share(passage["total_tokens"])) for lane in lanes) < received
    metrics = servers[1].metrics()
    assert (metrics.total("language_ranks"), metrics.total("language_readers")) == (GROUPS[name], times)


@pytest.mark.failure_mode("rank-counts-differ")
def test_one_router_before_different_groups(
    fleet: Fleet, chat: Chat, picture: Picture, expected: Any
) -> None:
    """The encoder is given the number of reading ranks with every room."""
    drawn = picture(280, 224)
    answers = [fleet.ask("both", chat("What is this?", drawn, max_tokens=TOKENS)) for _ in range(4)]
    assert sorted(answer["ranks"] for answer in answers) == [2, 2, 4, 4]
    assert [answer["ids"] for answer in answers] == [expected("What is this?", drawn)] * 4


@pytest.mark.parametrize("name", GROUPS)
def test_memory_of_every_rank_comes_back(fleet: Fleet, name: str, chat: Chat, picture: Picture) -> None:
    """What is received is several times what the ranks may hold together, so none of them keeps any of it."""
    body = chat("all work and no play " * 60, picture(280, 224), max_tokens=1)
    held = sum(fleet.ask(name, body)["bytes"] for _ in range(20))
    assert held > 2 * 2 * 2**20


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.parametrize("name", GROUPS)
def test_a_client_that_goes_away(fleet: Fleet, name: str, chat: Chat, picture: Picture) -> None:
    """After a disconnect no rank holds memory for the request, and the servers still answer."""
    with fleet.streaming(name, chat("What is this?", picture(280, 224))):
        assert fleet.languages[name].metrics().total("language_generating") == 1
    assert len(fleet.ask(name, chat("Say something."))["ids"]) == 8


@pytest.mark.failure_mode("rank-lost")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("name", GROUPS)
def test_a_rank_is_lost_in_mid_answer(
    fleet: Fleet, name: str, number: signal.Signals, chat: Chat, picture: Picture, wait_until: Any
) -> None:
    """The client gets the cause within the time-out of the ranks; then all ranks restart and answer as before."""
    body = chat("What is this?", picture(280, 224))
    before = fleet.ask(name, body)
    with fleet.streaming(name, body) as lines:
        os.kill(fleet.pid(name, 1), number)
        *_, last, mark = lines
    assert mark == "data: [DONE]"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("rank_lost", "server_error"), error
    fleet.wait_restarted(name, wait_until)
    assert fleet.ask(name, body)["ids"] == before["ids"]
    cause = (
        "rank 1 has ended: killed by signal 9"
        if number == signal.SIGKILL
        else r"rank \d: the tensor-parallel group is broken, seen by rank \d: .*"
    )
    log = fleet.languages[name].log.read_text()
    assert re.search(f"^embedwire: {cause}; all ranks start anew$", log, re.MULTILINE), log


@pytest.mark.failure_mode("rank-lost", "encoder-killed")
def test_another_server_takes_over_what_had_no_token_yet(
    fleet: Fleet, chat: Chat, picture: Picture, wait_until: Any
) -> None:
    """A stopped rank does not answer when its room is opened, and the router uses another server."""
    body = chat("What is this?", picture(280, 224))
    before = fleet.ask("both", body)
    os.kill(fleet.pid("share", 1), signal.SIGSTOP)
    answers = [fleet.ask("both", body) for _ in range(2)]
    assert {answer["ranks"] for answer in answers} == {GROUPS["replicate"]}
    assert all(answer["ids"] == before["ids"] for answer in answers)
    fleet.wait_restarted("share", wait_until)


@pytest.mark.failure_mode("rank-lost", "restart-on-same-address")
def test_a_killed_rank_of_the_encoder(fleet: Fleet, chat: Chat, picture: Picture, wait_until: Any) -> None:
    """All ranks of the encoder restart at the same address and serve as before."""
    body, encoder = chat("What are these?", picture(280, 224), picture(140, 112)), fleet.encoder
    before, url = fleet.ask("share", body), encoder.url
    os.kill(encoder.facts["rank_pids"][1], signal.SIGKILL)
    encoder.wait_ready()
    assert encoder.url == url
    wait_until(lambda: fleet.known("share", "encoder"))
    assert fleet.ask("share", body)["ids"] == before["ids"]
    assert "embedwire: rank 1 has ended: killed by signal 9; all ranks start anew" in encoder.log.read_text()
