"""Questions of the accuracy benchmark: what a line must hold,
and that no set comes from what was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import cli as accuracy
from benchmarks.accuracy.data import UsageError, load_items
from benchmarks.accuracy.generated_set import MIXED, MORE, generate
from training.seeds import SPLITS

GOOD = {"video": "a.mp4", "question": "What colour was the star?", "answer": "red", "kind": "colour"}


def write(folder: Path, *rows: Any) -> Path:
    (folder / "a.mp4").touch()
    path = folder / "set.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_a_line_as_make_set_writes_it_and_one_like_video_mme(tmp_path: Path) -> None:
    options = ["one", "two", "three", "four"]
    path = write(
        tmp_path, GOOD | {"options": [], "seed": SPLITS["test"][0]}, "", {**GOOD, "options": options, "answer": "B"}
    )
    free, choice = load_items(path)
    assert (free.number, choice.number) == (0, 1)
    assert (free.prompt, free.group, free.kind) == (GOOD["question"], "short", "colour")
    assert choice.prompt == f"{GOOD['question']}\nA. one\nB. two\nC. three\nD. four\nAnswer with the letter."
    assert choice.group == "letter"
    assert choice.video == tmp_path / "a.mp4"
    assert [item.number for item in load_items(path, limit=1)] == [0]


def test_a_part_of_a_kind_is_kept_where_it_says_more_than_the_kind(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"of": "colour"}, GOOD | {"kind": "open", "of": "4 scenes"}]
    assert [item.of for item in load_items(write(tmp_path, *rows))] == ["", "", "4 scenes"]


def test_a_sentence_is_open(tmp_path: Path) -> None:
    answer = "In the city a white star moved right."
    assert [item.group for item in load_items(write(tmp_path, GOOD | {"answer": answer}))] == ["open"]
    assert [item.group for item in load_items(write(tmp_path, GOOD | {"answer": "In the city a star moved."}))] == [
        "short"
    ]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "this is not JSON"),
        ([1], "must be a JSON object"),
        ({"question": "x", "answer": "y"}, "'video' must be a text"),
        (GOOD | {"answer": " "}, "'answer' must be a text"),
        (GOOD | {"question": 3}, "'question' must be a text"),
        (GOOD | {"options": "red"}, "'options' must be a list of texts"),
        (GOOD | {"options": list("12345"), "answer": "A"}, "there are 5 options and letters for 4"),
        (GOOD | {"options": ["red", "blue"], "answer": "red"}, "'answer' must be one of A, B"),
        (GOOD | {"options": ["red", "blue"], "answer": "C"}, "'answer' must be one of A, B"),
        (GOOD | {"video": "b.mp4"}, "there is no video b.mp4"),
        (GOOD | {"kind": ""}, "'kind' must be a text"),
        (GOOD | {"of": 1}, "'of' must be a text"),
        (GOOD | {"seed": "7"}, "'seed' must be a whole number"),
        (GOOD | {"seed": -1}, "belongs to no split"),
        (GOOD | {"seed": SPLITS["train"][5]}, "was trained on"),
    ],
)
def test_a_wrong_line_gives_one_sentence(tmp_path: Path, row: Any, told: str) -> None:
    path = write(tmp_path, GOOD, row)
    with pytest.raises(UsageError, match=r"set\.jsonl, line 2: ") as error:
        load_items(path)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_must_be_there_and_hold_questions(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_items(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="holds no question"):
        load_items(write(tmp_path, ""))


def test_generated_sets_are_held_out_and_hold_more_of_what_matters(tmp_path: Path) -> None:
    path = generate("valid", 3, tmp_path / "set")
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["seed"] for row in rows} == set(SPLITS["valid"][:3])
    assert len({(row["video"], row["kind"], row["question"]) for row in rows}) == len(rows)
    later = [row["kind"] for row in rows[3 * MIXED :]]
    assert len(rows) == 3 * (MIXED + sum(MORE.values()))
    assert {kind: later.count(kind) for kind in MORE} == {kind: 3 * n for kind, n in MORE.items()}
    assert len(load_items(path)) == len(rows)
    assert generate("valid", 3, tmp_path / "set").read_text() == text


@pytest.mark.parametrize("split", ["train", "all"])
def test_the_training_split_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(UsageError, match=f"not from '{split}'"):
        generate(split, 1, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(SystemExit) as error:
        accuracy.arguments(["--split", split])
    assert error.value.code == 2


def test_no_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(["--model", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert f"There is no model in {tmp_path}" in told.err
    assert told.out == ""
