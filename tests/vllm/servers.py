"""Real vLLM servers as processes of a test: started, waited for, asked, and ended with all that they started.

They share two cores: one thread each, small caches, no compilation. A server costs some twenty seconds to start, so those that do not
change are shared by the tests of a module.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from embedwire.cli.stack import free_ports

MODEL = "small"
READY_S = 240.0
END_S = 30.0
LOOK_AGAIN_S = 0.1
WITHIN_S = 60.0
"""Whatever is waited for comes within this, or the test fails."""
PYTHONPATH = os.pathsep.join(
    [str(Path(__file__).parent / "shim"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
"""First what lets torchvision be imported."""
FLAGS = (
    "--served-model-name", MODEL, "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096",
    "--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": {"count": 8, "width": 448, "height": 448}}',
    "--shutdown-timeout", "5", "--host", "127.0.0.1",
)  # fmt: skip
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": PYTHONPATH,
}  # fmt: skip


def connector(role: str, **extra: Any) -> tuple[str, str]:
    """The flag that makes a server ``ec_producer`` or ``ec_consumer``."""
    config = {
        "ec_connector": "EmbedwireECConnector",
        "ec_connector_module_path": "embedwire.engines.vllm.connector",
        "ec_role": role,
        "ec_connector_extra_config": extra,
    }
    return "--ec-transfer-config", json.dumps(config)


def free_port() -> int:
    """One that nobody has now, and nobody gets by chance until a server listens there."""
    return free_ports(1)[0]


class VllmServer:
    """One server. Starts at once; ``wait_ready`` before it is asked."""

    def __init__(
        self, model: Path, *flags: str, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self._command = [*command, "--port", str(port), *FLAGS, *flags]
        self._variables = {**VARIABLES, **(variables or {})}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as out:
            return subprocess.Popen(
                self._command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._variables},
                start_new_session=True,
            )

    def restart(self) -> None:
        """Stop it and start it again at the same URL; returns before it is ready."""
        self.stop()
        self.process = self._start()

    def wait_ready(self) -> VllmServer:
        """Until it answers. Fails with the end of its log."""
        deadline_s, pause = time.monotonic() + READY_S, threading.Event()
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200:
                    return self
            assert self.process.poll() is None, f"it has ended: {self.last_words()}"
            assert time.monotonic() < deadline_s, f"not ready within {READY_S:g} s: {self.last_words()}"
            pause.wait(LOOK_AGAIN_S)

    def wait_logged(self, text: str) -> None:
        """Until its log has ``text``."""
        deadline_s, pause = time.monotonic() + WITHIN_S, threading.Event()
        while text not in self.log.read_text(errors="replace"):
            assert time.monotonic() < deadline_s, f"{text!r} was not logged: {self.last_words()}"
            pause.wait(LOOK_AGAIN_S)

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def is_healthy(self) -> bool:
        """Whether its engine lives."""
        return httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200

    def kill(self) -> None:
        """All its processes, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """As a user would; whatever is left then is killed."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        self.kill()


def chat(
    parts: Sequence[Mapping[str, Any]], text: str = "What?", *, tokens: int = 16, **more: Any
) -> dict[str, Any]:
    """A greedy request of ``parts`` and a text, which answers with its token ids."""
    content = [*parts, {"type": "text", "text": text}]
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "return_token_ids": True,
        "ignore_eos": True,
        **more,
    }


def post(url: str, body: Mapping[str, Any], *, timeout_s: float = WITHIN_S) -> httpx.Response:
    """One chat request."""
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=timeout_s)


def stream_of(url: str, body: Mapping[str, Any]) -> tuple[list[int], list[dict[str, Any]]]:
    """A streamed chat request: the token ids of its answer, and the errors in it."""
    ids: list[int] = []
    errors: list[dict[str, Any]] = []
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=WITHIN_S
    ) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        errors += [event["error"]] if "error" in event else []
        ids += [i for choice in event.get("choices", ()) for i in choice.get("token_ids") or ()]
    return ids, errors


def ids_of(answer: httpx.Response) -> list[int]:
    """The token ids of an answer, which has to be one."""
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def offered(encoder: str, part: Mapping[str, Any]) -> dict[str, Any]:
    """Have one item encoded: its identifier, and what the answer says of it."""
    answer = post(encoder, chat([part], "x", tokens=1))
    assert answer.status_code == 200, answer.text
    params: dict[str, Any] = answer.json()["ec_transfer_params"]
    return params


def asked(
    encoders: Sequence[str], parts: Sequence[Mapping[str, Any]], text: str, **more: Any
) -> dict[str, Any]:
    """A request to a language server, its items encoded by turns on ``encoders``."""
    items: dict[str, Any] = {}
    for number, part in enumerate(parts):
        items |= offered(encoders[number % len(encoders)], part)
    return chat(parts, text, ec_transfer_params={"embedwire": {"ticket": "", "items": items}}, **more)


class Router:
    """Our router in front of some servers, at a port that was picked before, so that language servers know where to report."""

    def __init__(self, port: int, *flags: str, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "embedwire.cli", "router", "--engine", "vllm", "--port", str(port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen([*command, *flags], stdout=out, stderr=subprocess.STDOUT)
        self.log = log

    def wait_knows(self, **workers: int) -> Router:
        """Until it has found so many workers of each role."""
        deadline_s, pause = time.monotonic() + WITHIN_S, threading.Event()
        known: dict[str, int] = {}
        while any(known.get(role, 0) < count for role, count in workers.items()):
            assert time.monotonic() < deadline_s, f"it knows {known}: {self.log.read_text()[-2000:]}"
            pause.wait(LOOK_AGAIN_S)
            with suppress(httpx.HTTPError):
                known = httpx.get(f"{self.url}/health", timeout=2.0).json()["workers"]
        return self

    def stop(self) -> None:
        """As a user would."""
        self.process.terminate()
        self.process.wait(END_S)
