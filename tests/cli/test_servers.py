"""Commands of one server each: what is refused, and how vLLM is started."""

from __future__ import annotations

import json
import socket
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

from embedwire.cli.options import load
from embedwire.cli.servers import vllm_command
from embedwire.registry import Role

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_a_port_that_is_taken_is_said(embedwire: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = embedwire("registry", "--port", port)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr


def flags_of(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in pairwise(command) if a.startswith("--")}


def test_how_servers_are_started() -> None:
    loaded = load({"port": 7, "dtype": "float32", "source_memory": "1MiB", "transport": "tcp"})
    command = vllm_command(loaded, "m", role=Role.ENCODER, report_to="http://r", items_port=8)
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = flags_of(command)
    assert (flags["--model"], flags["--port"], flags["--dtype"]) == ("m", "7", "float32")
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= {*command}
    assert json.loads(flags["--ec-transfer-config"]) == {
        "ec_connector": "EmbedwireECConnector",
        "ec_connector_module_path": "embedwire.engines.vllm.connector",
        "ec_role": "ec_producer",
        "ec_connector_extra_config": {
            "transport": "tcp",
            "host": "127.0.0.1",
            "port": 8,
            "items_bytes": 2**20,
        },
    }


def test_how_language_servers_are_started() -> None:
    told = {"media": "metadata", "num_blocks": 8, "assembly_memory": "2MiB", "tensor_parallel_size": 2}
    told |= {"vllm_connector": '{"local_encode": true, "item_deadline_s": 7}'}
    loaded = load(told | {"vllm_python": "/opt/py", "vllm_args": "-a", "vllm_language_args": "--b 'c d'"})
    command = vllm_command(loaded, "m", role=Role.LANGUAGE, name="n", report_to="http://r")
    assert command[0] == "/opt/py"
    assert command[-3:] == ["-a", "--b", "c d"]
    assert "--language-model-only" in command
    assert "--dtype" not in command
    flags = flags_of(command)
    assert (flags["--served-model-name"], flags["--tensor-parallel-size"]) == ("n", "2")
    config = json.loads(flags["--ec-transfer-config"])
    assert config["ec_role"] == "ec_consumer"
    assert config["ec_connector_extra_config"] == {
        "transport": "auto",
        "item_deadline_s": 7,
        "local_encode": True,
        "report_to": ["http://r"],
        "num_blocks": 8,
        "staging_bytes": 2 * 2**20,
    }


def test_where_items_are_fetched_ahead() -> None:
    command = vllm_command(load({}), "m", role=Role.LANGUAGE, items_from=["tcp://a:1", "tcp://b:2"])
    config = json.loads(flags_of(command)["--ec-transfer-config"])["ec_connector_extra_config"]
    assert (config["encoders"], config["prefetch"]) == (["tcp://a:1", "tcp://b:2"], True)
