"""The server runner of the accuracy benchmark against a small HTTP server that records what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import cli as accuracy
from benchmarks.accuracy.data import Item, load_items
from benchmarks.accuracy.methods import SERVED, STOCK
from benchmarks.accuracy.run import run_server
from benchmarks.accuracy.server import ServerError, ServerRunner

TEXT = 20
REPORT = {
    "text_tokens": TEXT,
    "prune_layers": [1, 4, 8],
    "visual_tokens": {"stock": 101, "encoded": 60, "after_l1": 40, "after_l2": 30, "retained": 0},
    "kv_bytes": {"stock": 12100, "metok": 3000},
}


class Fake:
    """Answers "A" where METok is off or not spoken of, "B" with the default retention, "C" with another."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.stock_tokens = 101
        self.status = 200

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(body)
        metok = body.get("mm_processor_kwargs", {}).get("metok")
        dense = metok in (None, "off")
        text = "A" if dense else "B" if metok.get("preset") == "paper" else "C"
        return {
            "id": f"chatcmpl-{len(self.asked)}",
            "object": "chat.completion",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": f" {text}\n"}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": TEXT + (self.stock_tokens if dense else 60), "completion_tokens": 1},
        }


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    """A running fake and its URL."""
    state = Fake()

    class Handler(BaseHTTPRequestHandler):
        def _send(self, value: Any, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._send({"object": "list", "data": [{"id": "small", "object": "model"}]})
            elif self.path.startswith("/v1/metok/reports/chatcmpl-"):
                self._send(REPORT)
            else:
                self._send({"error": {"message": "nothing here"}}, 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if state.status != 200:
                self._send({"error": {"message": "no such setting"}}, state.status)
            else:
                self._send(state.chat(body))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def items(tmp_path: Path) -> Callable[..., list[Item]]:
    """`items()`: three choices about two videos whose right answer is A."""

    def make() -> list[Item]:
        rows = []
        for video, question in (("a.mp4", "First?"), ("a.mp4", "Second?"), ("b.mp4", "Third?")):
            (tmp_path / video).write_bytes(video.encode())
            row = {"video": video, "question": question, "options": ["x", "y"], "answer": "A", "kind": "letter"}
            rows.append(json.dumps(row))
        (tmp_path / "set.jsonl").write_text("\n".join(rows))
        return load_items(tmp_path / "set.jsonl")

    return make


def test_requests_and_counts(fake: tuple[Fake, str], items: Callable[..., list[Item]]) -> None:
    state, url = fake
    runner = ServerRunner(f"{url}/v1", frames=48, layers=12)
    answers = run_server(runner, items(), SERVED, lambda _: None)
    runner.close()

    assert len(state.asked) == 9
    body = state.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"] >= 32) == ("small", 0, True)
    assert body["media_io_kwargs"] == {"video": {"num_frames": 48}}
    assert body["mm_processor_kwargs"] == {"metok": {"preset": "paper", "report": True}}
    video, text = body["messages"][0]["content"]
    prefix, data = video["video_url"]["url"].split(",")
    assert (prefix, base64.b64decode(data)) == ("data:video/mp4;base64", b"a.mp4")
    assert text["text"] == "First?\nA. x\nB. y\nAnswer with the letter."
    # METok's points come before stock, whose counts their reports hold.
    assert [b["mm_processor_kwargs"]["metok"] == "off" for b in state.asked[:3]] == [False, False, True]

    stock, paper = answers[STOCK].outcomes[0], answers["metok paper"].outcomes[0]
    assert (stock.text, stock.entering, stock.per_layer, stock.kv_bytes) == ("A", 101, 101.0, 12100)
    assert (paper.text, paper.entering, paper.after_l1, paper.after_l2, paper.retained) == ("B", 60, 40, 30, 0)
    assert (paper.per_layer, paper.kv_bytes) == ((1 * 60 + 3 * 40 + 4 * 30) / 12, 3000)


def test_a_count_that_does_not_fit_is_told(fake: tuple[Fake, str], items: Callable[..., list[Item]]) -> None:
    state, url = fake
    state.stock_tokens = 99
    with pytest.raises(ServerError, match="counts 101 visual tokens for the stock model and the server took 99"):
        run_server(ServerRunner(f"{url}/v1", 48), items(), SERVED, lambda _: None)


def test_a_plain_server_is_sent_nothing_of_metoks(
    fake: tuple[Fake, str], items: Callable[..., list[Item]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program on a set of the user's own."""
    state, url = fake
    items()
    out = tmp_path / "out" / "mine.json"
    assert accuracy.main(["--set", str(tmp_path / "set.jsonl"), "--url", url, "--plain", "--out", str(out)]) == 0
    assert all("mm_processor_kwargs" not in body and "media_io_kwargs" not in body for body in state.asked)
    result = json.loads(out.read_text())
    (method,) = result["server"]["methods"].values()
    assert method["accuracy"]["kind: letter"]["accuracy"] == 1.0
    assert method["verdicts"] == "111"
    assert method["entering"] is method["kv_bytes"] is None
    assert result["set"]["videos"] == 2
    assert "small at http://127.0.0.1" in capsys.readouterr().out
    assert "server,stock,stock,all,3,1.0" in out.with_suffix(".csv").read_text()


def test_a_metok_server_with_a_point_of_ones_own(
    fake: tuple[Fake, str], items: Callable[..., list[Item]], tmp_path: Path
) -> None:
    state, url = fake
    items()
    out = tmp_path / "mine.json"
    options = ["--set", str(tmp_path / "set.jsonl"), "--url", f"{url}/v1", "--metok", '{"keep_ratio": 0.5}']
    assert accuracy.main([*options, "--out", str(out)]) == 0
    methods = json.loads(out.read_text())["server"]["methods"]
    assert list(methods) == [*SERVED, 'metok {"keep_ratio": 0.5}']
    assert methods["metok paper"]["accuracy"]["all"]["to_stock"]["lost"] == 3
    assert {"keep_ratio": 0.5, "report": True} in [b["mm_processor_kwargs"]["metok"] for b in state.asked]


def test_faults_are_one_sentence(
    fake: tuple[Fake, str], items: Callable[..., list[Item]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, url = fake
    items()
    options = ["--set", str(tmp_path / "set.jsonl"), "--plain", "--out", str(tmp_path / "x.json")]
    state.status = 400
    assert accuracy.main([*options, "--url", url]) == 2
    assert "refused the request (HTTP 400): " in capsys.readouterr().err
    assert accuracy.main([*options, "--url", "http://127.0.0.1:1"]) == 2
    told = capsys.readouterr().err
    assert told.strip() == "No server answers at http://127.0.0.1:1/v1."
    assert not (tmp_path / "x.json").exists()
