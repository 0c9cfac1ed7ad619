"""The goals, and what a folder of results says of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.folder import Folder
from benchmarks.gpu.stages import PRUNED, tiny_of

POINT = "one H200, LLaVA-OneVision 7B, 64 frames, about 200 text tokens, vLLM's default mode"
STAGE_1_KERNELS = ("event_similarity", "tiered_pool")


@dataclass(frozen=True)
class Results:
    """What the figures are taken from; each empty where its stage left nothing."""

    default: dict[str, Any]
    """The engine benchmark's result in vLLM's default mode."""
    eager: dict[str, Any]
    kernels: list[dict[str, str]]
    """Rows of the kernel benchmark: those with torch.compile's column where there are any."""
    pruned: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The engine benchmark's results beside vLLM's own pruning, by the model's name."""

    @classmethod
    def of(cls, folder: Folder, model: str) -> Results:
        def engine(mode: str, model: str = model) -> dict[str, Any]:
            path = folder.engine(model, mode)
            found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            return found

        rows: list[dict[str, str]] = []
        for path in folder.kernels:
            if path.exists():
                with path.open(newline="") as file:
                    # The later file's rows of an operation take the place of the earlier one's.
                    later = list(csv.DictReader(file))
                    rows = [row for row in rows if row["op"] not in {new["op"] for new in later}] + later
        pruned = {name: engine("", name) for one in PRUNED for name in (one, tiny_of(one))}
        return cls(engine(""), engine("eager"), rows, {name: found for name, found in pruned.items() if found})


def measured(result: dict[str, Any], variant: str) -> dict[str, Any]:
    """A variant's figures, or nothing where it failed or was not run."""
    entry: dict[str, Any] = result.get("variants", {}).get(variant, {})
    return entry if "levels" in entry else {}


def level(result: dict[str, Any], concurrency: int) -> dict[str, Any]:
    """The ratios of `metok-paper` to stock with so many requests at a time."""
    levels = result.get("ratios_to_stock", {}).get("metok-paper", {}).get("levels", [])
    return next((one for one in levels if one["concurrency"] == concurrency), {})


def _paper(key: str) -> Callable[[Results], float | None]:
    def found(results: Results) -> float | None:
        value: float | None = results.default.get("ratios_to_stock", {}).get("metok-paper", {}).get(key)
        return value

    return found


def _step(concurrency: int) -> Callable[[Results], float | None]:
    """METok's decode step as a multiple of stock's."""

    def found(results: Results) -> float | None:
        ratio = level(results.default, concurrency).get("decode_step")
        return 1 / ratio if ratio else None

    return found


def _scoring(results: Results) -> float | None:
    share: float | None = measured(results.default, "metok-paper").get("breakdown", {}).get("scoring_share")
    return share


def _share_of_copy(op: str) -> Callable[[Results], float | None]:
    """The lowest of an operation's cases."""

    def found(results: Results) -> float | None:
        rows = [row for row in results.kernels if row["op"] == op and row["implementation"] == "metok"]
        shares = [float(row["share_of_copy"]) for row in rows if row["share_of_copy"]]
        return min(shares) if shares else None

    return found


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    what: str
    target: str
    figure: Callable[[Results], float | None]
    met: Callable[[float], bool]
    show: str = "{:.2f} times"
    source: str = ""
    """Where the figure is in the results."""


GOALS = (
    Goal("Prefill of the language model", "5 times as fast as stock or more", _paper("language_model_prefill"),
         lambda ratio: ratio >= 5, source="breakdown: layers, scoring, rest of the model"),
    Goal("First token, without processing of the frames", "2.4 times as fast as stock or more",
         lambda results: level(results.default, 1).get("ttft"), lambda ratio: ratio >= 2.4,
         source="one request at a time, p50"),
    Goal("Decode step, one request", "1.05 times stock's or less", _step(1), lambda ratio: ratio <= 1.05,
         source="steps that only decode, p50"),
    Goal("Decode step, 32 requests", "shorter than stock's", _step(32), lambda ratio: ratio < 1,
         source="steps in which 32 requests decode and none is in prefill, p50"),
    Goal("Requests in the same KV memory", "12 times stock's or more", _paper("kv_capacity"), lambda ratio: ratio >= 12,
         source="blocks that the scheduler gave"),
    *(Goal(f"Kernel `{op}`", "80 % of the measured copy bandwidth or more", _share_of_copy(op),
           lambda share: share >= 0.8, "{:.1%}", "its slowest case") for op in STAGE_1_KERNELS),
    Goal("Scoring and selection", "under 3 % of METok's prefill", _scoring, lambda share: share < 0.03, "{:.1%}",
         "breakdown, of the language model's time"),
)  # fmt: skip


def rows(results: Results, gpu: bool) -> list[tuple[str, str, str, str, str]]:
    """What, goal, measured, met or not, source; without a GPU a time says nothing, and is not judged."""
    table = []
    for goal in GOALS:
        figure = goal.figure(results)
        shown = "not measured" if figure is None else goal.show.format(figure)
        if figure is None:
            verdict = ""
        elif not gpu:
            verdict = "not judged: no GPU"
        else:
            verdict = "met" if goal.met(figure) else "**not met**"
        table.append((goal.what, goal.target, shown, verdict, goal.source))
    return table
