"""`benchmarks/gpu`: what a day with a GPU calls is there and takes its arguments,
and its short form runs on a CPU.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.paths import ROOT
from benchmarks.engine import cli
from benchmarks.engine.report import summarise
from benchmarks.engine.variants import variants
from benchmarks.gpu import gpu_bench
from benchmarks.kernels import cases
from benchmarks.kernels import cli as kernels_cli

COMMIT = "1234abc"

# Stands for Python on the GPU machine: notes what it is asked to do, and fails where $BROKEN says so.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != -c ] || exit 0
printf '%q ' "$@" >>"$RECORD"
echo >>"$RECORD"
case "$BROKEN $*" in
    engine*benchmarks.engine*--engine*) ;;
    engine*benchmarks.engine*) echo 'no such kernel'; exit 1 ;;
    FA3*gpu_smoke.py*lib*) echo 'FA3 prefill, 28/4 heads of 128: relative error 1.00e+00 WRONG (limit 0.01)'; exit 1 ;;
esac
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The repository as it lies on the GPU machine: no `.git`, and `.whl/` as the kit's builder fills it."""
    folder = tmp_path / "repository"
    leave = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=leave)  # copied: it looks for its own root
    for name in ("tests", "kernels", "metok_vllm", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".whl").mkdir()
    for name in ("gpu_day.sh", "gpu_bench.py", "gpu_smoke.py"):
        shutil.copy(folder / "benchmarks" / "gpu" / name, folder / ".whl" / name)
    (folder / ".whl" / "COMMIT").write_text(COMMIT + "\n")
    for name in ("code", "libs"):
        with tarfile.open(folder / ".whl" / f"{name}.tar.xz", "w:xz") as archive:
            archive.addfile(tarfile.TarInfo(f"{name}.txt"), io.BytesIO())
    return folder


def run(root: Path, *arguments: str, script: str = ".whl", **environment: str) -> str:
    """What the day prints, run from the folder `script`; all that it writes goes beside `root`."""
    places = {name: str(root.parent / name.lower()) for name in ("WORK", "SITE", "OUT")}
    done = subprocess.run(
        ["bash", str(root / script / "gpu_day.sh"), *arguments],
        env={**os.environ, **places, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def calls(root: Path, broken: str = "") -> tuple[str, list[list[str]]]:
    """What a whole day prints, and every call of Python in it, with a stand-in for Python."""
    stand_in, record = root.parent / "python", root.parent / "record"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    printed = run(root, PY=str(stand_in), RECORD=str(record), BROKEN=broken)
    return printed, [shlex.split(line) for line in record.read_text().splitlines()]


def engines(made: list[list[str]]) -> list[Any]:
    """The command lines of the engine benchmark among the calls, as it reads them itself."""
    return [cli.arguments(call[2:]) for call in made if call[:2] == ["-m", "benchmarks.engine"]]


def test_every_stage_calls_what_is_there(root: Path) -> None:
    printed, made = calls(root)
    assert "not run:" not in printed
    assert printed.count(" s  ok\n") == 2 * 13  # as they end, and in the summary
    known = {variant.name for variant in variants(64, 27)}
    for call in engines(made):
        assert call.one_engine
        assert call.no_plots
        assert set(call.variants or known) <= known
    assert [(call.model, call.eager, call.variants, call.out.name) for call in engines(made)] == [
        ("tiny", True, None, "engine-tiny.json"),
        ("7b", True, ["stock", "metok-paper"], "engine-7b-eager.1.json"),
        ("7b", False, ["metok-paper"], "engine-7b.1.json"),
        ("7b", False, ["stock"], "engine-7b.2.json"),
        ("7b", True, ["metok-balanced", "fewer-frames"], "engine-7b-eager.2.json"),
        ("0.5b", True, ["stock", "metok-paper"], "engine-0.5b-eager.json"),
    ]
    # The breakdown of the graphs' runs is that of the eager one, which must have left it in the same folder.
    assert len({call.work for call in engines(made) if call.model == "7b"}) == 1
    measured = [call[2:] for call in made if call[0].endswith("gpu_bench.py") and call[1] == "kernels"]
    assert [(Path(out).name, kernels_cli.arguments(rest).no_compile) for out, *rest in measured] == [
        ("kernels-gpu.csv", True),
        ("kernels-gpu-compile.csv", False),
    ]
    tests = [call for call in made if call[:2] == ["-m", "pytest"]]
    assert len(tests) == 2
    for call in tests:
        (path,) = (word for word in call if word.startswith("tests/"))
        assert (ROOT / path).exists(), path
        chosen = [word for flag in ("-m", "-k") if flag in call[2:] for word in call[call.index(flag, 2) :][:2]]
        found = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--collect-only", "--strict-markers", *chosen, path],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        names = {line.split("::")[0] for line in found.stdout.splitlines() if "::" in line}
        if path.endswith(".py"):
            assert found.stdout.count("::") == 1, found.stdout
        else:  # a module a kernel, and no other
            operations = dict.fromkeys(case.op for case in cases.cases(True, torch.device("cpu")))
            assert names == {f"{path}/test_{operation}.py" for operation in operations}


def test_an_engine_that_fails_is_tried_without_what_may_be_broken(root: Path) -> None:
    printed, made = calls(root, broken="engine")
    assert "engine-tiny again" in printed
    first, again, *later = engines(made)
    assert first.engine == {}
    assert first.out == again.out
    assert again.engine["attention_backend"] == "TRITON_ATTN"
    assert again.engine["compilation_config"] == {"custom_ops": ["none"]}
    assert [call.engine for call in later] == [again.engine] * 5
    assert "engines ran with" in (root.parent / "out" / "summary.txt").read_text()


def test_without_flash_attention_no_engine_takes_it(root: Path) -> None:
    printed, made = calls(root, broken="FA3")
    assert "smoke-lib" in printed
    assert "FAILED (1)" in printed
    assert {json.dumps(call.engine) for call in engines(made)} == {
        '{"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}'
    }


def test_a_second_call_goes_on_and_named_stages_run_again(root: Path) -> None:
    calls(root)
    record = root.parent / "record"
    options = {"PY": str(root.parent / "python"), "RECORD": str(record), "BROKEN": ""}
    record.unlink()
    run(root, "200", **options)
    assert not record.exists()
    run(root, "200", "smoke-llm", **options)
    assert [line.split()[1] for line in record.read_text().splitlines()] == ["llm"]
    record.unlink()
    assert "skipped: needs 83 s" in run(root, "60", "7b-graphs-stock", **options)
    assert not record.exists()


def test_its_short_form_runs(root: Path) -> None:
    """Installation, METok's operations and all kernels; results come back and say which code they are of."""
    printed = run(root, "400", "install", "smoke-lib", "kernels", DRY="1", PY=sys.executable)
    assert printed.count(" s  ok\n") == 6, printed
    assert "METok pool_video: relative error" in printed
    with tarfile.open(root.parent / "out" / "results.tar.gz") as archive:
        file = archive.extractfile("results/kernels-gpu.csv")
        assert file is not None
        rows = list(csv.DictReader(io.TextIOWrapper(file)))
    assert {row["op"] for row in rows} == {case.op for case in cases.cases(True, torch.device("cpu"))}
    assert {row["commit"] for row in rows} == {COMMIT}
    site = root.parent / "site"
    assert (site / "code.txt").exists()
    assert (site / "libs.txt").exists()
    (installed,) = distributions(path=[str(site)])
    (plugin,) = installed.entry_points
    assert (plugin.group, plugin.name) == ("vllm.general_plugins", "metok")
    assert callable(plugin.load())


def test_where_vllm_is_installed_it_runs_from_the_repository(root: Path) -> None:
    shutil.rmtree(root / ".whl")
    printed = run(root, "100", "install", script="benchmarks/gpu", DRY="1", PY=sys.executable, METOK_COMMIT="fedcba9")
    assert printed.startswith("commit fedcba9, ")
    assert printed.count(" s  ok\n") == 2, printed


def result(raw: dict[str, Any], *names: str, device: str = "H100") -> dict[str, Any]:
    return {
        "command": f"python {names}", "workload": {"frames": 64}, "hardware": {"device": device}, "versions": {},
        "variants": {name: summarise(raw) for name in names}, "ratios_to_stock": {},
    }  # fmt: skip


def test_what_was_measured_in_two_calls_is_one_result(raw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first, second, out = (tmp_path / name for name in ("1.json", "2.json", "out.json"))
    first.write_text(json.dumps(result(raw(2.0), "stock")))
    assert gpu_bench.merge(str(out), str(first), str(second)) == 0  # the second may not have run
    second.write_text(json.dumps(result(raw(1.0), "metok-paper")))
    assert gpu_bench.merge(str(out), str(first), str(second)) == 0
    merged = json.loads(out.read_text())
    assert list(merged["variants"]) == ["stock", "metok-paper"]
    assert merged["ratios_to_stock"]["metok-paper"]["language_model_prefill"] == 2
    assert merged["command"] == "python ('stock',) ; python ('metok-paper',)"


def test_different_machines_are_not_merged(raw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("1.json", "2.json")]
    for path, device in zip(paths, ("H100", "H200"), strict=True):
        path.write_text(json.dumps(result(raw(), "stock", device=device)))
    out = tmp_path / "out.json"
    assert gpu_bench.merge(str(out), *map(str, paths)) == 1
    failed = result(raw(), "stock")
    failed["variants"] = {"stock": {"error": "out of memory"}}
    paths[0].write_text(json.dumps(failed))
    assert gpu_bench.merge(str(out), str(paths[0])) == 1
    assert not out.exists()


def test_a_kernel_that_cannot_run_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whole = kernels_cli.main

    def main(arguments: list[str]) -> int:
        if "tiered_pool" in arguments:
            raise RuntimeError("no such kernel")
        return whole(arguments)

    monkeypatch.setattr(kernels_cli, "main", main)
    out = tmp_path / "kernels.csv"
    assert gpu_bench.kernels(str(out), "--small", "--interpret") == 1
    with out.open(newline="") as file:
        ran = {row["op"] for row in csv.DictReader(file)}
    assert ran == {case.op for case in cases.cases(True, torch.device("cpu"))} - {"tiered_pool"}
