"""Run a program in a process of its own where vLLM loads no plugin."""

from __future__ import annotations

import os
import subprocess
import sys

import torch


def run_stock(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the Python source `program` with `arguments` and without METok; its output is captured."""
    variables = {
        "VLLM_PLUGINS": "",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if not torch.cuda.is_available():
        variables["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=False)
