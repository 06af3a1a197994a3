"""The router in front of servers that speak as vLLM does, all of them on real sockets."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI, Response

from embedwire.errors import ConfigurationError
from embedwire.registry import Registry
from embedwire.serve.vllm.app import VllmSettings
from embedwire.serve.vllm.dispatch import VllmLimits
from embedwire.serve.watch import WatchTimes

WAIT_S = 20.0


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [msgspec.json.decode(event) for event in events]


def cause_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.failure_mode("no-media")
def test_text_goes_to_a_language_server_alone(servers: Any, post: Any, chat: Any) -> None:
    """The request is passed on unchanged, unknown fields included."""
    encoder, language = servers.encoder(), servers.language()
    body = chat("hello", odd={"a": [1.5, None]}, top_k=3, n=2)
    answer = post(servers.router(), body)
    assert text_of(answer) == "saw "
    assert answer.json()["vllm_field"] == 1.5
    assert (language.bodies, encoder.bodies) == ([body], [])


def test_an_image_goes_to_both_sides_in_the_same_bytes(
    servers: Any, post: Any, chat: Any, name_of: Any, image_url: Any
) -> None:
    encoder, language = servers.encoder(), servers.language()
    answer = post(servers.router(), chat("what?", b"one", temperature=0))
    assert text_of(answer) == f"saw {name_of(b'one')}"
    passage = answer.json()["embedwire"]
    assert passage.pop("encode_ms") > 0
    assert passage == {
        "encoders": [servers.encoder_servers[0].url],
        "items": 1,
        "total_tokens": 100,
        "ttft_ms": None,
        "transfers": {},
    }
    (asked,), (body,) = encoder.bodies, language.bodies
    (uuid,) = uuids_in(asked)
    part = {"type": "image_url", "image_url": {"url": image_url(b"one")}, "uuid": uuid}
    assert asked == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [part]}],
        "max_tokens": 1,
        "stream": False,
    }
    assert body["messages"][0]["content"] == [part, {"type": "text", "text": "what?"}]
    told = body["ec_transfer_params"]["embedwire"]
    assert len(bytes.fromhex(told["ticket"])) == 16
    assert told["items"] == {uuid: {"addresses": [encoder.address], "tokens": 100}}


def test_media_are_fetched_once(servers: Any, cluster: Any, post: Any, chat: Any, name_of: Any) -> None:
    fetched = []
    host = FastAPI()

    @host.get("/picture")
    async def picture() -> Response:
        fetched.append(1)
        return Response(b"a picture")

    encoder, language = servers.encoder(), servers.language()
    answer = post(servers.router(), chat("what?", f"{cluster.run(host).url}/picture"))
    assert text_of(answer) == f"saw {name_of(b'a picture')}"
    urls = {
        body["messages"][0]["content"][0]["image_url"]["url"] for body in (*encoder.bodies, *language.bodies)
    }
    assert urls == {"data:application/octet-stream;base64," + base64.b64encode(b"a picture").decode()}
    assert len(fetched) == 1


@pytest.mark.parametrize("kind", ["video_url", "audio_url"])
def test_other_media(servers: Any, post: Any, chat: Any, name_of: Any, kind: str) -> None:
    servers.encoder()
    servers.language()
    body = chat("what?", b"x")
    url = f"data:a/b;base64,{base64.b64encode(b'film').decode()}"
    body["messages"][0]["content"][0] = {"type": kind, kind: {"url": url}}
    router = servers.router()
    assert text_of(post(router, body)) == f"saw {name_of(b'film')}"
    sound = {"data": base64.b64encode(b"sound").decode(), "format": "wav"}
    body["messages"][0]["content"][0] = {"type": "input_audio", "input_audio": sound}
    assert text_of(post(router, body)) == f"saw {name_of(b'sound')}"


def test_options_of_media_reach_both_sides(servers: Any, post: Any, chat: Any, name_of: Any) -> None:
    """And items with other options are other items."""
    encoder, language = servers.encoder(), servers.language()
    router = servers.router()
    options = {"mm_processor_kwargs": {"max_pixels": 784}, "media_io_kwargs": {"image": {"a": 1}}}
    body = chat("what?", b"x", **options)
    body["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    assert text_of(post(router, body)) == f"saw {name_of(b'x', **options)}"
    for seen in (*encoder.bodies, *language.bodies):
        assert seen["mm_processor_kwargs"] == {"max_pixels": 784}
        assert seen["media_io_kwargs"] == {"image": {"a": 1}}
        assert seen["messages"][0]["content"][0]["image_url"]["detail"] == "low"
    changes: list[dict[str, Any]] = [{"mm_processor_kwargs": {"max_pixels": 785}}, {"media_io_kwargs": {}}]
    for changed in changes:
        assert post(router, body | changed).status_code == 200
    body["messages"][0]["content"][0]["image_url"]["detail"] = "high"
    assert post(router, body).status_code == 200
    assert len(encoder.bodies) == 4


def test_a_users_uuid_is_dropped(servers: Any, post: Any, chat: Any, name_of: Any) -> None:
    """It would become the name of a cache entry: another user's, or a path. Both sides get the router's own, a content hash."""
    encoder, language = servers.encoder(), servers.language()
    body, router = chat("what?", b"x"), servers.router()
    plain = text_of(post(router, body))
    body["messages"][0]["content"][0]["uuid"] = "../../etc"
    assert text_of(post(router, body)) == plain
    assert "etc" not in str([encoder.bodies, language.bodies])


def uuids_in(body: dict[str, Any]) -> list[str]:
    return [part["uuid"] for m in body["messages"] for part in m["content"] if part["type"] != "text"]


@pytest.mark.parametrize("media", ["bytes", "metadata"])
def test_items_are_named_by_what_determines_them(servers: Any, post: Any, chat: Any, media: str) -> None:
    """The same name on both sides, which changes with the bytes and with each option, and with nothing else."""
    encoder, language = servers.encoder(), servers.language()
    router = servers.router(media=media, remembered_max=0)
    body = chat("what?", b"x")
    other_text = chat("and now?", b"x", temperature=0.5)
    other_bytes = chat("what?", b"y")
    other_kwargs = {**body, "mm_processor_kwargs": {"max_pixels": 784}}
    other_io = {**body, "media_io_kwargs": {"image": {"mode": "L"}}}
    other_detail = chat("what?", b"x")
    other_detail["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    for request in (body, other_text, other_bytes, other_kwargs, other_io, other_detail):
        assert post(router, request).status_code == 200
    names = [name for seen in encoder.bodies for name in uuids_in(seen)]
    assert names[0] == names[1]
    assert len(set(names)) == 5
    assert all(len(bytes.fromhex(name)) == 32 for name in names)
    assert [name for seen in language.bodies for name in uuids_in(seen)] == names


HOSTILE: list[Any] = [
    {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": "x"},
    {"type": "text", "text": "a", "uuid": "x", "image_embeds": {}},
    {"type": "text", "text": "a", "uuid": "x", "image_url": {"url": "http://169.254.169.254/"}},
    {"type": "image_url", "image_url": None, "uuid": "x"},
    {"type": "image_url", "uuid": "x"},
    {
        "type": "image_url",
        "image_url": {"url": "data:;base64,AAAA"},
        "video_url": {"url": "http://10.0.0.1/"},
    },
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}},
]


@pytest.mark.parametrize("part", HOSTILE)
def test_parts_that_would_reach_past_the_router_are_refused(
    servers: Any, post: Any, chat: Any, part: Any
) -> None:
    encoder, language = servers.encoder(), servers.language()
    body = chat("what?", b"x")
    body["messages"][0]["content"][0] = part
    answer = post(servers.router(), body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("messages[0].content[0]")
    assert (encoder.bodies, language.bodies) == ([], [])


@pytest.mark.parametrize(
    "field", [{"ec_transfer_params": {}}, {"vllm_xargs": {"ec_transfer_params": {"a": 1}}}]
)
def test_users_can_not_name_transfers(servers: Any, post: Any, chat: Any, field: Any) -> None:
    language = servers.language()
    answer = post(servers.router(), chat("a") | field)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(field)))
    assert language.bodies == []


def test_private_addresses_are_not_fetched(servers: Any, cluster: Any, post: Any, chat: Any) -> None:
    from embedwire.serve.media import MediaLimits

    servers.encoder()
    servers.language()
    router = servers.router(media_limits=MediaLimits())
    answer = post(router, chat("what?", f"{router}/health"))
    assert cause_of(answer) == (400, "invalid_media_url")


def test_metadata_instead_of_media(servers: Any, post: Any, chat: Any) -> None:
    encoder = servers.encoder()
    language = servers.language()
    answer = post(servers.router(media="metadata"), chat("what?", b"one", b"two"))
    names = uuids_in(language.bodies[0])
    assert sorted(names) == sorted(name for body in encoder.bodies for name in uuids_in(body))
    assert text_of(answer) == f"saw {' '.join(names)}"
    assert language.bodies[0]["messages"][0]["content"][:2] == [
        {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": name}
        for name in names
    ]


def test_items_are_spread_over_the_encoders(servers: Any, post: Any, chat: Any) -> None:
    """By outstanding tokens: while a large item is under way at one, all small ones go to the other."""
    gate = threading.Event()
    one, two = servers.encoder(gate=gate), servers.encoder(gate=gate)
    servers.language()
    router = servers.router()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(post, router, chat("what?", b"L" * 4096))]
        large, small = (one, two) if _enters(one, two) else (two, one)
        for i in range(3):
            asked.append(pool.submit(post, router, chat("what?", b"s%d" % i)))
            small.entered.get(timeout=WAIT_S)
        gate.set()
        assert [answer.result().status_code for answer in asked] == [200] * 4
    assert [len(double.bodies) for double in (large, small)] == [1, 3]


def _enters(one: Any, two: Any) -> bool:
    """Whether the first request is at ``one``. One of the two gets it."""
    found = threading.Semaphore(0)
    for double in (one, two):
        threading.Thread(target=lambda q=double.entered: (q.get(timeout=WAIT_S), found.release())).start()
    assert found.acquire(timeout=WAIT_S)
    first = bool(one.bodies)
    (two if first else one).entered.put("done")
    return first


def test_identical_items_are_encoded_once(servers: Any, post: Any, chat: Any) -> None:
    """Within a request, between requests under way, and when asked again later."""
    gate = threading.Event()
    encoder, language = servers.encoder(gate=gate), servers.language()
    router = servers.router()
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(post, router, chat(f"what {i}?", b"x", b"x")) for i in range(4)]
        encoder.entered.get(timeout=WAIT_S)
        while httpx.get(f"{router}/health").json()["under_way"] < 4:
            pass
        gate.set()
        texts = {text_of(answer.result()) for answer in asked}
    assert len(texts) == 1
    assert post(router, chat("again?", b"x")).status_code == 200
    assert (len(encoder.bodies), len(language.bodies)) == (1, 5)
    assert len({b["ec_transfer_params"]["embedwire"]["ticket"] for b in language.bodies}) == 5


def test_the_memory_of_answers_is_bounded(servers: Any, post: Any, chat: Any) -> None:
    encoder = servers.encoder()
    servers.language()
    router = servers.router(remembered_max=1)
    for image in (b"a", b"a", b"b", b"a"):
        assert post(router, chat("what?", image)).status_code == 200
    assert len(encoder.bodies) == 3


def test_who_waits_for_an_item_does_not_depend_on_who_asked_first(
    servers: Any, post: Any, chat: Any, hang_up_after: Any
) -> None:
    gate = threading.Event()
    encoder = servers.encoder(gate=gate)
    servers.language()
    router = servers.router()
    with ThreadPoolExecutor() as pool:
        with hang_up_after(f"{router}/v1/chat/completions", chat("first", b"x")):
            encoder.entered.get(timeout=WAIT_S)
            second = pool.submit(post, router, chat("second", b"x", b"y"))
            encoder.entered.get(timeout=WAIT_S)  # y is asked for, and so x is waited for
        while httpx.get(f"{router}/health").json()["under_way"] > 1:
            pass
        gate.set()
        assert second.result().status_code == 200
    assert len(encoder.bodies) == 2


@pytest.mark.failure_mode("encoder-killed")
@pytest.mark.parametrize("fails", [(500, "boom"), (503, "busy")])
def test_another_encoder_takes_over(servers: Any, post: Any, chat: Any, fails: Any) -> None:
    """Another encoder serves the request after one fails."""
    bad, good = servers.encoder(fails=fails), servers.encoder()
    servers.language()
    router = servers.router()
    for i in range(4):
        assert post(router, chat("what?", b"%d" % i)).status_code == 200
    assert len(good.bodies) == 4
    assert len(bad.bodies) >= 1


@pytest.mark.failure_mode("encoder-killed")
def test_an_encoder_killed_midway_loses_nothing(servers: Any, post: Any, chat: Any) -> None:
    """Items under way are encoded elsewhere; finished items are not fetched from the dead encoder."""
    gate = threading.Event()
    bad, good = servers.encoder(gate=gate), servers.encoder()
    servers.language()
    router = servers.router(watch=WatchTimes(interval_s=0.05), misses_to_evict=1)
    images = [b"%d" % i for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(post, router, chat("what?", image)) for image in images]
        bad.entered.get(timeout=WAIT_S)
        servers.encoder_servers[0].stop()
        answers = [answer.result() for answer in asked]
        gate.set()
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len(good.bodies) == 8
    assert {answer.json()["embedwire"]["encoders"][0] for answer in answers} == {
        servers.encoder_servers[1].url
    }


def test_what_a_lost_encoder_had_is_not_remembered(servers: Any, post: Any, chat: Any) -> None:
    """No language server is sent to an encoder that is known to be gone."""
    encoders = [servers.encoder(), servers.encoder()]
    language = servers.language()
    router = servers.router(watch=WatchTimes(interval_s=0.05), misses_to_evict=1)
    assert post(router, chat("what?", b"x")).status_code == 200
    first = next(i for i, encoder in enumerate(encoders) if encoder.bodies)
    servers.encoder_servers[first].stop()
    while httpx.get(f"{router}/health").json()["workers"]["encoder"] > 1:
        pass
    assert post(router, chat("what?", b"x")).status_code == 200
    (told,) = language.bodies[1]["ec_transfer_params"]["embedwire"]["items"].values()
    assert told["addresses"] == [encoders[1 - first].address]


@pytest.mark.failure_mode("request-never-fits")
@pytest.mark.parametrize(
    ("status", "words"), [(400, "cannot identify image file"), (400, "exceeds the encoder cache size")]
)
def test_what_an_encoder_refuses_reaches_the_client_as_it_is(
    servers: Any, post: Any, chat: Any, status: int, words: str
) -> None:
    """The status and body of the refusal are passed on."""
    encoders = [servers.encoder(fails=(status, words)) for _ in range(2)]
    language = servers.language()
    answer = post(servers.router(), chat("what?", b"broken"))
    assert answer.status_code == status
    assert answer.json()["error"] == {
        "message": words,
        "type": "InternalServerError",
        "param": None,
        "code": "bad_request",
    }
    assert sum(len(encoder.bodies) for encoder in encoders) == 1
    assert language.bodies == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("cause", "status", "attempts"),
    [("deadline", 504, 1), ("never_fits", 413, 1), ("peer_lost", 502, 3), ("overloaded", 503, 1)],
)
def test_the_cause_of_an_end_reaches_the_client(
    servers: Any, post: Any, chat: Any, stream: bool, cause: str, status: int, attempts: int
) -> None:
    """Trap: vLLM itself answers a bare 500, or a 200 with an error behind the role chunk. A deadline that has passed is final."""
    for _ in range(3):
        servers.encoder()
    language = servers.language(ends=[(cause, "in words")] * 3)
    answer = post(servers.router(), chat("what?", b"x", stream=stream))
    assert cause_of(answer) == (status, cause)
    assert answer.json()["error"]["type"] == "transfer_error"
    assert "in words" in answer.json()["error"]["message"]
    assert len(language.bodies) == attempts


@pytest.mark.parametrize("stream", [True, False])
def test_an_item_that_was_evicted_is_encoded_again(servers: Any, post: Any, chat: Any, stream: bool) -> None:
    encoder, language = servers.encoder(), servers.language()
    router = servers.router()
    assert post(router, chat("what?", b"x", b"y")).status_code == 200
    language.ends.append(("unknown_item", "evicted"))
    answer = post(router, chat("what?", b"x", b"y", stream=stream))
    assert answer.status_code == 200
    assert "error" not in answer.text
    assert (len(encoder.bodies), len(language.bodies)) == (3, 3)
    assert len({b["ec_transfer_params"]["embedwire"]["ticket"] for b in language.bodies}) == 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("cause", ["peer_lost", "encoder_failed", "corrupt"])
def test_a_lost_transfer_is_tried_from_another_encoder(
    servers: Any, post: Any, chat: Any, name_of: Any, stream: bool, cause: str
) -> None:
    """Although the one that failed was picked longest ago."""
    encoders = [servers.encoder(), servers.encoder()]
    language = servers.language(ends=[(cause, "")])
    answer = post(servers.router(), chat("what?", b"x", b"y", stream=stream))
    assert answer.status_code == 200
    assert "error" not in answer.text
    bad, good = sorted(encoders, key=lambda e: e.entered.get(timeout=WAIT_S) != name_of(b"x"))
    assert [len(bad.bodies), len(good.bodies)] == [1, 2]
    told = language.bodies[1]["ec_transfer_params"]["embedwire"]["items"].values()
    assert [entry["addresses"] for entry in told] == [[good.address]] * 2


def test_an_encoder_that_came_back_is_asked_again(servers: Any, post: Any, chat: Any) -> None:
    """The answers that are remembered are of its earlier life; it is not to blame for them."""
    encoder, language = servers.encoder(), servers.language()
    router = servers.router()
    assert post(router, chat("what?", b"x", b"y")).status_code == 200
    language.ends.append(("peer_lost", ""))
    assert post(router, chat("what?", b"x", b"y")).status_code == 200
    assert len(encoder.bodies) == 4


def test_a_failure_without_a_cause(servers: Any, post: Any, chat: Any) -> None:
    """A connector that reports to nobody: the items are encoded again, and in the end the client hears who failed."""
    encoder, language = servers.encoder(), servers.language(ends=[("", "")] * 9)
    answer = post(servers.router(cause_wait_s=0.01), chat("what?", b"x"))
    assert cause_of(answer) == (502, "language_failed")
    assert "Internal server error" in answer.json()["error"]["message"]
    assert (len(encoder.bodies), len(language.bodies)) == (3, 3)


def test_a_failure_without_a_cause_where_there_is_another_server(servers: Any, post: Any, chat: Any) -> None:
    """Nobody says who is to blame, so the other one is asked, however busy it is: a broken server is always the least loaded."""
    gate = threading.Event()
    servers.encoder()
    languages = [servers.language(gate=gate) for _ in range(2)]
    router = servers.router(cause_wait_s=0.01)
    with ThreadPoolExecutor(2) as pool:
        text = pool.submit(post, router, chat("a"))
        try:
            until(lambda: any(language.bodies for language in languages))
            busy, broken = sorted(languages, key=lambda language: not language.bodies)
            broken.gate, broken.ends = None, [("", "")] * 9
            picture = pool.submit(post, router, chat("what?", b"x"))
            until(lambda: len(busy.bodies) == 2)
        finally:
            gate.set()
        assert {text.result().status_code, picture.result().status_code} == {200}
    assert len(broken.bodies) == 1


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_encoder_that_has_gone_since_hides_no_cause(servers: Any, post: Any, chat: Any) -> None:
    """As when one server's end ends them all: the client hears of the first."""
    gate = threading.Event()
    servers.encoder()
    language = servers.language(ends=[("", "")], gate=gate)
    router = servers.router(cause_wait_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, router, chat("what?", b"x"))
        language.entered.get(timeout=WAIT_S)
        servers.encoder_servers[0].stop()
        assert servers.encoder_servers[0].wait_stopped(WAIT_S)
        gate.set()
    assert cause_of(answer.result()) == (502, "language_failed")


def test_a_text_that_kills_an_engine_is_not_tried_on_the_next(servers: Any, post: Any, chat: Any) -> None:
    languages = [servers.language(fails=(500, "boom")) for _ in range(2)]
    assert cause_of(post(servers.router(), chat("a"))) == (502, "language_failed")
    assert sum(len(language.bodies) for language in languages) == 1


def test_another_language_server_takes_over(servers: Any, post: Any, chat: Any) -> None:
    """What was encoded stays encoded."""
    encoder = servers.encoder()
    servers.language(fails=(503, "busy"))
    servers.language()
    router = servers.router()
    for i in range(2):
        assert post(router, chat(f"what {i}?", b"x")).status_code == 200
    assert len(encoder.bodies) == 1


def test_what_a_language_server_refuses_reaches_the_client(servers: Any, post: Any, chat: Any) -> None:
    servers.encoder()
    servers.language(fails=(400, "max_tokens is too large"))
    answer = post(servers.router(), chat("what?", b"x"))
    assert cause_of(answer) == (400, "bad_request")
    assert answer.json()["error"]["message"] == "max_tokens is too large"


@pytest.mark.parametrize(
    ("cause", "code", "encodes"), [("unknown_item", "unknown_item", 2), ("", "language_failed", 2)]
)
def test_a_stream_that_fails_behind_its_first_token(
    servers: Any, post: Any, chat: Any, cause: str, code: str, encodes: int
) -> None:
    """It ends with an error event that names the cause, and the router forgets the item that is gone."""
    encoder, language = servers.encoder(), servers.language(ends=[(cause, "in words")], fails_late=True)
    router = servers.router(cause_wait_s=0.01 if not cause else WAIT_S)
    *content, last = events_of(post(router, chat("what?", b"x", stream=True)))
    assert content[-1]["choices"][0]["delta"]["content"] == "saw "
    assert last["error"]["code"] == code
    assert len(language.bodies) == 1, "the beginning has gone out"
    assert post(router, chat("what?", b"x")).status_code == 200
    assert len(encoder.bodies) == encodes


@pytest.mark.parametrize(("fails", "code"), [(None, "language_failed"), ((400, "too long"), "bad_request")])
def test_a_text_that_fails_behind_its_first_token(
    servers: Any, post: Any, chat: Any, fails: tuple[int, str] | None, code: str
) -> None:
    servers.language(fails_late=True, fails_texts=True, fails=fails)
    *_, last = events_of(post(servers.router(), chat("a", stream=True)))
    assert last["error"]["code"] == code


def test_a_stream_goes_through(servers: Any, post: Any, chat: Any, name_of: Any) -> None:
    servers.encoder()
    servers.language()
    events = events_of(post(servers.router(), chat("what?", b"x", stream=True)))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == f"saw {name_of(b'x')}"
    assert ["embedwire" in event for event in events] == [False, False, False, True]
    assert events[-1]["embedwire"]["items"] == 1
    assert events[-1]["embedwire"]["ttft_ms"] > 0


def test_tokens_go_out_as_they_come(servers: Any, chat: Any) -> None:
    gate = threading.Event()
    servers.encoder()
    servers.language(gate=gate)
    url, body = f"{servers.router()}/v1/chat/completions", chat("what?", b"x", stream=True)
    with httpx.stream("POST", url, json=body, timeout=WAIT_S) as answer:
        parts = answer.iter_text()
        begun = ""
        while '"content":"saw "' not in begun:
            begun += next(parts)
        assert '"role":"assistant"' in begun
        gate.set()
        assert "".join(parts).endswith("data: [DONE]\n\n")


@pytest.mark.failure_mode("abort-not-propagated")
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_reaches_the_language_server(
    servers: Any, chat: Any, hang_up_after: Any, stream: bool
) -> None:
    """The router closes its request to the language server."""
    gate = threading.Event()
    servers.encoder()
    language = servers.language(gate=gate)
    router = servers.router()
    with hang_up_after(f"{router}/v1/chat/completions", chat("what?", b"x", stream=stream)) as connection:
        language.entered.get(timeout=WAIT_S)
        if stream:
            assert b"200 OK" in connection.recv(4096)
    language.disconnected.get(timeout=WAIT_S)
    gate.set()
    assert httpx.get(f"{router}/health").json()["under_way"] == 0


@pytest.mark.failure_mode("abort-not-propagated")
def test_a_disconnect_reaches_the_encoder(servers: Any, chat: Any, hang_up_after: Any) -> None:
    """The router closes its request to the encoder."""
    gate = threading.Event()
    encoder, language = servers.encoder(gate=gate), servers.language()
    router = servers.router()
    with hang_up_after(f"{router}/v1/chat/completions", chat("what?", b"x")):
        encoder.entered.get(timeout=WAIT_S)
    encoder.disconnected.get(timeout=WAIT_S)
    gate.set()
    assert language.bodies == []


def test_an_item_that_never_comes_ends_within_its_deadline(servers: Any, post: Any, chat: Any) -> None:
    gate = threading.Event()
    encoder = servers.encoder(gate=gate)
    servers.language()
    answer = post(servers.router(item_deadline_s=2.0), chat("what?", b"x"))
    assert cause_of(answer) == (504, "deadline")
    assert "2 s" in answer.json()["error"]["message"]
    encoder.disconnected.get(timeout=WAIT_S)
    gate.set()


def test_ends_of_nobody(servers: Any) -> None:
    """A late one, or a guessed one, changes nothing; a malformed one is refused."""
    servers.language()
    url = f"{servers.router()}/vllm/ends"
    assert httpx.post(url, json={"ticket": "0" * 32, "cause": "deadline"}).status_code == 204
    for bad in ({}, {"ticket": "0" * 32, "cause": "<script>"}, {"ticket": "0" * 32, "cause": 1}):
        assert httpx.post(url, json=bad).status_code == 400
    assert httpx.post(url, content=b" " * 2**15).status_code == 413


def test_models_and_health(servers: Any, post: Any, chat: Any) -> None:
    servers.encoder()
    servers.language()
    router = servers.router()
    assert [m["id"] for m in httpx.get(f"{router}/v1/models").json()["data"]] == ["tiny"]
    assert httpx.get(f"{router}/health").json()["workers"] == {"encoder": 1, "language": 1}
    assert cause_of(post(router, chat("a") | {"model": "other"})) == (404, "model_not_found")


def test_nobody_there(servers: Any, post: Any, chat: Any) -> None:
    servers.language()
    answer = post(servers.router(), chat("what?", b"x"))
    assert cause_of(answer) == (503, "overloaded")
    assert "no encoder server" in answer.json()["error"]["message"]


def test_workers_from_a_registry(servers: Any, cluster: Any, post: Any, chat: Any) -> None:
    """Beside this package's own, which a router for vLLM leaves alone, as the other way round."""
    servers.encoder()
    servers.language()
    registry = cluster.add_registry(Registry(), times=WatchTimes(interval_s=0.02))
    for role, server in zip(
        ("encoder", "language"), (*servers.encoder_servers, *servers.language_servers), strict=True
    ):
        worker = {"role": role, "url": server.url, "model": "?", "fingerprint": "vllm", "incarnation": 1}
        entered = httpx.post(f"{registry.url}/workers", json=worker | {"engine": "vllm"})
        assert entered.status_code == 200
    while {w["worker"]["model"] for w in httpx.get(f"{registry.url}/workers").json()["workers"]} != {"tiny"}:
        pass
    router = servers.router(registry_url=registry.url, encoder_urls=(), language_urls=())
    assert post(router, chat("what?", b"x")).status_code == 200
    own = cluster.add_router(registry_url=registry.url)
    assert httpx.get(f"{own.url}/health").json()["workers"] == {"encoder": 0, "language": 0}


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="either"):
        VllmSettings()
    with pytest.raises(ConfigurationError, match="both"):
        VllmSettings(registry_url="http://r", encoder_urls=["http://e"])
    with pytest.raises(ConfigurationError, match="item_deadline_s is 0"):
        VllmLimits(item_deadline_s=0)
    with pytest.raises(ConfigurationError, match="remembered_max"):
        VllmLimits(remembered_max=-1)


def test_the_log_line_of_a_request(servers: Any, post: Any, chat: Any, next_line: Any) -> None:
    servers.encoder(), servers.language()
    assert post(servers.router(), chat("what?", b"one")).status_code == 200
    line = "POST /v1/chat/completions status=200 model=tiny items=1 tokens=100 complete=True"
    assert next_line() == ("INFO", line)
