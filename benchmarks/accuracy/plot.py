"""Plots of a result: accuracy against visual tokens and against KV, and where the model reads the video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.accuracy.report import GROUPS

FAMILIES = {
    "stock": ("black", "*"),
    "frames": ("tab:orange", "s"),
    "random": ("tab:gray", "x"),
    "pooling": ("tab:brown", "v"),
    "evs": ("tab:green", "^"),
    "vidcom2": ("tab:olive", "D"),
    "fastv": ("tab:purple", "P"),
    "metok": ("tab:red", "o"),
}
DODGE = 0.015
"""Points of equal tokens would hide one another: each family is moved sideways by this share,
times its place among them.
"""
SHORT_NAMES = {"metok paper": "paper", "metok balanced": "balanced", "metok stage 1": "1", "metok stages 1+2": "1+2"}
SHORT_NAMES |= {"metok stages 2+3": "2+3", "metok retention 0.5": "0.5"}


def draw(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw a result's plots beside `path` (the JSON); returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    written = [_trade(result, path.with_suffix(".png"))]
    if any(m["family"] == "probe" for m in result["local"]["methods"].values()):
        written.append(_probe(result, path.with_name(f"{path.stem}-probe.png")))
    return written


def footer(result: Mapping[str, Any]) -> str:
    """The operating point in one line."""
    s = result["set"]
    return (
        f"{s['questions']} questions on {s['videos']} held-out videos of {s['frames']['mean']:.0f} frames on average, "
        f"model {result['model']['name']}, {result['model']['layers']} layers, float32, commit {result['commit']}"
    )


def _trade(result: Mapping[str, Any], target: Path) -> Path:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    methods = {n: m for n, m in result["local"]["methods"].items() if m["family"] in ("stock", "baseline", "METok")}
    groups = [g for g in GROUPS if any(g in m["accuracy"] for m in methods.values())]
    axes_of = (
        ("per_layer", 1, "visual tokens in prefill, mean a layer"),
        ("kv_bytes", 1024, "KV when decoding starts, KiB"),
    )
    figure, axes = plt.subplots(len(groups), 2, figsize=(13, 4.2 * len(groups)), squeeze=False, sharey="row")
    for row, group in zip(axes, groups, strict=True):
        for axis, (key, unit, label) in zip(row, axes_of, strict=True):
            for family, (colour, marker) in FAMILIES.items():
                found = [(n, m) for n, m in methods.items() if n.startswith(family) and group in m["accuracy"]]
                found.sort(key=lambda each: each[1][key])
                _points(axis, found, group, key, unit, (colour, marker, family))
            axis.set_xscale("log")
            for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
                which(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.tick_params(axis="x", which="both", labelsize=7)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{GROUPS[group]}: % right")
    axes[0][0].legend(fontsize=8, loc="lower right")
    figure.suptitle(
        "Accuracy against visual tokens and KV; bars: 95 % intervals over videos; "
        f"families are moved sideways by up to {100 * DODGE * (len(FAMILIES) // 2):.0f} % so that none hides another",
        fontsize=11,
    )
    figure.text(0.01, 0.004, footer(result), fontsize=7)
    figure.tight_layout(rect=(0, 0.012, 1, 0.995))
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _points(
    axis: Any, found: list[tuple[str, Any]], group: str, key: str, unit: float, style: tuple[str, str, str]
) -> None:
    """One family's points with intervals."""
    colour, marker, label = style
    if not found:
        return
    rows = [m["accuracy"][group] for _, m in found]
    place = list(FAMILIES).index(label) - len(FAMILIES) // 2
    x = [m[key] / unit * (1 + DODGE * place) for _, m in found]
    y = [100 * row["accuracy"] for row in rows]
    spread = None
    if all(row["low"] is not None for row in rows):
        ends = [(100 * (row["accuracy"] - row["low"]), 100 * (row["high"] - row["accuracy"])) for row in rows]
        spread = [[max(low, 0) for low, _ in ends], [max(high, 0) for _, high in ends]]
    axis.errorbar(x, y, yerr=spread, fmt=marker, color=colour, label=label, ms=7, alpha=0.8, elinewidth=0.7, capsize=2)
    if label == "stock":
        axis.axhline(y[0], color=colour, lw=0.6, ls=":")
    labels: list[tuple[list[str], float, float]] = []  # points of about equal x share one
    for (name, _), at, height in zip(found, x, y, strict=True):
        if name not in SHORT_NAMES:
            continue
        if labels and at < 1.03 * labels[-1][1]:
            names, first, highest = labels[-1]
            labels[-1] = ([*names, SHORT_NAMES[name]], first, max(highest, height))
        else:
            labels.append(([SHORT_NAMES[name]], at, height))
    for names, at, height in labels:
        text = ", ".join(names)
        axis.annotate(
            text, (at, height), xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour, rotation=25
        )


def _probe(result: Mapping[str, Any], target: Path) -> Path:
    from matplotlib import pyplot as plt

    methods = result["local"]["methods"]
    groups = [g for g in GROUPS if g in methods["stock"]["accuracy"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    titles = {
        "drop from": "no visual token from layer k on",
        "decode blind from": "no visual KV from layer k on while decoding",
    }
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for group in groups:
            found = {int(n.rsplit(" ", 1)[1]): m for n, m in methods.items() if n.startswith(kind)}
            found[result["model"]["layers"]] = methods["stock"]
            layers = sorted(found)
            shares = [100 * found[k]["accuracy"][group]["accuracy"] for k in layers]
            axis.plot(layers, shares, marker="o", ms=4, label=GROUPS[group])
        for name, layer in zip(("L1", "L2", "L3"), result["model"]["prune_layers"], strict=True):
            axis.axvline(layer, color="gray", lw=0.8, ls=":")
            axis.text(layer, 0.02, f" {name}", transform=axis.get_xaxis_transform(), fontsize=8, color="gray")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("k")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% right")
    axes[0].legend(fontsize=8)
    figure.text(0.01, 0.01, footer(result), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target
