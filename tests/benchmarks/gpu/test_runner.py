"""Stages are processes under limits: what fails or hangs is ended, noted, and takes nothing with it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import cli, runner
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.runner import Runner, outcomes
from benchmarks.gpu.stages import Stage


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "out")
    made.make()
    return made


def stage(name: str, code: str, most: int = 60) -> Stage:
    return Stage(name, "", ("-c", code), 0, most)


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process: int) -> bool:
    end = time.monotonic() + 10
    while alive(process) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(process)


def test_a_failure_is_noted_with_the_end_of_its_log(folder: Folder) -> None:
    written = []
    made = Runner(folder, True, None, lambda: written.append(None))
    bad = made.run(stage("bad", "print('first'); print('no such kernel'); raise SystemExit(3)"))
    good = made.run(stage("good", "print('7 passed')"))
    assert bad is not None
    assert good is not None
    assert (bad.result, bad.ok, bad.tail) == ("failed (3)", False, ("first", "no such kernel"))
    assert (good.result, good.ok, good.tail) == ("ok", True, ())
    assert outcomes(folder) == {"bad": bad, "good": good}
    assert len(written) == 2  # the report, behind each


def test_one_that_hangs_is_ended_with_all_it_started(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.2)
    note = folder.path / "child"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(note)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    made = Runner(folder, False, time.monotonic() + 3600, lambda: None)
    outcome = made.run(stage("hangs", code, most=6))
    assert outcome is not None
    assert outcome.result == "out of time (6 s)"
    assert gone(int(note.read_text()))


def test_what_a_stage_leaves_running_is_ended(folder: Folder) -> None:
    note = folder.path / "child"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(note)!r}, "w").write(str(child.pid))
"""
    outcome = Runner(folder, False, None, lambda: None).run(stage("leaves", code))
    assert outcome is not None
    assert outcome.ok
    assert gone(int(note.read_text()))


def test_a_stage_finds_this_checkout_and_its_own_environment(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, with nothing on the path; and with a GPU no interpreter, whatever is set outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import json, os, metok_vllm, metok_kernels, benchmarks; print(json.dumps(dict(os.environ)))"
    asked = Stage("asks", "", ("-c", code), 0, 60, {"VLLM_GPU_SYNC_CHECK": "error"})

    def seen(small: bool) -> dict[str, str]:
        outcome = Runner(folder, small, None, lambda: None).run(asked, {"SMOKE": "safe"})
        assert outcome is not None
        assert outcome.ok, outcome
        found: dict[str, str] = json.loads((folder.logs / "asks.log").read_text())
        return found

    with_gpu = seen(False)
    assert (with_gpu["VLLM_GPU_SYNC_CHECK"], with_gpu["SMOKE"]) == ("error", "safe")
    assert "TRITON_INTERPRET" not in with_gpu
    assert seen(True)["TRITON_INTERPRET"] == "1"


def test_an_earlier_log_stays_and_earlier_rows_do_not(folder: Folder) -> None:
    rows = folder.kernels[0]
    writes = Stage("rows", "", ("-c", f"open({str(rows)!r}, 'a').write('row'); print('said')"), 0, 60, adds_to=rows)
    made = Runner(folder, True, None, lambda: None)
    made.run(writes)
    made.run(writes)
    assert rows.read_text() == "row"
    assert (folder.logs / "rows.before.log").read_text() == "said\n"


@pytest.fixture
def with_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The whole program, its smallest form cut down to stages of seconds and two that do not end well."""

    def cut(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
        whole = {one.name: one for one in all_stages(folder, small, model)}
        yield whole["machine"]
        yield stage("eager", "print('CUDA out of memory'); raise SystemExit(1)")
        yield whole["kernels"]
        yield stage("quiet", "import time; time.sleep(600)", most=1)

    all_stages = cli.stages
    monkeypatch.setattr(cli, "stages", cut)
    monkeypatch.setattr(cli, "SMALL", ("machine", "eager", "kernels", "quiet"))
    monkeypatch.setattr(runner, "GRACE", 0.2)
    return lambda: cli.main(["--small", "--out", str(tmp_path / "out")])


def test_a_failed_stage_leaves_the_finished_ones_and_the_report_says_what_failed(
    with_failures: Callable[[], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert with_failures() == 1
    assert "did not end well: eager quiet" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| eager |  | failed (1) |" in report
    assert "| quiet |  | out of time (4 s) |" in report
    assert "### eager: failed (1)\n\n```\nCUDA out of memory\n```" in report
    # What came before and what came after is there.
    assert "cases agree with their references" in report
    assert f"| Device | CPU ({len(os.sched_getaffinity(0))} cores) |" in report
    assert report.count("not measured |") == 8  # the goals: none of these stages has a figure of theirs
