"""A judge that shares code with the judged would share its mistakes."""

from __future__ import annotations

import subprocess
import sys


def test_the_oracle_imports_nothing_of_the_project():
    program = (
        "import sys, tests.oracle\n"
        "ours = {'metok_vllm', 'metok_kernels', 'vllm'}\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ours))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
