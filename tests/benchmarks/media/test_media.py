"""The program that times children against this process: what it counts, in its smallest form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.media import cli


def test_times_are_taken_in_pairs_and_the_first_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(cli.time, "perf_counter", lambda: clock[0])
    order: list[str] = []

    def work(name: str, takes: list[float]) -> None:
        order.append(name)
        clock[0] += takes.pop(0)

    here, child = [9.0, 1.0, 2.0, 4.0], [99.0, 2.0, 3.0, 4.0]
    row = cli.in_turns(lambda: work("here", here), lambda: work("child", child), repeats=3)
    assert order == ["child", "here", "here", "child"] * 2
    assert (row["in_process_ms"], row["in_a_child_ms"]) == (2000, 3000)
    assert (row["ratio"], row["ratio_quartiles"], row["pairs"]) == (1.5, [1.0, 2.0], 3)


def test_the_program_times_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "media.json"
    clip = cli.ASSETS / "toy-world.mp4"
    what = ["--video", str(clip), "--frames", "4", "--at-once", "2", "--repeats", "1", "--out", str(out)]
    assert cli.main(what) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["clip"], row["at_once"], row["frames"][0]) == ("toy-world.mp4", 2, 4)
    assert row["decoding"]["ratio"] > 0
    assert row["host"]["in_process_ms"] > row["decoding"]["in_process_ms"], "it has the processor's time too"
    assert "4 frames, 2 at once" in capsys.readouterr().out
