"""Two engines behind one address, and one engine over two launchers: the same answers as one engine alone.

Both launchers run on this machine, each bound to a core of its own, as two nodes would be to theirs;
`docs/multi-node.md`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, scene_video
from tests.support.server import warm
from tests.support.server.asking import OPTIONS, ask, oracle, result
from tests.support.server.clips import mp4
from tests.support.server.double import cores
from tests.support.server.live import Server, environment, free_port, serving, vllm

pytestmark = pytest.mark.skipif(len(cores()) < 2, reason="two engines need two cores")
METOK = (
    "--plugin", "metok", "--additional-config", json.dumps({"metok": {"decode_retention": 0.5}}),
    "--trust-request-mm-kwargs", "--max-num-batched-tokens", "256", "--served-model-name", "tiny", *OPTIONS,
)  # fmt: skip
REPORT: dict[str, Any] = {"report": True}
ASKED: list[Any] = [
    REPORT,
    {"decode_retention": 1} | REPORT,
    {"decode_retention": 0, "events": 3},
    "off",
    REPORT,
    REPORT,
]


def check(server: Server, sample: Sample, workers: int) -> None:
    """Several videos at once, each answered as the oracle answers it, and every worker is heard of."""
    videos = [mp4(scene_video(seed, 9 + 3 * seed)) for seed in range(len(ASKED))]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        answers = list(pool.map(lambda i: ask(server, videos[i], ASKED[i], top_logprobs=3), range(len(ASKED))))
    for video, metok, answer in zip(videos, ASKED, answers, strict=True):
        assert_same(oracle(sample, video, metok), result(answer), 1e-3)
        if isinstance(metok, dict) and "report" in metok:
            assert server.get(f"/v1/metok/reports/{answer.id}")[0] == 200
    state = json.loads(server.get("/v1/metok/state")[1])["workers"]
    assert len(state) == workers
    assert all(worker["groups"] for worker in state)


def test_two_engines_answer_as_one(two: Server, sample: Sample) -> None:
    check(two, sample, 2)
    counts = re.findall(
        r'vllm:request_success_total\{engine="(\d)",finished_reason="length".*\} (\S+)', two.get("/metrics")[1].decode()
    )
    answered = {engine: float(count) for engine, count in counts}
    assert answered.keys() == {"0", "1"}
    assert min(answered.values()) > 0, f"one engine had nothing to do: {answered}"
    assert sum(answered.values()) == len(ASKED)


@contextmanager
def second_node(model: Path, log: Path, *options: str) -> Iterator[warm.Program]:
    """`vllm serve --headless`, which waits for the first node, and ends after it."""
    process = warm.start(Path(vllm()), "serve", str(model), "--headless", *options, env=environment(), log=log)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_one_engine_over_two_nodes(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallel over vLLM's own multi-node launcher:
    each node has half of the heads that score the video.
    """
    for name, value in (("VLLM_HOST_IP", "127.0.0.1"), ("GLOO_SOCKET_IFNAME", "lo")):
        monkeypatch.setenv(name, value)
    port = str(free_port())
    nodes = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores()[1])
    with second_node(sample.path, tmp_path / "second.log", *nodes, "--node-rank", "1", *METOK) as second:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", cores()[0])
        with serving(sample.path, tmp_path / "first.log", *nodes, "--node-rank", "0", *METOK) as server:
            check(server, sample, 2)
            assert second.poll() is None, "the second node has ended"
