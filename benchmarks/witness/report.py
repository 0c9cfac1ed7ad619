"""Shares, paired differences and the plot of the second witness."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.stats import Bootstrap, compare
from benchmarks.witness.model import PACKAGES
from benchmarks.witness.run import FITTED, budgets
from benchmarks.witness.world import FRAMES, KINDS, WIDTH
from metok_vllm.compression import selection

LAYERS = 30


def accuracy_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each method: mean visual tokens and KV, and shares for all questions,
    each kind, and the first token alone.
    """
    boot = Bootstrap([row["video"] for row in rows])
    kinds = np.array([row["kind"] for row in rows])
    slices = {"all": np.ones(len(rows), dtype=np.bool_)} | {kind: kinds == kind for kind in KINDS}
    names = list(rows[0]["methods"])
    right = {name: np.array([all(row["methods"][name]["hits"]) for row in rows]) for name in names}
    first = {name: np.array([row["methods"][name]["hits"][0] for row in rows]) for name in names}
    table = {}
    for name in names:
        stock = None if name == "stock" else right["stock"]
        entry: dict[str, Any] = {
            key: float(np.mean([row["methods"][name][key] for row in rows])) for key in ("tokens", "kv")
        }
        entry["accuracy"] = compare(boot, right[name], stock, slices)
        entry["first_token"] = compare(boot, first[name], None, {"all": slices["all"]})["all"]
        table[name] = entry
    return table


def probe_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares for each layer from which on there is nothing visual, 0 to 30:
    for every row, and for the answer's alone.
    """
    groups = {"word": ["word"], "open": [kind for kind in KINDS if kind != "word"]}
    table: dict[str, Any] = {}
    for name, kinds in groups.items():
        chosen = [row for row in rows if row["kind"] in kinds]
        table[name] = {"n": len(chosen)}
        for mode in ("everywhere", "decoding"):
            shares = [row[mode] for row in chosen if row[mode]]
            table[name][mode] = np.mean(shares, axis=0).tolist() if shares else None
    return table


def write(parts: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the JSON and, beside it, the plot."""
    rows = {part: [row for p in parts if p["part"] == part for row in p["rows"]] for part in ("answers", "probe")}
    limits = budgets(LAYERS)
    report = {
        "command": "python -m benchmarks.witness " + " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "packages": list(PACKAGES),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "seed": options.seed,
        "videos": options.videos,
        "frames": FRAMES,
        "stock_visual_tokens": FRAMES * WIDTH,
        "prune_layers": {"metok": selection.prune_layers(LAYERS), "fitted": FITTED, "of": LAYERS},
        "baseline_tokens": {"mean over layers": limits.mean, "fastv after its cut": limits.fastv},
        "cpu_s": sum(part["cpu_s"] for part in parts),
        "methods": accuracy_table(rows["answers"]),
        "probe": probe_table(rows["probe"]) if rows["probe"] else None,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, options.out.with_suffix(".png"))
    show(report)


def show(report: dict[str, Any]) -> None:
    """A table for the terminal: accuracy in percent."""
    print(f"{'':28}{'tokens':>7}{'KV':>6}" + "".join(f"{kind:>8}" for kind in ("all", *KINDS)) + "   all, to stock")
    for name, entry in report["methods"].items():
        shares = "".join(f"{100 * entry['accuracy'][k]['accuracy']:8.1f}" for k in ("all", *KINDS))
        gap = entry["accuracy"]["all"].get("to_stock")
        paired = f"   {100 * gap['difference']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]" if gap else ""
        print(f"{name:28}{entry['tokens']:7.0f}{entry['kv']:6.0f}{shares}{paired}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy against visual tokens, and the probe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
    for number, (name, entry) in enumerate(report["methods"].items()):
        share = entry["accuracy"]["all"]
        low, high = (share["accuracy"] - share["low"], share["high"] - share["accuracy"])
        marker = "osD^vP*Xh<>"[number % 11]
        left.errorbar(entry["kv"], share["accuracy"], [[low], [high]], fmt=marker, capsize=2, label=name)
    left.set(
        xlabel="visual KV rows while decoding, mean over layers", ylabel="exact answers, all kinds", ylim=(-0.02, 1.02)
    )
    left.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    if report["probe"]:
        for name, entry in report["probe"].items():
            for mode, line in (("everywhere", "-"), ("decoding", "--")):
                if entry[mode]:
                    when = "for prompt and answer" if mode == "everywhere" else "for the answer alone"
                    right.plot(entry[mode], line, label=f"{name} questions ({entry['n']}), {when}")
        for layer in report["prune_layers"]["metok"]:
            right.axvline(layer, color="grey", linewidth=0.8, linestyle=":")
        right.set(xlabel="nothing visual from this layer on (dotted: METok's L1, L2, L3)", ylim=(-0.02, 1.02))
        right.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
