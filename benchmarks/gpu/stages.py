"""What is run on a machine with a GPU, the most valuable first. This is the only list of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.folder import Folder

PUBLISHED = "7b"
FRAMES, TEXT_TOKENS, CONCURRENCY = 64, 200, "1,32"

TINY = (
    "--model", "tiny", "--frames", "8", "--concurrency", "1,2", "--requests", "2", "--repeats", "1", "--videos", "1",
    "--text-tokens", "30", "--max-tokens", "4",
)  # fmt: skip
"""The engine benchmark at its smallest, for a CPU."""

SMALL = ("machine", "kernel-tests", "smoke-lib", "kernels", "default-paper", "default-stock")
"""The smallest form. Its other stages would run the same programs once more; they can be named."""


@dataclass(frozen=True)
class Stage:
    """A program and its limits, which are those of an H200."""

    name: str
    what: str
    command: tuple[str, ...]
    """Behind the interpreter's name."""
    least: int
    """Seconds; with fewer it is not begun."""
    most: int
    """Seconds; after them it is ended."""
    environment: dict[str, str] = field(default_factory=dict)
    early: bool = False
    """Leaves time for the stage `eager`."""
    adds_to: Path | None = None
    """A file that it appends to, and that must be new."""

    @property
    def starts_engines(self) -> bool:
        """Whether it takes the engine benchmark's options."""
        return self.command[:2] == ("-m", "benchmarks.engine")


def stages(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
    """All stages in their order; with `small` each in a form that a CPU can run, and `model` is not used."""
    yield Stage("machine", "the card and the versions", ("-m", "benchmarks.gpu.machine", str(folder.machine)), 5, 60)
    yield from _single_operations(folder, small)
    yield from _engines(folder, small, model)
    yield Stage("kernels-compile", "each kernel beside torch.compile too", _kernels(folder.kernels[1], small), 60, 240,
                adds_to=folder.kernels[1])  # fmt: skip


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", *arguments)


def _kernels(out: Path, small: bool) -> tuple[str, ...]:
    return ("-m", "benchmarks.kernels", *(("--small", "--interpret") if small else ()), "--out", str(out))


def _engine(out: Path, work: Path, *arguments: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.engine", "--no-plots", "--out", str(out), "--work", str(work), *arguments)


def _single_operations(folder: Folder, small: bool) -> Iterator[Stage]:
    """Does anything run at all, and how fast is each kernel?"""
    tests = "tests/unit/kernels/test_gather_rows.py" if small else "tests/unit/kernels"
    # Each kernel compiles for each shape: that is a CPU's work, and several do it side by side.
    spread = () if small or find_spec("xdist") is None else ("-n", "8")
    yield Stage("kernel-tests", "every kernel against its reference", _pytest("-m", "not no_gpu", *spread, tests), 30,
                150, early=True)  # fmt: skip
    smoke = "benchmarks/gpu/gpu_smoke.py"
    yield Stage(
        "smoke-lib", "vLLM's compiled operators and METok's operations", (smoke, *([] if small else ["lib"]), "metok"),
        30, 90, {"METOK_KERNELS": "triton"} if small else {}, early=True,
    )  # fmt: skip
    yield Stage("smoke-llm", "a small language model, without METok", (smoke, "llm"), 30, 65, early=True)
    tiny = TINY if small else ("--small",)
    yield Stage(
        "engine-tiny", "all variants on the tiny model, eager",
        _engine(folder.tiny, folder.work / "tiny", *tiny, "--eager"), 40, 200, early=True,
    )  # fmt: skip
    yield Stage("kernels", "each kernel beside plain torch", (*_kernels(folder.kernels[0], small), "--no-compile"), 30,
                120, early=True, adds_to=folder.kernels[0])  # fmt: skip
    strict = ("--no-breakdown", "--variants", "stock,metok-paper",
              "--engine-option", json.dumps({"jit_monitor_mode": "error"}))  # fmt: skip
    yield Stage(
        "quiet", "default mode, tiny model: a step that waits for the GPU or compiles is an error",
        _engine(folder.results / "engine-quiet.json", folder.work / "quiet", *tiny, *strict), 60, 150,
        {"VLLM_GPU_SYNC_CHECK": "error"}, early=True,
    )  # fmt: skip


def _engines(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
    """Whole requests at size, a variant or two at a time: a start takes long, and may fail."""
    size = ("--frames", str(FRAMES), "--text-tokens", str(TEXT_TOKENS), "--concurrency", CONCURRENCY, "--repeats", "3")

    def at_size(name: str, variants: str, mode: str, least: int, most: int) -> Stage:
        out = folder.engine("tiny" if small else model, mode)
        workload = TINY if small else ("--model", model, *size)
        command = _engine(out, folder.work / (mode or "default"), *workload, *(["--eager"] if mode else []))
        what = f"whole requests, {mode or 'default mode'}: {variants.replace(',', ', ')}"
        return Stage(name, what, (*command, "--merge", "--variants", variants), least, most)

    yield at_size("eager", "stock,metok-paper", "eager", 60, 300)
    exact = {"TRITON_INTERPRET": "1"} if small else {"TRITON_INTERPRET": "0", "TRITON_F32_DEFAULT": "ieee"}
    yield Stage("engine-oracle", "METok's engine in float32 against the oracle",
                _pytest("tests/engine/test_oracle.py", "-k", "mixed_batch and grouped"), 45, 120, exact)  # fmt: skip
    yield Stage("qwen-oracle", "the same of Qwen2.5-VL, with its rotary positions of three axes",
                _pytest("tests/engine/test_qwen.py", "-k", "mixed_batch and 5-vl"), 45, 120, exact)  # fmt: skip
    yield at_size("default-paper", "metok-paper", "", 75, 240)
    yield at_size("default-stock", "stock", "", 75, 240)
    yield at_size("default-more", "metok-balanced,fewer-frames", "", 120, 400)
    yield at_size("eager-more", "metok-balanced,fewer-frames", "eager", 60, 300)
    if model == PUBLISHED:
        workload = TINY if small else ("--model", "0.5b", *size)
        yield Stage(
            "0.5b", "whole requests of a smaller model, eager",
            _engine(folder.engine("0.5b", "eager"), folder.work / "0.5b", *workload, "--eager", "--variants",
                    "stock,metok-paper"), 60, 200,
        )  # fmt: skip
