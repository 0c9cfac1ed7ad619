"""What is run on a machine with a GPU, the most valuable first. This is the only list of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.folder import Folder

PUBLISHED = "7b"
SMOKE = "benchmarks/gpu/gpu_smoke.py"
FRAMES, TEXT_TOKENS, CONCURRENCY = 64, 200, "1,32"

PRUNED = ("qwen2.5-vl-7b", "qwen3-vl-8b")
"""Models that vLLM can prune itself."""
PRUNED_FRAMES, PRUNED_CONCURRENCY = 128, "1,8,32"
"""Frames come in pairs: as many grids as `FRAMES` are."""

TINY = (
    "--model", "tiny", "--frames", "8", "--concurrency", "1,2", "--requests", "2", "--repeats", "1", "--videos", "1",
    "--text-tokens", "30", "--max-tokens", "4",
)  # fmt: skip
"""The engine benchmark at its smallest, for a CPU."""

SMALL = ("machine", "smoke-lib", "default-stock", "default-paper", "kernel-tests", "kernels")
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
    adds_to: Path | None = None
    """A file that it appends to, and that must be new."""

    @property
    def starts_engines(self) -> bool:
        """Whether it takes the engine benchmark's options."""
        return self.command[:2] == ("-m", "benchmarks.engine")


def stages(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
    """All stages in their order; with `small` each in a form that a CPU can run, and `model` is not used."""
    yield Stage("machine", "the card and the versions", ("-m", "benchmarks.gpu.machine", str(folder.machine)), 5, 60)
    yield from _does_it_run(folder, small)
    yield from _headline(folder, small, model)
    yield from _correct(folder, small)
    if model == PUBLISHED:
        yield from _pruned(folder, small)
    yield from _rest(folder, small, model)
    yield Stage("kernels-compile", "each kernel beside torch.compile too", _kernels(folder.kernels[1], small), 60, 240,
                adds_to=folder.kernels[1])  # fmt: skip


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", *arguments)


def _kernels(out: Path, small: bool) -> tuple[str, ...]:
    return ("-m", "benchmarks.kernels", *(("--small", "--interpret") if small else ()), "--out", str(out))


def _engine(out: Path, work: Path, *arguments: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.engine", "--no-plots", "--out", str(out), "--work", str(work), *arguments)


def _does_it_run(folder: Folder, small: bool) -> Iterator[Stage]:
    """What every engine needs, the cheapest first: `benchmarks.gpu.fallback` looks at how these end."""
    yield Stage(
        "smoke-lib", "vLLM's compiled operators and METok's operations", (SMOKE, *([] if small else ["lib"]), "metok"),
        30, 90, {"METOK_KERNELS": "triton"} if small else {},
    )  # fmt: skip
    yield Stage("smoke-llm", "a small language model, without METok", (SMOKE, "llm"), 30, 80)
    yield Stage(
        "engine-tiny", "METok's engine on the tiny model, eager",
        _engine(folder.tiny, folder.work / "tiny", *_tiny(small), "--eager", "--variants", "metok-paper"), 40, 120,
    )  # fmt: skip


def _tiny(small: bool) -> tuple[str, ...]:
    return TINY if small else ("--small",)


def _at_size(
    folder: Folder, small: bool, model: str, name: str, variants: str, mode: str, least: int, most: int
) -> Stage:
    """Whole requests at size, of a variant or two: a start takes long, and may fail."""
    out = folder.engine("tiny" if small else model, mode)
    size = ("--frames", str(FRAMES), "--text-tokens", str(TEXT_TOKENS), "--concurrency", CONCURRENCY, "--repeats", "3")
    workload = TINY if small else ("--model", model, *size)
    command = _engine(out, folder.work / (mode or "default"), *workload, *(["--eager"] if mode else []))
    what = f"whole requests, {mode or 'default mode'}: {variants.replace(',', ', ')}"
    return Stage(name, what, (*command, "--merge", "--variants", variants), least, most)


def _headline(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
    """What the goals are about.

    METok took 172 s on an H200 on 2026-11-28: 124 to start, the rest for requests and breakdown.
    """
    yield _at_size(folder, small, model, "default-stock", "stock", "", 150, 280)
    yield _at_size(folder, small, model, "default-paper", "metok-paper", "", 150, 280)


def _pruned(folder: Folder, small: bool) -> Iterator[Stage]:
    """METok beside vLLM's own pruning: for each model the three that matter most, then the others."""
    others = {"qwen2.5-vl-7b": (), "qwen3-vl-8b": (("vidcom2", "vidcom2-mean,vidcom2-stage1"),)}
    for model in PRUNED:
        name = model.split("-")[0]
        yield _beside_pruning(folder, small, model, f"{name}-stock", "stock", 150, 280)
        yield _beside_pruning(folder, small, model, f"{name}-evs", "evs-mean", 150, 280)
        yield _beside_pruning(folder, small, model, f"{name}-paper", "metok-paper", 150, 280)
        for short, variants in (*others[model], ("more", "evs-stage1,metok-balanced"), ("fewer", "fewer-frames")):
            both = "," in variants
            yield _beside_pruning(folder, small, model, f"{name}-{short}", variants, 240 if both else 150,
                                  500 if both else 280)  # fmt: skip


def _beside_pruning(folder: Folder, small: bool, model: str, name: str, variants: str, least: int, most: int) -> Stage:
    """Whole requests of a model that vLLM can prune itself, of a variant or two, into one file a model."""
    used = tiny_of(model) if small else model
    size = ("--frames", str(PRUNED_FRAMES), "--text-tokens", str(TEXT_TOKENS), "--concurrency", PRUNED_CONCURRENCY,
            "--repeats", "3")  # fmt: skip
    command = _engine(folder.engine(used), folder.work / "pruned", *(TINY if small else size), "--model", used)
    what = f"beside vLLM's own pruning, {model}: {variants.replace(',', ', ')}"
    return Stage(name, what, (*command, "--merge", "--variants", variants), least, most)


def tiny_of(model: str) -> str:
    """The tiny model of one of `PRUNED`'s family."""
    return model.rpartition("-")[0] + "-tiny"


def _correct(folder: Folder, small: bool) -> Iterator[Stage]:
    """Kernels and engines against what they must give, and kernels against the clock."""
    tests = "tests/unit/kernels/test_gather_rows.py" if small else "tests/unit/kernels"
    # Each kernel compiles for each shape: that is a CPU's work, and several do it side by side.
    spread = () if small or find_spec("xdist") is None else ("-n", "8")
    yield Stage("kernel-tests", "every kernel against its reference", _pytest("-m", "not no_gpu", *spread, tests), 30,
                150)  # fmt: skip
    strict = ("--no-breakdown", "--variants", "stock,metok-paper",
              "--engine-option", json.dumps({"jit_monitor_mode": "error"}))  # fmt: skip
    yield Stage(
        "quiet", "default mode, tiny model: a step that waits for the GPU or compiles is an error",
        _engine(folder.results / "engine-quiet.json", folder.work / "quiet", *_tiny(small), *strict), 100, 250,
        {"VLLM_GPU_SYNC_CHECK": "error"},
    )  # fmt: skip
    exact = {"TRITON_INTERPRET": "1"} if small else {"TRITON_INTERPRET": "0", "TRITON_F32_DEFAULT": "ieee"}
    yield Stage("engine-oracle", "METok's engine in float32 against the oracle",
                _pytest("tests/engine/test_oracle.py", "-k", "mixed_batch and grouped"), 45, 120, exact)  # fmt: skip
    yield Stage("qwen-oracle", "the same of Qwen2.5-VL, with its rotary positions of three axes",
                _pytest("tests/engine/test_qwen.py", "-k", "mixed_batch and 5-vl"), 45, 120, exact)  # fmt: skip
    yield Stage("kernels", "each kernel beside plain torch", (*_kernels(folder.kernels[0], small), "--no-compile"), 30,
                120, adds_to=folder.kernels[0])  # fmt: skip


def _rest(folder: Folder, small: bool, model: str) -> Iterator[Stage]:
    """Other variants, modes and sizes."""
    yield _at_size(folder, small, model, "eager", "stock,metok-paper", "eager", 150, 400)
    yield _at_size(folder, small, model, "default-more", "metok-balanced,fewer-frames", "", 240, 500)
    yield _at_size(folder, small, model, "eager-more", "metok-balanced,fewer-frames", "eager", 150, 400)
    if model == PUBLISHED:
        yield _at_size(folder, small, "0.5b", "0.5b", "stock,metok-paper", "eager", 100, 300)
