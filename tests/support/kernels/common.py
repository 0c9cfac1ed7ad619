"""Small builders and tolerances shared by the kernel tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parents[3]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

few_examples = settings(
    max_examples=12,
    deadline=None,  # the interpreter's first call of a kernel takes long
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking a failure takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
"""Hypothesis in the interpreter: few examples, the same ones every time."""


def cumulative(lengths: Iterable[int], device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """[0, l0, l0 + l1, ...]."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def ints(*values: int, device: torch.device) -> torch.Tensor:
    """An int32 tensor of the values."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to within one unit in the last place: both computed in float32, then rounded once."""
    ulp = {torch.float32: 2.0**-18, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=ulp, atol=ulp * 1e-2)


def plain_environment() -> dict[str, str]:
    """The environment of a process that compiles its kernels and imports this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    return environment


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, with compiled kernels."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=120)
