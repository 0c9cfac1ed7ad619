"""Tables, files and plots of the accuracy benchmark,
and the comparison of its two runners, from made-up answers.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.accuracy import cli as accuracy
from benchmarks.accuracy.data import Item
from benchmarks.accuracy.local import Outcome
from benchmarks.accuracy.plot import draw
from benchmarks.accuracy.report import (
    Answers,
    mean,
    paired,
    percent,
    points,
    read_up_to,
    show,
    show_pairs,
    summarise,
    write_csv,
    write_json,
)
from benchmarks.accuracy.run import agreement, describe_set

SENTENCE = "In the city a red star appeared at the top left."
QUESTIONS = [("letter", "A", ("x", "y")), ("colour", "red", ()), ("open", SENTENCE, ())]


def items(videos: int = 4) -> list[Item]:
    out = []
    for number in range(3 * videos):
        kind, answer, options = QUESTIONS[number % 3]
        out.append(Item(number, Path(f"{number // 3}.mp4"), f"{kind}?", options, answer, kind))
    return out


def outcome(text: str, tokens: int) -> Outcome:
    return Outcome(text, tokens, tokens, tokens, tokens, float(tokens), 100 * tokens, 0.01)


def made_up() -> tuple[list[Item], dict[str, Answers]]:
    """Stock is always right; paper never writes a whole sentence; frames are right half of the time."""
    asked = items()
    methods = {
        "stock": Answers("stock", "", "", [outcome(item.answer, 600) for item in asked]),
        "metok paper": Answers("METok", "", "", [outcome(item.answer[:12], 150) for item in asked]),
        "frames 8": Answers("baseline", "", "", [outcome(i.answer if i.number % 2 else "?", 128) for i in asked]),
    }
    for layer in range(2):
        methods[f"drop from {layer}"] = Answers("probe", "", "", methods["frames 8"].outcomes)
        methods[f"decode blind from {layer}"] = Answers("probe", "", "", methods["stock"].outcomes)
    return asked, methods


def result() -> dict[str, Any]:
    asked, methods = made_up()
    path = Path(__file__)
    model = {"name": "tiny", "layers": 2, "prune_layers": [1, 1, 2]}
    local = {"methods": summarise(asked, methods)}
    return {"commit": "0", "model": model, "set": describe_set(path, asked, [16, 20, 24, 28], 64), "local": local}


def test_groups_and_kinds_are_reported_apart() -> None:
    table = summarise(*made_up())
    paper = table["metok paper"]
    assert {name: row["accuracy"] for name, row in paper["accuracy"].items()} == {
        "all": pytest.approx(2 / 3),
        "letter": 1.0,
        "short": 1.0,
        "open": 0.0,
        "kind: colour": 1.0,
        "kind: letter": 1.0,
        "kind: open": 0.0,
    }
    assert (paper["accuracy"]["open"]["to_stock"]["won"], paper["accuracy"]["open"]["to_stock"]["lost"]) == (0, 4)
    assert "to_stock" not in table["stock"]["accuracy"]["all"]
    assert paper["verdicts"] == "110" * 4
    assert (paper["entering"], paper["kv_bytes"], paper["per_layer"]) == (150, 15000, 150)


def test_parts_of_a_kind_are_reported_apart_beside_it() -> None:
    asked, methods = made_up()
    parts = {2: "4 scenes", 5: "one thing", 8: "4 scenes"}
    asked = [replace(item, of=parts.get(item.number, "")) for item in asked]
    answers = [outcome(i.answer if i.number != 8 else "?", 1) for i in asked]
    table = summarise(asked, {"stock": methods["stock"], "metok paper": Answers("METok", "", "", answers)})
    rows = table["metok paper"]["accuracy"]
    shares = {name: (row["n"], row["accuracy"]) for name, row in rows.items() if name.startswith("kind: open")}
    assert shares == {"kind: open": (4, 0.75), "kind: open/4 scenes": (2, 0.5), "kind: open/one thing": (1, 1.0)}
    assert rows["kind: open/4 scenes"]["to_stock"]["lost"] == 1
    console = Console(width=200, record=True, file=io.StringIO())
    show(console, "x", table)
    assert "open/4 scenes" in console.export_text()
    only = {p["method"]: set(p["differences"]) for p in paired(asked, methods, [("stock", "metok paper")])}
    assert only == {"stock": {"all", "letter", "short", "open", "not open"}}


def test_methods_are_compared_with_each_other_where_both_ran() -> None:
    asked, methods = made_up()
    pairs = paired(
        asked, methods, [("metok paper", "frames 8"), ("metok paper", "vidcom2"), ("frames 8", "metok paper")]
    )
    assert [(p["method"], p["other"]) for p in pairs] == [("metok paper", "frames 8"), ("frames 8", "metok paper")]
    # Paper: every letter and colour, no sentence. Frames: the odd questions, two of four in every group.
    expected = {"all": (4, 2), "letter": (2, 0), "short": (2, 0), "open": (0, 2), "not open": (4, 0)}
    rows = pairs[0]["differences"]
    assert {part: (row["won"], row["lost"]) for part, row in rows.items()} == expected
    assert rows["not open"]["difference"] == 0.5
    assert pairs[1]["differences"]["all"]["difference"] == pytest.approx(-2 / 12)
    console = Console(width=200, record=True, file=io.StringIO())
    show_pairs(console, pairs)
    line = next(line for line in console.export_text().splitlines() if "metok paper" in line)
    assert points(rows["not open"]) in line.replace("  ", " ")


def test_an_unknown_number_makes_no_mean() -> None:
    assert mean([outcome("a", 1), outcome("b", 3)], "kv_bytes") == 200
    assert mean([outcome("a", 1), Outcome("b")], "kv_bytes") is None


def test_texts_of_shares_and_differences() -> None:
    assert percent({"accuracy": 0.5, "low": 0.4, "high": 0.612}) == "50.0 [40.0, 61.2]"
    assert percent({"accuracy": 1.0, "low": None, "high": None}) == "100.0"
    assert points({"difference": -0.01, "low": -0.02, "high": 0.0}) == "-1.0 [-2.0, +0.0]"


def test_files_tables_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = result()
    path = tmp_path / "new" / "accuracy.json"
    write_json(whole, path)
    write_csv(whole, path.with_suffix(".csv"))
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert len(rows) == 7 * 7
    row = next(r for r in rows if (r["method"], r["slice"]) == ("metok paper", "open"))
    assert (row["n"], row["accuracy"], row["stock_lost"], row["per_layer"]) == ("4", "0.0", "4", "150.0")

    console = Console(width=200, record=True, file=(tmp_path / "text").open("w"))
    show(console, "Local", whole["local"]["methods"])
    text = console.export_text()
    assert "-33.3 [-33.3, -33.3]" not in text  # no width from a bootstrap that cannot have one
    assert "metok paper" in text
    assert "0/4" in text
    assert "drop from" not in text

    files = draw(json.loads(path.read_text()), path)
    assert [f.name for f in files] == ["accuracy.png", "accuracy-probe.png"]
    before = [f.read_bytes() for f in files]
    assert all(data.startswith(b"\x89PNG") for data in before)
    assert accuracy.main(["--plot", str(path)]) == 0
    assert [line.rsplit("/", 1)[-1] for line in capsys.readouterr().out.split()] == [f.name for f in files]


def test_the_runners_are_compared_question_by_question() -> None:
    asked, local = made_up()
    served = {
        "stock": Answers("stock", "", "", [outcome(item.answer, 600) for item in asked]),
        "metok paper": Answers(
            "METok", "", "", [outcome(item.answer[:12] if i else "other", 151) for i, item in enumerate(asked)]
        ),
        "of its own": Answers("METok", "", "", [outcome("x", 1) for _ in asked]),
    }
    table = agreement(asked, local, served)
    assert list(table) == ["stock", "metok paper"]
    assert (table["stock"]["questions"], table["stock"]["same_text"], table["stock"]["same_counts"]) == (12, 12, 12)
    assert (table["metok paper"]["same_text"], table["metok paper"]["same_counts"]) == (11, 0)
    (found,) = table["metok paper"]["different"]
    assert (found["local"], found["server"], found["video"]) == ("A", "other", "0.mp4")
    assert not accuracy.agreed({"server": {"agreement": table}})  # counts of paper differ
    assert accuracy.agreed({"server": {"agreement": {"stock": table["stock"]}}})
    assert accuracy.agreed({})


def test_the_probe_tells_from_where_on_no_visual_token_is_needed() -> None:
    def of(*shares: float) -> dict[str, Any]:
        named = {"stock": 0.9} | {f"drop from {k}": share for k, share in enumerate(shares)}
        return {name: {"accuracy": {"all": {"accuracy": share}}} for name, share in named.items()}

    assert "from layer 2 of 4 on" in (read_up_to(of(0.2, 0.88, 0.895, 0.9), 4) or "")
    assert "from layer 4 of 4 on" in (read_up_to(of(0.2, 0.9, 0.9, 0.88), 4) or "")  # the last layer reads, too
    assert "from layer 0 of 2 on" in (read_up_to(of(0.9, 0.9), 2) or "")
    assert read_up_to(of(0.2, 0.9), 3) is None  # a part of the probe says nothing


def test_only_the_benchmark_as_it_is_takes_the_place_of_the_repository_s_result() -> None:
    held = accuracy.RESULTS / "accuracy.json"
    assert accuracy.arguments([]).out == held
    for changed in (["--limit", "3"], ["--probe"], ["--videos", "9"], ["--methods", "stock"], ["--served", "0"]):
        assert accuracy.arguments(changed).out == accuracy.ROOT / "out" / "accuracy.json"
    assert accuracy.arguments(["--split", "valid", "--out", "x.json"]).out == Path("x.json")
    assert accuracy.arguments(["--probe"]).served == 0


def test_the_probe_goes_with_no_methods_of_the_user_s(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--probe", "--url", "http://x"], ["--probe", "--methods", "stock"]):
        with pytest.raises(SystemExit):
            accuracy.arguments(wrong)
        assert "--probe goes with neither" in capsys.readouterr().err
