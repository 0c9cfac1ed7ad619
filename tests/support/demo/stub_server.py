"""Stands in for a server that speaks the OpenAI API, for tests of what talks to it and of what starts it.

`python -m tests.support.demo.stub_server PORT [healthy|dies|hangs]` runs one as a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REQUEST_ID = "chatcmpl-1"


@dataclass
class Stub:
    """What the server answers, and what it was asked."""

    report: Any = None  # None: 404
    refuse: tuple[int, Any] | None = None  # status and body of every answer to a chat
    answers: dict[str, str] = field(default_factory=lambda: {"on": "A [bold]rabbit[/] wakes.", "off": "Who knows?"})
    models: list[str] = field(default_factory=lambda: ["tiny"])
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def get(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        if path == f"/v1/metok/reports/{REQUEST_ID}" and self.report is not None:
            return 200, self.report
        return 404, {"error": {"message": "not here", "code": 404}}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/v1/chat/completions":
            return 404, {}
        self.asked.append(body)
        if self.refuse is not None:
            return self.refuse
        is_off = body["mm_processor_kwargs"]["metok"] == "off"
        return 200, {
            "id": REQUEST_ID,
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": self.answers["off" if is_off else "on"]},
                }
            ],
            "usage": {"prompt_tokens": 900 if is_off else 400, "completion_tokens": 3, "total_tokens": 0},
        }


@contextmanager
def serving(stub: Stub, port: int = 0) -> Iterator[Stub]:
    """Run the server in a thread; `stub.url` is its address meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(*stub.get(self.path))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self.reply(*stub.post(self.path, json.loads(self.rfile.read(length))))

        def reply(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if isinstance(body, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main() -> None:
    port, mode = int(sys.argv[1]), sys.argv[2]
    if mode == "dies":
        print("(EngineCore pid=1) ValueError: METok needs more layers.", file=sys.stderr)
        print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
        raise SystemExit(1)
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"HELPER {helper.pid}", flush=True)
    if mode == "hangs":
        time.sleep(600)
    with serving(Stub(), port):
        time.sleep(600)


if __name__ == "__main__":
    main()
