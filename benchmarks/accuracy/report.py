"""From verdicts to the result: tables on the terminal, JSON and CSV."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.data import Item
from benchmarks.accuracy.local import Outcome
from benchmarks.accuracy.methods import BALANCED, PAPER, STOCK
from benchmarks.common.stats import Bootstrap, Verdicts, compare, is_right

WITHOUT_SENTENCES = "not open"
GROUPS = {"letter": "one letter", "short": "a few words", "open": "sentences"}
WITHIN = 0.01
MEANS = ("entering", "after_l1", "after_l2", "retained", "per_layer", "kv_bytes", "seconds")


@dataclass
class Answers:
    """One method's outcomes, in the order of the questions they answer."""

    family: str
    what: str
    definition: str = ""
    outcomes: list[Outcome] = field(default_factory=list)


def slices(items: Sequence[Item]) -> dict[str, Verdicts]:
    """What is reported apart: all questions, the three groups, every kind ("kind: ...") and
    what it is made of ("kind: .../..."); masks, bool [questions]."""
    found: dict[str, Verdicts] = {"all": np.ones(len(items), dtype=bool)}
    for group in GROUPS:
        found[group] = np.array([item.group == group for item in items])
    for kind in sorted({item.kind for item in items}):
        found[f"kind: {kind}"] = np.array([item.kind == kind for item in items])
        for of in sorted({item.of for item in items if item.kind == kind and item.of}):
            found[f"kind: {kind}/{of}"] = np.array([item.kind == kind and item.of == of for item in items])
    return {name: mask for name, mask in found.items() if mask.any()}


def verdicts(items: Sequence[Item], answers: Answers) -> Verdicts:
    """Which questions were answered right, bool [questions]."""
    pairs = zip(items, answers.outcomes, strict=True)
    return np.array([is_right(outcome.text, item.answer) for item, outcome in pairs], dtype=bool)


def summarise(items: Sequence[Item], methods: Mapping[str, Answers]) -> dict[str, Any]:
    """Each method's means and, for each slice, its share of right answers
    and the paired difference to the stock run.
    """
    boot, parts = _bootstrap(items), slices(items)
    right = {name: verdicts(items, answers) for name, answers in methods.items()}
    table: dict[str, Any] = {}
    for name, answers in methods.items():
        stock = right.get(STOCK) if name != STOCK else None
        table[name] = {
            "family": answers.family,
            "what": answers.what,
            "definition": answers.definition,
            **{key: mean(answers.outcomes, key) for key in MEANS},
            "accuracy": compare(boot, right[name], stock, parts),
            "verdicts": "".join("01"[int(v)] for v in right[name]),
        }
    return table


def paired(
    items: Sequence[Item], methods: Mapping[str, Answers], pairs: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """The difference of the methods of each pair that both ran, over all questions,
    without sentences, and on each group.
    """
    boot, parts = _bootstrap(items), slices(items)
    parts = {name: mask for name, mask in parts.items() if not name.startswith("kind: ")}
    parts |= {WITHOUT_SENTENCES: parts["all"] & ~parts["open"]} if "open" in parts else {}
    right = {name: verdicts(items, methods[name]) for name in {n for pair in pairs for n in pair} & set(methods)}
    return [
        {
            "method": one,
            "other": other,
            "differences": {
                name: asdict(boot.difference(right[one], right[other], mask))
                for name, mask in parts.items()
                if mask.any()
            },
        }
        for one, other in pairs
        if one in right and other in right
    ]


def _bootstrap(items: Sequence[Item]) -> Bootstrap:
    numbers = {path: i for i, path in enumerate(dict.fromkeys(item.video for item in items))}
    return Bootstrap([numbers[item.video] for item in items])


def mean(outcomes: Sequence[Outcome], key: str) -> float | None:
    """Mean of one of an outcome's numbers; None where any is unknown."""
    values = [getattr(outcome, key) for outcome in outcomes]
    return None if not values or None in values else statistics.fmean(values)


def write_csv(result: Mapping[str, Any], path: Path) -> None:
    """One row for each method and slice."""
    to_stock = ("difference", "low", "high", "won", "lost")
    head = ["runner", "method", "family", "slice", "n", "accuracy", "low", "high"]
    head += [f"stock_{name}" for name in to_stock]
    with path.open("w", newline="", encoding="utf-8") as sheet:
        writer = csv.writer(sheet)
        writer.writerow([*head, *MEANS])
        for runner in ("local", "server"):
            for name, method in result.get(runner, {}).get("methods", {}).items():
                for part, row in method["accuracy"].items():
                    other = row.get("to_stock", {})
                    values = [row["n"], row["accuracy"], row["low"], row["high"], *(other.get(k) for k in to_stock)]
                    values += [method[key] for key in MEANS]
                    rounded = [round(v, 5) if isinstance(v, float) else v for v in values]
                    writer.writerow([runner, name, method["family"], part, *rounded])


def write_json(result: Mapping[str, Any], path: Path) -> None:
    """The whole result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """The same with floats to five significant places after the point."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def show(console: Console, title: str, methods: Mapping[str, Any]) -> None:
    """Print every method's line, and the kinds of question beside the main methods."""
    table = Table(title=title, caption=CAPTION)
    for name in ("method", "all", "to stock", "won/lost"):
        table.add_column(name, no_wrap=True)
    present = [group for group in GROUPS if any(group in m["accuracy"] for m in methods.values())]
    for group in present:
        table.add_column(GROUPS[group], no_wrap=True)
    for name in ("enter", "L1", "L2", "kept", "a layer", "KV KiB", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, m in methods.items():
        if m["family"] != "probe":
            table.add_row(name, *_line(m, present))
    console.print(table)
    main = [name for name in methods if name in FOR_KINDS] if STOCK in methods else list(methods)
    by_kind = Table(title=f"{title}: by kind of question, %")
    for name in ("kind", "n", *main):
        by_kind.add_column(name, justify="left" if name == "kind" else "right")
    for part in methods[main[0]]["accuracy"]:
        if part.startswith("kind: "):
            rows = [methods[name]["accuracy"][part] for name in main]
            by_kind.add_row(part[6:], str(rows[0]["n"]), *(percent(row) for row in rows))
    console.print(by_kind)


CAPTION = (
    "% right, 95 % intervals by bootstrap over videos; 'to stock' is paired, in points. Visual tokens: entering the "
    "language model, after the first and the second dropping layer, most in one layer while decoding from the first dropping "
    "layer on, mean a layer in prefill; KV: text included, when decoding starts"
)
FOR_KINDS: tuple[str, ...] = (
    STOCK,
    "frames = average",
    "random = average",
    "evs = average",
    "metok stage 1",
    "metok stages 1+2",
)
FOR_KINDS += (PAPER, BALANCED)


def read_up_to(methods: Mapping[str, Any], layers: int) -> str | None:
    """What the probe says about pruning layers, in a sentence; None where it did not run."""
    shares = [
        methods[f"drop from {k}"]["accuracy"]["all"]["accuracy"] for k in range(layers) if f"drop from {k}" in methods
    ]
    if len(shares) < layers:
        return None
    stock = methods[STOCK]["accuracy"]["all"]["accuracy"]
    missed = [k for k, share in enumerate(shares) if share < stock - WITHIN]
    first = missed[-1] + 1 if missed else 0
    return (
        f"Probe: from layer {first} of {layers} on no visual token is needed (within a point of stock's "
        f"{100 * stock:.1f} %). The third of prune_layers must not lie before it; what is read behind the first two "
        "is read from fewer tokens."
    )


def show_pairs(console: Console, pairs: Sequence[Mapping[str, Any]]) -> None:
    """Print what :func:`paired` found."""
    titles = {"all": "all", WITHOUT_SENTENCES: "without sentences", **GROUPS}
    table = Table(title="Methods against each other, points, paired by question [95 %]")
    for name in ("method", "against", *titles.values()):
        table.add_column(name, no_wrap=True)
    for pair in pairs:
        rows = pair["differences"]
        table.add_row(pair["method"], pair["other"], *(points(rows[part]) if part in rows else "" for part in titles))
    console.print(table)


def _line(m: Mapping[str, Any], groups: Sequence[str]) -> list[str]:
    whole = m["accuracy"]["all"]
    other = whole.get("to_stock")
    cells = [percent(whole), "" if other is None else points(other)]
    cells.append("" if other is None else f"{other['won']}/{other['lost']}")
    cells += [percent(m["accuracy"][g]) if g in m["accuracy"] else "" for g in groups]
    for key in ("entering", "after_l1", "after_l2", "retained", "per_layer"):
        cells.append("?" if m[key] is None else f"{m[key]:.0f}")
    cells.append("?" if m["kv_bytes"] is None else f"{m['kv_bytes'] / 1024:.0f}")
    return [*cells, f"{1e3 * m['seconds']:.0f}"]


def percent(row: Mapping[str, Any]) -> str:
    """A share with its interval."""
    text = f"{100 * row['accuracy']:.1f}"
    return text if row["low"] is None else f"{text} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def points(row: Mapping[str, Any]) -> str:
    """A difference with its interval, in points."""
    text = f"{100 * row['difference']:+.1f}"
    return text if row["low"] is None else f"{text} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
