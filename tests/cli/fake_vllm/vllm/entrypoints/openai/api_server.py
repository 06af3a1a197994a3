"""Stands for vLLM's API server where ``embedwire up --engine vllm`` is tested: its flags, its health, an answer, and a process of its own
that outlives it unless somebody ends it too. Plain Python, as it runs in an environment of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for flag in ("--model", "--host", "--served-model-name", "--dtype", "--ec-transfer-config", "--seed"):
    parser.add_argument(flag)
parser.add_argument("--port", type=int)
parser.add_argument("--tensor-parallel-size", type=int)
for flag in ("--enforce-eager", "--no-enable-prefix-caching", "--language-model-only", "--fails"):
    parser.add_argument(flag, action="store_true")
arguments = parser.parse_args()
if arguments.fails:
    sys.exit("no such model: " + arguments.model)
config = json.loads(arguments.ec_transfer_config)
name = arguments.served_model_name or arguments.model
core = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        models = {"data": [{"id": name}]}
        self.answer(models if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if config["ec_role"] == "ec_producer":
            entry = {"addresses": ["tcp://127.0.0.1:1"], "tokens": 7, "metadata": {}}
            self.answer({"ec_transfer_params": {"some-hash": entry}})
            return
        said = {"argv": sys.argv[1:], "config": config, "core": core.pid, "asked": body}
        message = {"role": "assistant", "content": json.dumps(said)}
        self.answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer((arguments.host, arguments.port), Handler).serve_forever()
