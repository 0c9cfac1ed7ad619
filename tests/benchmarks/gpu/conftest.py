"""A stand-in for Python, so that all stages can be called on any machine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import cli

# Notes what it is asked to do, and fails where $BROKEN says so.
STAND_IN = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$RECORD"
echo >>"$RECORD"
case "$BROKEN $*" in
    engine*benchmarks.engine*custom_ops*) ;;
    engine*benchmarks.engine*|always*benchmarks.engine*) echo 'no such kernel'; exit 1 ;;
    FlashAttention*gpu_smoke.py*lib*) echo 'FlashAttention 3 prefill, 28/4 heads: relative error 1.00e+00 WRONG'; exit 1 ;;
    vllm*gpu_smoke.py*llm*) exit 1 ;;
    llm*gpu_smoke.py*llm*) [ "$SMOKE" = safe ] || exit 1 ;;
    machine*benchmarks.gpu.machine*) echo 'there is no GPU here'; exit 2 ;;
esac
"""

Calls = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """`calls(*arguments, broken=...)`: the program's exit code, and what it would have run."""
    stand_in, record = tmp_path / "python", tmp_path / "record"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    monkeypatch.setenv("RECORD", str(record))

    def call(*arguments: str, broken: str = "") -> tuple[int, list[list[str]]]:
        record.write_text("")
        monkeypatch.setenv("BROKEN", broken)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(stand_in))
            code = cli.main(["--no-plots", "--out", str(tmp_path / "out"), *arguments])
        return code, [shlex.split(line) for line in record.read_text().splitlines()]

    return call


@pytest.fixture
def states(tmp_path: Path) -> Callable[[], dict[str, str]]:
    """How each stage ended, from what was noted."""
    return lambda: {path.stem: json.loads(path.read_text())["result"] for path in (tmp_path / "out/state").glob("*")}
