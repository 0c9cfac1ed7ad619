"""A job's process and its result: found again, made again where it must be, its end told in a sentence."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metok_vllm.calibrate import engines
from metok_vllm.calibrate.engines import Engines
from metok_vllm.calibrate.errors import CalibrateError
from metok_vllm.calibrate.jobs import Asked, Job, StockAnswer, Variant

ANSWER = StockAnswer(tokens=[5], steps=[{5: -0.1, 6: -2.5}], text="yes")

PROGRAM = """
import json, sys
from pathlib import Path
stated = sys.stdin.read()
if not stated:
    sys.exit()
job_file, result_file, progress_file = map(Path, json.loads(stated))
from metok_vllm.calibrate.jobs import Facts, Job, Result, StockAnswer
job = Job.model_validate_json(job_file.read_bytes())
progress_file.write_text("2")
%s
facts = Facts(layers=4, strides=(2, 4, 8), first_layer=1, shape={}, frame_group=1, element_bytes=4, vllm="0")
stock = [StockAnswer(tokens=[5], steps=[{5: -0.1}])]
result_file.write_text(Result(facts=facts, stock=stock, told={}, seconds=1).model_dump_json())
"""


def a_job(**changed: Any) -> Job:
    stated: dict[str, Any] = {
        "model": "m",
        "model_mark": "mark",
        "plugin": "1",
        "engine": {},
        "server": {"prune_layers": [1, 2, 3]},
        "answer_tokens": 4,
        "asked": [Asked(video="a.mp4", question="Who?"), Asked(video="a.mp4", question="What?", stock=ANSWER)],
        "variants": [Variant(name="one"), Variant(name="two", of=[1])],
    }
    return Job(**{**stated, **changed})


def test_other_versions_are_other_work() -> None:
    jobs = [a_job(), a_job(vllm="2"), a_job(plugin="2"), a_job(model_mark="other")]
    assert len({job.name() for job in jobs}) == 4


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test opens is closed behind it."""
    with contextlib.ExitStack() as stack:
        make = Engines.__init__

        def init(self: Engines, *given: Any) -> None:
            make(self, *given)
            stack.callback(self.close)

        monkeypatch.setattr(Engines, "__init__", init)
        yield


@pytest.fixture
def run_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let another program be the worker."""
    real = subprocess.Popen

    def choose(body: str = "") -> None:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM % body)

        def popen(command: list[str], **kwargs: Any) -> Any:
            assert command == [sys.executable, "-m", "metok_vllm.calibrate.worker"]
            return real([sys.executable, str(program)], **kwargs)

        monkeypatch.setattr(engines.subprocess, "Popen", popen)

    return choose


def test_a_result_is_read_again_and_the_progress_adds_up(tmp_path: Path, run_by: Callable[..., None]) -> None:
    run_by()
    told: list[int] = []
    bench = Engines(tmp_path / "work", told.append)
    first = bench.run(a_job())
    assert sum(told) == a_job().requests == 1 + 2 + 1
    again = Engines(tmp_path / "work", told.append)
    assert again.run(a_job()) == first
    assert (bench.started, again.started, again.read_again) == (1, 0, 1)
    assert sum(told) == 8


@pytest.mark.parametrize(
    "changed",
    [
        {"model_mark": "another"},
        {"plugin": "2"},
        {"server": {"prune_layers": [1, 2, 4]}},
        {"engine": {"dtype": "float16"}},
        {"answer_tokens": 5},
        {"asked": [Asked(video="a.mp4", question="Who?", video_mark="newer")]},
        {"variants": [Variant(name="one", with_video=False)]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_work_is_not_taken_for_it(changed: dict[str, Any]) -> None:
    assert a_job(**changed).name() != a_job().name() == a_job().name()


def test_the_next_process_waits_for_its_job_and_ends_without_one(tmp_path: Path, run_by: Callable[..., None]) -> None:
    run_by()
    started: list[subprocess.Popen[str]] = []
    popen = engines.subprocess.Popen

    def count(*given: Any, **named: Any) -> Any:
        started.append(popen(*given, **named))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch, Engines(tmp_path, lambda done: None) as bench:
        patch.setattr(engines.subprocess, "Popen", count)
        for tokens, processes in ((1, 1), (2, 3), (3, 4), (4, 5)):
            bench.run(a_job(answer_tokens=tokens))
            assert len(started) == processes, "from the second job on one is there before it is needed"
        assert [one.poll() for one in started] == [0, 0, 0, 0, None]
        assert len(list(tmp_path.glob("waiting-*.log"))) == 1
    assert started[-1].poll() is not None
    assert not list(tmp_path.glob("waiting-*.log"))
    assert len(list(tmp_path.glob("*.log"))) == 4


def test_half_a_result_is_made_again(tmp_path: Path, run_by: Callable[..., None]) -> None:
    run_by()
    bench = Engines(tmp_path, lambda done: None)
    bench.run(a_job())
    file = tmp_path / f"{a_job().name()}.result.json"
    file.write_text(file.read_text()[:20])
    bench.run(a_job())
    assert bench.started == 2


def test_a_worker_that_fails_is_told_in_one_sentence(tmp_path: Path, run_by: Callable[..., None]) -> None:
    run_by("raise ValueError('METok cannot serve this')")
    with pytest.raises(CalibrateError) as error:
        Engines(tmp_path, lambda done: None).run(a_job())
    log = tmp_path / f"{a_job().name()}.log"
    assert str(error.value) == f"The engine failed: METok cannot serve this (log: {log})."
    assert "Traceback" in error.value.details


def test_a_worker_that_leaves_nothing_is_an_error(tmp_path: Path, run_by: Callable[..., None]) -> None:
    run_by("sys.exit(0)")
    with pytest.raises(CalibrateError, match="The engine left no result"):
        Engines(tmp_path, lambda done: None).run(a_job())


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_worker(tmp_path: Path, run_by: Callable[..., None], by: signal.Signals) -> None:
    pid_file = tmp_path / "pid"
    run_by(f"import os, time; Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)")

    # A shell starts what it puts in the background with this one ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt() -> None:
        while not pid_file.exists() or not pid_file.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), by)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Engines(tmp_path, lambda done: None).run(a_job())
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    run_by()
    bench = Engines(tmp_path, lambda done: None)
    assert bench.run(a_job()).facts.layers == 4, "the same work goes on"
