"""From raw figures to medians, ratios and plots.

Needs no engine: `--plot FILE.json` draws from a result alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.families import mean_over_layers
from benchmarks.engine.timing import LANGUAGE_MODEL, OUTSIDE, PARTS
from metok_vllm.compression.accounting import VisualTokens

PART_COLOURS = (
    "#4c72b0", "#8172b3", "#55a868", "#c44e52", "#dd8452", "#64b5cd", "#937860", "#777777", "#999999", "#bbbbbb",
    "#dddddd",
)  # fmt: skip
VARIANT_COLOURS = {
    "stock": "#444444", "fewer-frames": "#999999", "metok-paper": "#c44e52", "metok-balanced": "#4c72b0",
    "evs-mean": "#55a868", "evs-stage1": "#a3d6ae", "vidcom2-mean": "#dd8452", "vidcom2-stage1": "#f0c3a5",
}  # fmt: skip


def quantiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """p20, p50 and p80, linear between neighbours, each times `scale`.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return scale * (ordered[low] + (place - low) * (ordered[high] - ordered[low]))

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def summarise(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """A worker's raw figures as medians with p20 and p80, in milliseconds; `layers` are the language model's.

    Where it only counted, there are no times.
    """
    result: dict[str, Any] = {key: raw[key] for key in ("start_s", "tokens", "kv", "memory") if key in raw}
    result["tokens"] = with_mean(raw["tokens"], layers)
    if "levels" not in raw:
        return result
    keys = ("concurrency", "requests", "wall_s", "requests_per_s", "cpu_s_per_request", "most_running")
    result["processing_ms"] = quantiles(raw["processing_s"], 1e3)
    result["levels"] = [
        {
            **{key: level[key] for key in keys},
            "ttft_ms": quantiles(level["ttft_s"], 1e3),
            "inter_token_ms": quantiles(level["token_gaps_s"], 1e3),
            "decode_step_ms": quantiles(level["decode_steps_s"], 1e3) if level["decode_steps_s"] else None,
            "decode_steps": len(level["decode_steps_s"]),
        }
        for level in raw["levels"]
    ]
    result["first_request"] = first_request(raw["first_request"], result["levels"])
    if "breakdown" in raw:
        result["breakdown"] = breakdown(raw["breakdown"])
    return result


def with_mean(tokens: dict[str, Any], layers: int) -> dict[str, Any]:
    """A worker's counts, and the visual tokens that a layer computes on average in prefill.

    What METok's engine reports of one request, or the same tokens in every layer.
    """
    visual = tokens.get("visual_tokens")
    if visual is None:
        return tokens
    mean = float(visual["encoded"])
    if "prune_layers" in tokens:
        mean = mean_over_layers(VisualTokens(**visual), tuple(tokens["prune_layers"]), layers)
    return {**tokens, "mean_over_layers": mean}


def first_request(raw: dict[str, Any], levels: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The first video request after start, alone; beside warm ones where a level has one at a time."""
    warm = [level["ttft_ms"]["p50"] for level in levels if level["concurrency"] == 1]
    ttft = 1e3 * raw["ttft_s"]
    return {
        "ttft_ms": ttft,
        "longest_gap_ms": 1e3 * max(raw["token_gaps_s"]),
        "ttft_over_warm": ttft / warm[0] if warm else None,
    }


def breakdown(raw: dict[str, Any]) -> dict[str, Any]:
    """Median of each part over the repeats, their sum, and scoring's share of the language model's time."""
    result: dict[str, Any] = {key: raw[key] for key in ("first_prune_layer", "compiled")}
    result["requests"] = len(raw["prefill_ms"])
    for phase in ("prefill_ms", "decode_step_ms"):
        parts = {part: statistics.median(request[part] for request in raw[phase]) for part in PARTS}
        result[phase] = {**parts, "total": sum(parts.values())}
    prefill = result["prefill_ms"]
    model = sum(prefill[part] for part in LANGUAGE_MODEL)
    result["language_model_prefill_ms"] = model
    result["scoring_share"] = prefill["scoring"] / model if model else 0.0
    return result


def request_ms(entry: dict[str, Any]) -> dict[str, float | None]:
    """One request alone, from the file to its first token: each part in milliseconds, and their sums.

    Needs a `breakdown`. `file_decode` and `total` are None where decoding a file was not measured.
    """
    prefill = entry["breakdown"]["prefill_ms"]
    decoding = entry["file_decode_ms"]["median"]
    parts = {
        "processing": entry["processing_ms"]["p50"],
        "tower": prefill["tower"],
        "stage1": prefill["stage1"],
        "language_model": entry["breakdown"]["language_model_prefill_ms"],
        "outside_model": sum(prefill[part] for part in OUTSIDE),
    }
    without = sum(parts.values())
    total = None if decoding is None else decoding + without
    return {"file_decode": decoding, **parts, "without_file_decode": without, "total": total}


def ratios_to_pruning(variants: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """METok's variants against each of vLLM's own prunings, as `ratios` has them, by that one's name."""
    metok = {name: entry for name, entry in variants.items() if entry.get("metok") is not None}
    return {
        name: ratios({**metok, name: entry}, name)
        for name, entry in variants.items()
        if entry.get("pruning") and "levels" in entry
    }


def notes(variants: dict[str, dict[str, Any]], expected: dict[str, Any]) -> list[str]:
    """Where the engines' counts are not those that the run was planned by: a sentence each.

    Args:
        variants: the entries measured so far.
        expected: what the rates of vLLM's own pruning were chosen by (`cli.expected`).
    """
    said = []
    for name, entry in variants.items():
        tokens = entry.get("tokens", {})
        visual = tokens.get("visual_tokens")
        if visual is None:
            continue
        if entry.get("pruning"):
            planned, wanted = entry["pruning"]["tokens"], entry["pruning"]["wanted"]
            if planned != round(wanted):
                least = expected["least"][entry["pruning"]["method"]]
                said.append(f"{name}: {wanted:.1f} tokens were wanted, and this method leaves {least} or more")
        elif entry["metok"] is not None:
            planned, mean = expected["encoded"], expected["mean_over_layers"]
            if abs(tokens["mean_over_layers"] - mean) > 1e-6:
                said.append(
                    f"{name}: {tokens['mean_over_layers']:.1f} visual tokens a layer on average, as the engine reports "
                    f"it of one request; the rates of vLLM's own pruning were chosen by {mean:.1f}, for events of equal "
                    "length"
                )
        else:
            planned = visual["stock"]
        if visual["encoded"] != planned:
            said.append(f"{name}: {visual['encoded']} visual tokens enter the language model, and not {planned}")
    return said


def ratios(variants: dict[str, dict[str, Any]], to: str = "stock") -> dict[str, Any]:
    """Every other variant against one of them; above 1 is better than it. Empty where it has no result."""
    base = variants.get(to, {})
    if "levels" not in base:
        return {}
    result = {}
    for name, other in variants.items():
        if name == to or "levels" not in other:
            continue
        levels = []
        for before, level in zip(base["levels"], other["levels"], strict=True):
            steps = [at["decode_step_ms"] for at in (before, level)]
            whole = [v["processing_ms"]["p50"] + at["ttft_ms"]["p50"] for v, at in ((base, before), (other, level))]
            levels.append({
                "concurrency": level["concurrency"],
                "ttft": before["ttft_ms"]["p50"] / level["ttft_ms"]["p50"],
                "ttft_with_processing": whole[0] / whole[1],
                "inter_token": before["inter_token_ms"]["p50"] / level["inter_token_ms"]["p50"],
                "decode_step": steps[0]["p50"] / steps[1]["p50"] if all(steps) else None,
                "requests_per_s": level["requests_per_s"] / before["requests_per_s"],
                "cpu_time": before["cpu_s_per_request"] / level["cpu_s_per_request"],
            })  # fmt: skip
        result[name] = {"levels": levels, "kv_capacity": more_that_fit(base, other)}
        if "breakdown" in base and "breakdown" in other:
            mine, theirs = (v["breakdown"]["language_model_prefill_ms"] for v in (other, base))
            result[name]["language_model_prefill"] = theirs / mine
        if "request_ms" in base and "request_ms" in other:
            whole = [v["request_ms"]["total"] for v in (base, other)]
            result[name]["file_to_first_token"] = whole[0] / whole[1] if None not in whole else None
    return result


def more_that_fit(base: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times the base's video requests fit in the same KV memory."""
    return float(other["kv"]["requests_per_gib"] / base["kv"]["requests_per_gib"])


def plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Draw a result: `path` is the JSON's;
    writes `*-load.png` and `*-request.png` beside it and returns both.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {name: variant for name, variant in result["variants"].items() if "levels" in variant}
    if not measured:
        raise ValueError(f"{path}: no variant has a result to draw")
    written = []
    for suffix, draw in (("load", _draw_load), ("request", _draw_request)):
        figure = draw(plt, measured)
        figure.suptitle(headline(result), fontsize=10)
        figure.text(0.5, 0.005, footer(result), ha="center", fontsize=8, color="#a00000")
        target = path.with_name(f"{path.stem}-{suffix}.png")
        figure.savefig(target, dpi=130)
        plt.close(figure)
        written.append(target)
    return written


def headline(result: dict[str, Any]) -> str:
    """The operating point in one line."""
    work = result["workload"]
    versions = result["versions"]
    return (
        f"{work.get('family', 'LLaVA-OneVision')} {work['model']}, {work['frames']} frames, {work['max_tokens']} new tokens on "
        f"{result['hardware']['device']}; vLLM {versions.get('vllm', 'unknown')}, commit {result['commit']}"
    )


def footer(result: dict[str, Any]) -> str:
    """What the figures may be used for, and whether other work on the machine disturbed them."""
    hardware = result["hardware"]
    load, cores = hardware.get("load_average", 0.0), hardware.get("cores", 1)
    busy = f"; times disturbed: load average {load:.1f} on {cores} cores at the start" if load > cores / 2 else ""
    return str(result["claim"]) + busy


def _draw_load(plt: Any, variants: dict[str, dict[str, Any]]) -> Any:
    """Against concurrency: time to first token, between tokens, requests per second."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4))
    for name, variant in variants.items():
        levels = variant["levels"]
        x = [level["concurrency"] for level in levels]
        style = {"color": VARIANT_COLOURS[name], "label": variant["label"], "marker": "o", "markersize": 4}
        for axis, key in zip(axes, ("ttft_ms", "inter_token_ms"), strict=False):
            axis.plot(x, [level[key]["p50"] for level in levels], **style)
            band = [[level[key][p] for level in levels] for p in ("p20", "p80")]
            axis.fill_between(x, *band, color=style["color"], alpha=0.12, linewidth=0)
        axes[2].plot(x, [level["requests_per_s"] for level in levels], **style)
    titles = ("time to first token (ms)", "between two tokens (ms)", "requests per second")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("requests at a time")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(value) for value in x])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, title="median, p20 to p80 shaded", title_fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 0.97))
    return figure


def _draw_request(plt: Any, variants: dict[str, dict[str, Any]]) -> Any:
    """Of one request: where its time goes until the first token, and how many like it fit in the KV cache."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4), width_ratios=(2.2, 1))
    labels = [variant["label"] for variant in variants.values()]
    left = [0.0] * len(labels)
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        values = [variant.get("breakdown", {}).get("prefill_ms", {}).get(part, 0.0) for variant in variants.values()]
        axes[0].barh(labels, values, left=left, color=colour, label=part.replace("_", " "))
        left = [start + value for start, value in zip(left, values, strict=True)]
    title = "until the first token, alone (ms; medians, timed part by part)"
    if not any("breakdown" in variant for variant in variants.values()):
        title += ": not measured"
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(fontsize=8, ncols=-(-len(PARTS) // 2), loc="upper center", bbox_to_anchor=(0.5, -0.09), columnspacing=1,
                   handlelength=1)  # fmt: skip
    fit = [variant["kv"]["requests_per_gib"] for variant in variants.values()]
    bars = axes[1].barh(labels, fit, color=[VARIANT_COLOURS[name] for name in variants])
    axes[1].bar_label(bars, fmt="{:.4g}", fontsize=8, padding=2)
    axes[1].set_title("video requests that fit in 1 GiB of KV cache", fontsize=10)
    axes[1].set_yticks([])
    axes[1].margins(x=0.15)
    for axis in axes:
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout(rect=(0, 0.05, 1, 0.97))
    return figure
