"""Offsets past 2^31: real data there, read and written by every kernel (`far_offsets.py`).

Two more proofs elsewhere: `test_deep_slots` has slot numbers past 2^31, and `test_compile` finds no pointer
addition of less than 64 bits in the compiled code of any kernel.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.kernels.common import ROOT, plain_environment

pytestmark = pytest.mark.no_gpu  # the memory is the host's
CASES = 13


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse anonymous memory")
def test_data_past_2_to_the_31() -> None:
    program = ROOT / "tests" / "support" / "kernels" / "far_offsets.py"
    done = subprocess.run(
        [sys.executable, str(program)], env=plain_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit {done.returncode} after:\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stdout.count("ok ") == CASES, done.stdout
