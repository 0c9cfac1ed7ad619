"""One Markdown page of all that a folder holds: card, versions, goals, ratios, parts, kernels, failures."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.provenance import timestamp
from benchmarks.engine import report as drawing
from benchmarks.engine.timing import PARTS
from benchmarks.gpu import goals
from benchmarks.gpu.folder import Folder
from benchmarks.gpu.goals import Results, measured
from benchmarks.gpu.runner import Outcome, outcomes
from benchmarks.gpu.stages import Stage

ORDER = (
    "stock", "fewer-frames", "evs-mean", "evs-stage1", "vidcom2-mean", "vidcom2-stage1", "metok-paper", "metok-balanced",
)  # fmt: skip
NONE = "-"


def write(folder: Folder, stages: Sequence[Stage], model: str, plots: bool) -> Path:
    """Write the page anew from what is there; `plots` draws them, too. Returns its path."""
    results, ended = Results.of(folder, model), outcomes(folder)
    machine = json.loads(folder.machine.read_text()) if folder.machine.exists() else {}
    drawn = draw(folder, results, model) if plots else sorted(folder.results.glob("engine-*.png"))
    option = json.loads(folder.engine_option.read_text()) if folder.engine_option.exists() else {}
    blocks = [
        "# METok on this machine",
        _conditions(results, machine, option),
        "## Goals",
        _goals(results, machine),
        *_mode("vLLM's default mode", results.default),
        *_mode("Eager mode (no torch.compile, no CUDA graphs)", results.eager),
        *_pruned(results),
        "## Kernels",
        _kernels(results),
        "## Plots",
        "\n\n".join(f"![{path.stem}](results/{path.name})" for path in drawn) or _no_plots(),
        "## Stages",
        _stages(stages, ended),
    ]
    folder.report.write_text("\n\n".join(block for block in blocks if block) + "\n")
    return folder.report


def draw(folder: Folder, results: Results, model: str) -> list[Path]:
    """The engine benchmark's plots in both modes;
    none where matplotlib is missing or nothing was measured.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    written = []
    drawn = [(results.default, folder.engine(model)), (results.eager, folder.engine(model, "eager"))]
    drawn += [(result, folder.engine(name)) for name, result in results.pruned.items()]
    for result, path in drawn:
        present = {name: result["variants"][name] for name in ORDER if measured(result, name)}
        if present:
            written += drawing.plot({**result, "variants": present}, path)
    return written


def _no_plots() -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "Not drawn: matplotlib is not installed."
    return "None: nothing to draw."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def number(value: float | None, form: str = "{:.2f}") -> str:
    return NONE if value is None else form.format(value)


def _conditions(results: Results, machine: Mapping[str, Any], option: Mapping[str, Any]) -> str:
    """The card, the versions, the workload."""
    if not machine:
        return "The machine was not asked: the first stage has not run."
    hardware = machine["hardware"]
    rows = [
        ("Written", timestamp()),
        ("Code", results.default.get("commit") or results.eager.get("commit") or machine["commit"]),
        ("Device", hardware["device"]),
        ("nvidia-smi", machine["nvidia_smi"] or "not there"),
        ("CUDA of torch", hardware.get("cuda", NONE)),
        ("CPU", f"{hardware['cpu']}, {hardware['cores']} cores"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
    ]
    known = results.default or results.eager
    if known:
        work = known["workload"]
        rows += [
            ("Model", f"{work['model']}, weights: {work['weights']}"),
            ("Workload", f"{work['frames']} frames of {' x '.join(map(str, work['frame_size']))}, about "
             f"{work['text_tokens']} text tokens, {work['max_tokens']} new tokens"),
            ("What may be claimed", known["claim"]),
        ]  # fmt: skip
    if option:
        rows.append(("Engines ran with", f"`{json.dumps(option)}`: without it they failed"))
    return table(("", ""), rows)


def _goals(results: Results, machine: Mapping[str, Any]) -> str:
    gpu = "cuda" in machine.get("hardware", {})
    note = f"The goals are for {goals.POINT}. "
    note += "Verdicts are on this machine's own figures." if gpu else "This machine's times say nothing of a GPU's."
    return f"{note}\n\n" + table(("What", "Goal", "Measured", "Verdict", "Taken from"), goals.rows(results, gpu))


def _pruned(results: Results) -> list[str]:
    """METok beside vLLM's own pruning, a model after the other."""
    if not results.pruned:
        return ["## Beside vLLM's own pruning", "Not measured."]
    blocks = []
    for name, result in results.pruned.items():
        work = result["workload"]
        blocks += _mode(f"Beside vLLM's own pruning: {name}, {work['frames']} frames", result)
        blocks += [
            _times_as_good(f"Times as good as {base}", ratios)
            for base, ratios in result["ratios_to_pruning"].items()
            if ratios
        ]
        blocks.append("\n".join(f"- {note}." for note in result["notes"]))
    return blocks


def _mode(title: str, result: Mapping[str, Any]) -> list[str]:
    """Everything that the engine benchmark measured in one mode."""
    if not result:
        return [f"## {title}", "Not measured."]
    present = [name for name in ORDER if measured(dict(result), name)]
    failed = [name for name in ORDER if name in result["variants"] and name not in present]
    blocks = [f"## {title}"]
    if result["workload"]["engine"]["enforce_eager"] and "Eager" not in title:
        blocks.append("On a CPU the engine is eager in this mode, too.")
    blocks += [f"`{name}` failed: {result['variants'][name]['error'].splitlines()[0]}" for name in failed]
    if not present:
        return blocks
    variants = {name: result["variants"][name] for name in present}
    to_stock = result["ratios_to_stock"]
    return [*blocks, _requests(variants), _tokens(variants), _to_stock(to_stock), _whole(variants), _parts(variants)]


def _requests(variants: Mapping[str, Any]) -> str:
    """Each variant at each concurrency."""
    rows = []
    for name, variant in variants.items():
        first = variant["first_request"]
        rows.append((name, "first after start", number(first["ttft_ms"], "{:.1f}"), NONE, NONE, NONE,
                     f"longest gap {first['longest_gap_ms']:.1f} ms"))  # fmt: skip
        for level in variant["levels"]:
            step = level["decode_step_ms"]
            rows.append((
                name, str(level["concurrency"]), number(level["ttft_ms"]["p50"], "{:.1f}"),
                number(level["inter_token_ms"]["p50"]), number(step and step["p50"]), number(level["requests_per_s"]),
                f"{level['requests']} requests, {level['decode_steps']} steps that only decode",
            ))  # fmt: skip
    memory = []
    for name, variant in variants.items():
        peak = ", ".join(f"{key.removesuffix('_mib')} {value:.0f} MiB" for key, value in variant["memory"].items())
        fit = f"{variant['kv']['requests_that_fit']} requests fit in the KV cache, "
        fit += f"{variant['kv']['requests_per_gib']:.1f} in a GiB"
        memory.append((name, f"{variant['start_s']:.1f}", str(variant["tokens"]["prompt_tokens"]), fit, peak))
    head = ("", "Requests at a time", "First token, ms", "Between tokens, ms", "Decode step, ms", "Requests/s", "")
    return (
        table(head, rows)
        + "\n\nMedians; the first token is counted from the processed frames on.\n\n"
        + table(("", "Start, s", "Prompt tokens", "KV", "Most memory"), memory)
    )


def _tokens(variants: Mapping[str, Any]) -> str:
    """Tokens and KV blocks of a request, as the engines had them."""
    rows = []
    for name, variant in variants.items():
        tokens, kv = variant["tokens"], variant["kv"]
        visual, groups = tokens.get("visual_tokens", {}), kv.get("groups", [])
        rows.append((
            name, str(tokens["prompt_tokens"]), str(tokens["text_tokens"]), str(visual.get("encoded", NONE)),
            number(tokens.get("mean_over_layers"), "{:.1f}"),
            " + ".join(f"{group['blocks_of_a_request']} ({group['layers']} layers)" for group in groups) or NONE,
            str(kv["requests_that_fit"]),
        ))  # fmt: skip
    head = ("Of a request", "Prompt tokens", "Text", "Visual, entering", "Visual, mean over layers", "KV blocks",
            "Requests that fit")  # fmt: skip
    return table(head, rows)


def _to_stock(ratios: Mapping[str, Any]) -> str:
    """How many times as good as stock."""
    if not ratios:
        return "No ratios: stock was not measured."
    return _times_as_good("Times as good as stock", ratios)


def _times_as_good(title: str, ratios: Mapping[str, Any]) -> str:
    """Two tables of ratios to one variant: at each number of requests, and of one request."""
    keys = ("ttft", "ttft_with_processing", "inter_token", "decode_step", "requests_per_s")
    rows = []
    for name in [name for name in ORDER if name in ratios]:
        rows += [
            (name, str(level["concurrency"]), *(number(level[key]) for key in keys)) for level in ratios[name]["levels"]
        ]
    whole = [
        (name, number(ratios[name]["kv_capacity"]), number(ratios[name].get("language_model_prefill")),
         number(ratios[name].get("file_to_first_token")))
        for name in ORDER if name in ratios
    ]  # fmt: skip
    head = (title, "Requests at a time", "First token", "... with processing", "Between tokens",
            "Decode step", "Requests/s")  # fmt: skip
    return (
        table(head, rows)
        + "\n\n"
        + table((title, "KV capacity", "Language-model prefill", "File to first token"), whole)
    )


def _whole(variants: Mapping[str, Any]) -> str:
    """From the file to the first token, part by part and together."""
    known = {name: variant["request_ms"] for name, variant in variants.items() if "request_ms" in variant}
    if not known:
        return ""
    keys = list(next(iter(known.values())))
    rows = [(name, *(number(request[key], "{:.1f}") for key in keys)) for name, request in known.items()]
    head = ("From the file to the first token, ms", *(key.replace("_", " ") for key in keys))
    return table(head, rows)


def _parts(variants: Mapping[str, Any]) -> str:
    """Where the time of a request alone goes."""
    rows = []
    for name, variant in variants.items():
        for phase, label in (("prefill_ms", "until the first token"), ("decode_step_ms", "a decode step")):
            parts = variant.get("breakdown", {}).get(phase)
            if parts:
                rows.append((name, label, *(number(parts[part]) for part in (*PARTS, "total"))))
    if not rows:
        return "Where the time goes: not measured."
    return table(("Parts, ms", "", *(part.replace("_", " ") for part in (*PARTS, "total"))), rows)


def _kernels(results: Results) -> str:
    """A line a case: METok's kernel beside the others."""
    if not results.kernels:
        return "Not measured."
    if results.kernels[0]["mode"] == "interpreter":
        return f"{len(results.kernels)} cases agree with their references in Triton's interpreter; no times."
    cases: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in results.kernels:
        cases.setdefault((row["op"], row["shape"]), {})[row["implementation"]] = row
    rows = [
        (op, shape, *(forms.get(form, {}).get("p50_us", NONE) for form in ("metok", "torch", "torch.compile")),
         forms["metok"]["share_of_copy"], forms["metok"]["share_of_matmul"])
        for (op, shape), forms in cases.items()
    ]  # fmt: skip
    head = ("Kernel", "Case", "METok, us", "torch, us", "torch.compile, us", "Share of copy", "Share of product")
    return table(head, rows)


def _stages(stages: Sequence[Stage], ended: Mapping[str, Outcome]) -> str:
    """How each stage ended, and the end of the log of those that did not end well."""
    rows = []
    for stage in stages:
        outcome = ended.get(stage.name)
        said = (outcome.result, str(outcome.seconds), outcome.commit) if outcome else ("not run", NONE, NONE)
        rows.append((stage.name, stage.what, *said))
    logs = [
        f"### {outcome.name}: {outcome.result}\n\n```\n" + "\n".join(outcome.tail) + "\n```"
        for outcome in (ended.get(stage.name) for stage in stages)
        if outcome is not None and not outcome.ok
    ]
    return "\n\n".join([table(("Stage", "What", "Result", "Seconds", "Code"), rows), *logs])
