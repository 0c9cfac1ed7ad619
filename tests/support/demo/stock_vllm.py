"""Run a program in a process of its own where vLLM loads no plugin."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

import torch

from tests.support.server import warm


def run_stock(program: str, *arguments: str) -> CompletedProcess[str]:
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
    with TemporaryDirectory() as name:
        script, out, errors = (Path(name, part) for part in ("program.py", "out", "errors"))
        script.write_text(program)
        running = warm.start(script, *arguments, env=os.environ | variables, log=out, errors=errors)
        return CompletedProcess(arguments, running.wait(), out.read_text(), errors.read_text())
