"""Every kernel and configuration in use compiles for sm_80 and sm_90, without spills, within shared memory.

The interpreter hides compile errors; this finds them without a GPU. It runs in a process of its own, because
kernels imported there must not be interpreted.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from metok_kernels.aot import SHARED_LIMIT, Usage
from metok_kernels.launch import Launch
from metok_kernels.select_per_event.launch import prepare
from metok_kernels.variants import SPILL_BOUND, narrow_addresses, problems, variants

from tests.support.kernels.common import ROOT, plain_environment, run_python

pytestmark = pytest.mark.no_gpu


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """One report a compiled kernel and chip."""
    done = subprocess.run(
        [sys.executable, "-m", "metok_kernels.variants"],
        env=plain_environment(), capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.stdout, f"exit {done.returncode}:\n{done.stderr[-3000:]}"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    failed = any(row["problems"] for row in rows)
    assert done.returncode == int(failed), f"exit {done.returncode} after {rows[-1]}:\n{done.stderr[-3000:]}"
    return rows


def test_every_variant_compiles_without_problems(reports: list[dict[str, Any]]) -> None:
    assert [problem for row in reports for problem in row["problems"]] == []
    assert len(reports) == sum(len(variant.capabilities) for variant in variants())


def test_spills_and_shared_memory(reports: list[dict[str, Any]]) -> None:
    """The bounds again, from the figures themselves; half-precision kernels must not spill at all."""
    for row in reports:
        assert row["spills"] <= (SPILL_BOUND if "float32" in row["variant"] else 0), row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row
        assert 0 < row["registers"] <= 255, row


def test_every_kernel_is_compiled_for_both_chips(reports: list[dict[str, Any]]) -> None:
    """No kernel in the sources is missing from the variants; kernels are the functions named `*_kernel`."""
    kernels = set()
    for path in (ROOT / "kernels" / "metok_kernels").glob("*/kernel.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        kernels |= {node.name for node in functions if node.name.endswith("_kernel")}
    assert len(kernels) >= 10
    for capability in (80, 90):
        assert {row["kernel"] for row in reports if row["capability"] == capability} == kernels


GOOD_LINES = """
%0 = tt.addptr %p, %c1_i64 : !tt.ptr<i32>, i64 loc(#loc1)
%1 = tt.addptr %q, %o : tensor<64x64x!tt.ptr<bf16>>, tensor<64x64xi64> loc(#loc2)
"""
BAD_LINE = "%2 = tt.addptr %q, %o : tensor<64x!tt.ptr<i64>>, tensor<64xi32> loc(#loc3)"


def test_the_checks_find_what_they_look_for() -> None:
    assert narrow_addresses(GOOD_LINES) == []
    assert narrow_addresses(GOOD_LINES + BAD_LINE) == [BAD_LINE]
    assert problems("x", Usage("k", 90, 255, SPILL_BOUND, SHARED_LIMIT[90], GOOD_LINES)) == []
    assert "spills 65 bytes" in problems("x", Usage("k", 90, 255, 65, 0, ""))[0]
    assert "shared memory" in problems("x", Usage("k", 80, 32, 0, SHARED_LIMIT[80] + 1, ""))[0]
    assert "32 bits" in problems("x", Usage("k", 80, 32, 0, 0, BAD_LINE))[0]


def test_a_launch_refuses_a_device_it_cannot_run_on() -> None:
    """CPU tensors need the interpreter, `meta` ones run nowhere; the message says what to do."""
    meta = torch.device("meta")
    length = torch.zeros(1, dtype=torch.int32, device=meta)
    launch = prepare(torch.zeros(9, device=meta), length, length, 9)[0]
    with pytest.raises(RuntimeError, match="on 'meta': move them to a GPU, call the operation's `reference`"):
        launch.run()


def test_a_launch_refuses_a_grid_cuda_cannot_start(device: torch.device) -> None:
    launch = Launch(None, (1, 65536, 1), {"p": torch.zeros(1, device=device)})
    with pytest.raises((ValueError, RuntimeError), match=r"too large|move them to a GPU"):
        launch.run()


def test_compiled_kernels_refuse_cpu_tensors() -> None:
    """Without the interpreter, a CPU tensor is an error with a way out, not a crash."""
    code = (
        "import torch; from metok_kernels.gather_rows import gather_rows\n"
        "try: gather_rows(torch.zeros(1).long(), torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2).long())\n"
        "except RuntimeError as error: print('refused:', error)"
    )
    done = run_python(code)
    assert done.stdout.startswith("refused: a Triton kernel was given tensors on 'cpu'"), done.stderr
