"""Answers, checked by walking the video frame by frame instead of trusting the code that asks."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from training.make_set import write_set
from training.questions import (
    ASKERS,
    KINDS,
    Question,
    all_questions,
    draw,
    form,
    format_prompt,
    questions,
    with_options,
)
from training.relevance import Focus, focus_of
from training.world import COLOURS, SHAPES, Item, Video, make_video, place_of

Sighting = tuple[int, Item]


def sightings(v: Video, phrase: str) -> list[Sighting]:
    """Every (frame, item) that a phrase such as "red star", "digit 7" or "word cat" fits."""
    words = phrase.split()
    out = []
    for t in range(v.frames):
        for i in v.visible(t):
            label = [i.kind, i.name] if i.kind != "shape" else [i.colour_at(t), i.name][-len(words) :]
            if label == words:
                out.append((t, i))
    return out


def scene_at(v: Video, t: int) -> str:
    return next(s.kind for s in v.scenes if s.start <= t < s.end)


def expected(v: Video, text: str) -> set[str]:
    """The right answers, found without :mod:`training.questions`; more than one means the question is bad."""

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, text)

    frames = range(v.frames)
    if m := match(r"Which shape was (\w+)\?"):
        return {i.name for t in frames for i in v.visible(t) if i.colour_at(t) == m[1]}
    if m := match(r"Which shape appeared in the (\w+)\?"):
        return {i.name for t in frames for i in v.visible(t) if i.kind == "shape" and scene_at(v, t) == m[1]}
    if m := match(r"What colour was the (\w+)\?"):
        return {i.colour_at(t) or "" for t, i in sightings(v, m[1])}
    if m := match(r"Where was the (.+)\?"):
        return {place_of(i.centre(t)) for t, i in sightings(v, m[1])}
    if m := match(r"How many times did a (\w+) appear\?"):
        return {str(len({id(i) for _, i in sightings(v, m[1])}))}
    if m := match(r"Which came (first|last), the (.+) or the (.+)\?"):
        begin = {p: sightings(v, p)[0][0] for p in (m[2], m[3])}
        assert begin[m[2]] != begin[m[3]]
        return {(min if m[1] == "first" else max)(begin, key=lambda p: begin[p])}
    if m := match(r"In which scene was the (.+)\?"):
        return {scene_at(v, t) for t, _ in sightings(v, m[1])}
    if m := match(r"Did an? (\w+ \w+) appear\?") or match(r"Was the (\w+ \w+) shown\?"):
        return {"yes" if sightings(v, m[1]) else "no"}
    if m := match(r"What (word|digit) was shown in the (\w+)\?"):
        return {i.name for t in frames for i in v.visible(t) if i.kind == m[1] and scene_at(v, t) == m[2]}
    if m := match(r"What was the (word|digit)\?"):
        return {i.name for t in frames for i in v.visible(t) if i.kind == m[1]}
    if m := match(r"Which way did the (\w+) move\?"):
        seen = sightings(v, m[1])
        (x, y), (x2, y2) = seen[0][1].centre(seen[0][0]), seen[-1][1].centre(seen[-1][0])
        sideways = abs(x2 - x) > abs(y2 - y)
        return {("right" if x2 > x else "left") if sideways else ("down" if y2 > y else "up")}
    if m := match(r"What colour did the (\w+) turn into\?"):
        t, i = sightings(v, m[1])[-1]
        return {i.colour_at(t) or ""}
    raise AssertionError(f"no rule for {text!r}")


def check_open(v: Video, q: Question) -> None:
    assert len(q.answer.split()) >= 8
    words = re.findall(r"\w+", q.answer)
    if q.text == "List the scenes in order.":
        assert [w for w in words if w in {s.kind for s in v.scenes}] == [s.kind for s in v.scenes]
        return
    m = re.fullmatch(r"Describe the (\w+) in a sentence\.", q.text)
    assert m
    if m[1] in SHAPES:
        seen = sightings(v, m[1])
        assert words[2] == scene_at(v, seen[0][0])
        told = [w for w in words if w in COLOURS]
        assert told == list(dict.fromkeys(i.colour_at(t) for t, i in seen))
        first = seen[0]
        assert place_of(first[1].centre(first[0])) in q.answer
    else:
        order: list[str] = []
        for t in range(v.frames):
            for i in v.visible(t):
                if scene_at(v, t) == m[1] and i.name not in order:
                    order.append(i.name)
        repeats = [w for w in words[3:] if w in order]
        assert list(dict.fromkeys(repeats)) == order


def test_every_answer_follows_from_the_frames() -> None:
    checked: Counter[str] = Counter()
    for seed in range(80):
        v = make_video(seed)
        for kind, asked in all_questions(v).items():
            for q in asked:
                checked[kind] += 1
                if kind == "open":
                    check_open(v, q)
                else:
                    assert expected(v, q.text) == {q.answer}, (seed, q)
                assert all(0 <= a < b <= v.frames for a, b in q.about)
    assert set(checked) == set(ASKERS)
    assert min(checked.values()) >= 20, checked


def test_letters_point_at_the_only_right_option() -> None:
    letters: Counter[str] = Counter()
    for seed in range(150):
        v = make_video(seed)
        q = draw(v, "letter", random.Random(seed))
        if q is None:  # the question underneath was a count of one, which is mostly passed over
            continue
        assert len(set(q.options)) == 4
        assert q.options["ABCD".index(q.answer)] in expected(v, q.text)
        assert q.prompt.count("\n") == 5
        letters[q.answer] += 1
    assert min(letters[x] for x in "ABCD") > 20


def test_yes_and_no_are_even_and_kinds_are_many() -> None:
    verdicts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for seed in range(200):
        v = make_video(seed)
        q = draw(v, "exists", random.Random(seed))
        if q is not None:
            verdicts[q.answer] += 1
        kinds.update(q.kind for q in questions(v, 12, random.Random(seed)))
    assert abs(verdicts["yes"] - verdicts["no"]) < 45
    assert set(kinds) == set(KINDS)
    assert len(KINDS) >= 8


def test_questions_are_deterministic_and_distinct() -> None:
    v = make_video(11)
    first, again = (questions(v, 12, random.Random(5)) for _ in range(2))
    assert first == again
    assert len({(q.kind, q.text) for q in first}) == len(first) == 12


def test_prompt_format() -> None:
    assert format_prompt("Which?", ()) == "Which?"
    assert format_prompt("Which?", ["a", "b"]) == "Which?\nA. a\nB. b\nAnswer with the letter."


@pytest.mark.parametrize(
    ("text", "focus"),
    [
        ("What colour was the star?", [Focus("shape", "star")]),
        ("Where was the red circle?\nA. blue", [Focus("shape", "circle", "red")]),
        ("Which shape appeared in the sea?", [Focus("shape", None, None, "sea")]),
        ("Which came first, the digit 7 or the ring?", [Focus("digit", "7"), Focus("shape", "ring")]),
        ("Describe the cave in a sentence.", [Focus(scene="cave")]),
        ("List the scenes in order.", []),
    ],
)
def test_focus(text: str, focus: list[Focus]) -> None:
    assert focus_of(text) == focus


def test_relevant_frames_are_those_the_answer_needs() -> None:
    tried = 0
    for seed in range(40):
        v = make_video(seed)
        stock = all_questions(v)
        for q in stock["colour"] + stock["word"] + stock["move"]:
            shown = {t for t in range(v.frames) if any(f.shown(v, t) for f in focus_of(q.text))}
            assert shown == {t for a, b in q.about for t in range(a, b)}
            tried += 1
    assert tried > 50


def test_make_set_writes_what_the_benchmark_reads(tmp_path: object) -> None:
    import json
    from pathlib import Path

    out = Path(str(tmp_path))
    rows = [json.loads(line) for line in write_set("valid", 5, 2, 6, out).read_text().splitlines()]
    assert len(rows) == 12
    assert {r["video"] for r in rows} == {"valid_00005.mp4", "valid_00006.mp4"}
    assert all((out / r["video"]).stat().st_size > 500 for r in rows)
    assert all(r["options"] if r["kind"] == "letter" else not r["options"] for r in rows)


def test_evaluation_reports_what_a_sentence_tells_of() -> None:
    forms = Counter(form(q) for seed in range(60) for q in all_questions(make_video(seed))["open"])
    assert set(forms) == {"one thing", "scene of 1", "scene of 2", "3 scenes", "4 scenes"}
    two = [q for seed in range(60) for q in all_questions(make_video(seed))["open"] if form(q) == "scene of 2"]
    assert all(" and then " in q.answer for q in two)
    lettered = with_options(Question("colour", "What colour was the star?", "red"), make_video(0), random.Random(0))
    assert form(replace(lettered, of="colour")) == "colour"
