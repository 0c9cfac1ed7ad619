"""What is compared: stock vLLM, stock vLLM with fewer frames, vLLM's own pruning where the family has it, and
METok's two presets, all on the same frames and prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.engine.families import Family
from benchmarks.engine.models import BenchmarkModel
from benchmarks.engine.pruning import TITLES, Pruning, nearest

PREFILL_STEP = 1024

APPLIES_TO = {
    "evs": "vLLM 0.32 has it for Qwen2.5-VL, Qwen3-VL, Qwen3.5, Nemotron-Nano-VL and Compass only",
    "vidcom2": "vLLM 0.32 has it for the Qwen3-VL family only",
}

POINTS = {"mean": "METok's mean over layers", "stage1": "METok's stage 1"}
"""What vLLM's own pruning is given as many tokens as."""


@dataclass(frozen=True)
class Variant:
    """One way to serve the requests."""

    name: str
    label: str
    frames: int
    metok: dict[str, Any] | None = None  # the server's METok settings; None is stock vLLM
    pruning: Pruning | None = None  # vLLM's own


def not_in_the_run(family: Family) -> dict[str, str]:
    """vLLM's own prunings that the family has not, and why."""
    return {
        f"{title} (--video-pruning-method {method})": f"does not apply: {APPLIES_TO[method]}"
        for method, title in TITLES.items()
        if method not in family.pruning
    }


def frames_at_equal_tokens(frames: int, model: BenchmarkModel) -> int:
    """Frames with which stock vLLM takes nearest to the visual tokens
    that METok's first stage leaves of `frames`.

    That is the baseline's most generous reading: METok goes on to prune inside the language model. Where the
    tower takes frames in pairs, it is a number of pairs.
    """
    target = model.expected(frames).encoded
    at_once = model.family.frames_at_once
    candidates = range(min(at_once, frames), frames + 1, at_once)
    return min(candidates, key=lambda n: abs(model.stock_tokens(n) - target))


def variants(model: BenchmarkModel, frames: int, names: list[str] | None = None) -> list[Variant]:
    """All variants of a model, or those named, in the order in which they are to run.

    Raises:
        ValueError: the family has no variant of a name, or the video is too short for one.
    """
    known: dict[str, Callable[[], Variant]] = {
        "stock": lambda: Variant("stock", "stock vLLM", frames),
        "fewer-frames": lambda: _fewer(model, frames),
        **{
            f"{method}-{point}": partial(_pruned, model, frames, method, point)
            for method in model.family.pruning
            for point in POINTS
        },
        "metok-paper": lambda: Variant("metok-paper", "METok, paper", frames, {"preset": "paper"}),
        "metok-balanced": lambda: Variant("metok-balanced", "METok, balanced", frames, {"preset": "balanced"}),
    }
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"unknown variant {', '.join(unknown)}; for {model.family.title} there are {', '.join(known)}")
    return [known[name]() for name in dict.fromkeys(names or known)]


def _fewer(model: BenchmarkModel, frames: int) -> Variant:
    fewer = frames_at_equal_tokens(frames, model)
    return Variant("fewer-frames", f"stock vLLM, {fewer} frames", fewer)


def _pruned(model: BenchmarkModel, frames: int, method: str, point: str) -> Variant:
    wanted = model.expected_mean(frames) if point == "mean" else model.expected(frames).encoded
    try:
        pruning = nearest(method, wanted, model.family.tokens_per_step(model.grid), model.family.steps(frames))
    except ValueError as error:
        raise ValueError(f"{error}: a video of {frames} frames is too short to compare with METok") from None
    return Variant(f"{method}-{point}", f"{TITLES[method]}, {pruning.tokens} tokens", frames, pruning=pruning)


def prefill_budget(frames: int, model: BenchmarkModel, text: int) -> int:
    """Tokens a step, the same for all variants: enough for stock's whole prompt,
    so that nobody's prompt is cut in two.
    """
    prompt = model.stock_tokens(frames) + model.label_tokens(frames) + text + 256
    return max(8192, -(-prompt // PREFILL_STEP) * PREFILL_STEP)
