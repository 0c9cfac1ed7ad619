"""Variants that were measured in several calls stand in one file, if they may stand side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import cli
from benchmarks.engine.merge import add

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(raw: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The program, its engines replaced by figures `factor` times as long; returns what is in the file."""
    monkeypatch.setattr(cli, "file_decode", lambda *_: {"median": 100.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "engine.json"

    def call(*arguments: str, factor: float = 1.0, code: str = "1111111") -> dict[str, Any]:
        def run_job(*_: Any) -> dict[str, Any]:
            if factor == 0:
                raise RuntimeError("out of memory")
            return raw(factor)

        monkeypatch.setattr(cli, "run_job", run_job)
        monkeypatch.setattr(
            cli, "conditions", lambda _: {"commit": code, "hardware": {"device": "none"}, "versions": {"vllm": "0"}}
        )
        common = ["--small", "--no-plots", "--work", str(tmp_path), "--out", str(out)]
        assert cli.main([*common, *arguments]) == int(factor == 0)
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    return call


def test_variants_come_together_in_the_order_they_ran(run: Run) -> None:
    first = run("--variants", "metok-paper", "--merge")  # there is no file yet
    assert first["ratios_to_stock"] == {}
    merged = run("--variants", "stock", "--merge", factor=2.0, code="2222222")
    assert list(merged["variants"]) == ["metok-paper", "stock"]
    assert merged["ratios_to_stock"]["metok-paper"]["language_model_prefill"] == pytest.approx(2)
    assert merged["command"] == f"{first['command']} ; {merged['command'].split(' ; ')[1]}"
    assert {name: entry["commit"] for name, entry in merged["variants"].items()} == {
        "metok-paper": "1111111",
        "stock": "2222222",
    }
    assert merged["commit"] == "1111111 and 2222222"


def test_without_merge_the_file_is_a_new_one(run: Run) -> None:
    run("--variants", "metok-paper")
    assert list(run("--variants", "stock")["variants"]) == ["stock"]


def test_a_variant_measured_again_takes_its_place_unless_it_fails(run: Run) -> None:
    run("--variants", "stock,metok-paper", "--merge")
    again = run("--variants", "stock", "--merge", factor=3.0)
    assert list(again["variants"]) == ["stock", "metok-paper"]
    assert again["ratios_to_stock"]["metok-paper"]["kv_capacity"] == pytest.approx(3)
    failed = run("--variants", "stock,metok-balanced", "--merge", factor=0)
    assert failed["variants"]["stock"] == again["variants"]["stock"]
    assert failed["variants"]["metok-balanced"]["error"] == "out of memory"
    assert failed["ratios_to_stock"] == again["ratios_to_stock"]
    assert "error" not in run("--variants", "metok-balanced", "--merge")["variants"]["metok-balanced"]


def test_one_that_only_counted_takes_no_times_away() -> None:
    counted, timed = {"tokens": {"prompt_tokens": 1}}, {"tokens": {"prompt_tokens": 1}, "levels": []}
    entries: dict[str, dict[str, Any]] = {}
    for entry, stays in ((counted, counted), (timed, timed), (counted, timed)):
        add(entries, "stock", entry)
        assert entries == {"stock": stays}


def test_another_workload_is_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    run("--variants", "stock", "--merge")
    before = (tmp_path / "engine.json").read_text()
    for other, said in ((["--frames", "8"], "workload: frames 32, now 8"), (["--eager"], None)):
        if said is None:  # on a CPU it is eager anyway
            run("--variants", "stock", "--merge", *other)
            continue
        with pytest.raises(SystemExit, match=said):
            run("--variants", "stock", "--merge", *other)
        assert (tmp_path / "engine.json").read_text() == before


def test_another_machine_is_refused(run: Run, tmp_path: Path) -> None:
    result = run("--variants", "stock", "--merge")
    out = tmp_path / "engine.json"
    for key, value, said in (
        ("hardware", {"device": "H200"}, "device: 'H200', now 'none'"),
        ("versions", {"vllm": "1"}, "versions: vllm '1', now '0'"),
    ):
        out.write_text(json.dumps({**result, key: value}))
        with pytest.raises(SystemExit, match=said):
            run("--variants", "stock", "--merge")
