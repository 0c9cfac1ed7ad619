"""`gpu_day.sh`: the same on a machine that is lent, where what is missing is brought along."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from benchmarks.common.paths import ROOT

COMMIT = "1234abc"


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


def run(root: Path, *arguments: str, script: str = ".whl", code: int = 0, **environment: str) -> str:
    """What the day prints, run from the folder `script`; all that it writes goes beside `root`."""
    places = {name: str(root.parent / name.lower()) for name in ("WORK", "SITE", "OUT")}
    done = subprocess.run(
        ["bash", str(root / script / "gpu_day.sh"), *arguments],
        env={**os.environ, **places, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_it_unpacks_runs_and_packs(root: Path) -> None:
    printed = run(root, "400", "machine", "kernels", DRY="1", PY=sys.executable)
    assert printed.startswith(f"commit {COMMIT}, 400 s, ")
    assert printed.count(" s  ok\n") == 3, printed  # install, too
    out, site = root.parent / "out", root.parent / "site"
    assert sorted(path.name for path in out.iterdir()) == [
        "install.log", "logs.tar.gz", "report.md", "results.tar.gz", "summary.txt",
    ]  # fmt: skip
    assert [line.split()[0] for line in (out / "summary.txt").read_text().splitlines()] == ["machine", "kernels"]
    with tarfile.open(out / "results.tar.gz") as archive:
        names = archive.getnames()
        machine = archive.extractfile("results/machine.json")
        assert machine is not None
        assert json.load(machine)["commit"] == COMMIT
    assert "results/kernels-gpu.csv" in names
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert {"logs/machine.log", "logs/kernels.log"} <= set(archive.getnames())
    assert (site / "code.txt").exists()
    assert (site / "libs.txt").exists()
    (installed,) = distributions(path=[str(site)])
    (plugin,) = installed.entry_points
    assert (plugin.group, plugin.name) == ("vllm.general_plugins", "metok")
    assert callable(plugin.load())
    again = run(root, "400", "machine", DRY="1", PY=sys.executable)
    assert "install" not in again


def test_where_vllm_is_installed_it_runs_from_the_repository(root: Path) -> None:
    shutil.rmtree(root / ".whl")
    printed = run(root, "100", "machine", script="benchmarks/gpu", DRY="1", PY=sys.executable, METOK_COMMIT="fedcba9")
    assert printed.startswith("commit fedcba9, ")
    assert printed.count(" s  ok\n") == 2, printed


def test_what_cannot_be_unpacked_ends_it(root: Path) -> None:
    (root / ".whl" / "libs.tar.xz").write_bytes(b"half of it")
    printed = run(root, "100", DRY="1", PY=sys.executable, code=1)
    assert "vLLM is not installed and cannot be unpacked" in printed
    assert "ReadError" in printed


def test_it_wants_to_know_which_code_it_is(root: Path) -> None:
    (root / ".whl" / "COMMIT").unlink()
    assert "which code is this?" in run(root, METOK_COMMIT="", code=2)


def test_an_unknown_stage_is_refused(root: Path) -> None:
    assert "no stage kernls" in run(root, "100", "kernls", DRY="1", PY=sys.executable, code=2)
