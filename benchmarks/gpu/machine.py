"""Which machine this is: `python -m benchmarks.gpu.machine OUT.json`.
Says in one sentence why it cannot be used, where that is so.

A process of its own, so that the one that starts all stages holds no memory of the GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common.provenance import conditions

QUERY = "name,memory.total,driver_version,power.limit,clocks.max.sm,clocks.max.mem"


def problem() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    for package in ("torch", "vllm"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed for {sys.executable}: pip install -e '.[gpu,dev]' in this checkout"
    import torch

    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU here; the smallest form runs on a CPU: make gpu-report SMALL=1"
    return None


def card() -> str | None:
    """nvidia-smi's line on the first GPU; None where there is no such program or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() or None


def main(out: str) -> int:
    """Write what is known of the machine; 2 where it is of no use."""
    reason = problem()
    if reason:
        print(reason)
        return 2
    import torch

    found = {**conditions(torch.cuda.is_available()), "nvidia_smi": card()}
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(found["nvidia_smi"] or found["hardware"]["device"])
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
