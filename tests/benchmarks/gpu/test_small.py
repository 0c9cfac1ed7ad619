"""The whole report in its smallest form, for real: kernels in the interpreter, a tiny model in the engine."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.paths import ROOT
from benchmarks.gpu.stages import SMALL
from benchmarks.kernels.cases import cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one call leaves, started as the Makefile starts it."""
    out = tmp_path_factory.mktemp("report") / "out"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" s  ok\n") == len(SMALL)
    return out


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_every_stage_ends_well(page: str) -> None:
    table = page.split("## Stages")[1]
    assert re.findall(r"^\| (\S+) \| .* \| ok \| \d+ \|", table, re.MULTILINE) == list(SMALL)
    assert "###" not in table


def test_tables_hold_numbers(page: str) -> None:
    figure = r"\d+\.\d+"
    for variant in ("stock", "metok-paper"):
        first = rf"^\| {variant} \| first after start \| {figure} \|"
        level = rf"^\| {variant} \| 1( \| {figure}){{4}} \| \d+ requests, "
        whole = rf"^\| {variant}( \| {figure}){{8}} \|$"  # from the file to the first token
        parts = rf"^\| {variant} \| (until the first token|a decode step)( \| {figure}){{12}} \|$"
        for pattern, count in ((first, 1), (level, 1), (whole, 1), (parts, 2)):
            assert len(re.findall(pattern, page, re.MULTILINE)) == count, (variant, pattern)
    for concurrency in (1, 2):
        assert re.search(rf"^\| metok-paper \| {concurrency}( \| {figure}){{5}} \|$", page, re.MULTILINE)
    (fewer,) = re.findall(r"^\| Requests in the same KV memory \|.*\| ([\d.]+) times \|", page, re.MULTILINE)
    assert float(fewer) > 1, "METok holds less KV, on any machine"
    assert "not judged: no GPU" in page
    assert "| Decode step, 32 requests | shorter than stock's | not measured |" in page


def test_figures_are_those_of_the_results(folder: Path, page: str) -> None:
    result = json.loads((folder / "results" / "engine-tiny.json").read_text())
    assert set(result["variants"]) == {"stock", "metok-paper"}, "two stages, one file"
    paper = result["variants"]["metok-paper"]
    assert f"| {paper['first_request']['ttft_ms']:.1f} |" in page
    assert paper["breakdown"]["prefill_ms"]["scoring"] > 0
    assert paper["levels"][1]["decode_steps"] > 0
    assert result["commit"] in page


def test_every_kernel_was_checked(folder: Path) -> None:
    import torch

    with (folder / "results" / "kernels-gpu.csv").open(newline="") as file:
        checked = [row["op"] for row in csv.DictReader(file)]
    assert checked == [case.op for case in cases(True, torch.device("cpu"))]


def test_plots_are_there(folder: Path, page: str) -> None:
    pictures = re.findall(r"!\[.*\]\((.*)\)", page)
    assert pictures == ["results/engine-tiny-load.png", "results/engine-tiny-request.png"]
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
