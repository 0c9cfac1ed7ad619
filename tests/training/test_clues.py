"""Clues are labels: checked against the scene graph, and that every phrase ends where a token does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from training.clues import (
    _COLUMN,
    CHOOSING,
    MEANING,
    SEEING,
    STATIC,
    TIMES,
    WIDTH,
    Clues,
    ReadOuts,
    meant,
    options,
    phrases,
    seen,
    sequel,
    when,
)
from training.packing import Coder, Encoded, collate, pick, stock_plan
from training.questions import KINDS, LESSONS, all_questions, draw
from training.tokenizer import END, load_tokenizer
from training.world import DIGITS, SCENES, SHAPES, WORDS, Item, make_video


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Coder:
    return Coder(load_tokenizer(Path(tmp_path_factory.mktemp("run"))))


def names(row: torch.Tensor) -> set[tuple[str, str]]:
    return {pair for pair, n in _COLUMN.items() if row[n]}


def test_phrases_end_at_tokens_and_name_what_they_stand_for(coder: Coder) -> None:
    found = set()
    for seed in range(60):
        video = make_video(seed)
        rng = random.Random(seed)
        stock = all_questions(video, lessons=True)
        for kind in (*KINDS, *LESSONS, "option"):
            q = draw(video, kind, rng, stock)
            if q is None:
                continue
            ids = coder.ids(coder.asked(q))
            assert len(q.plain) > 0 or q.kind not in ("letter", "option")
            for end, things in phrases(q):
                token = coder.token_at(coder.asked(q), 1 + end)
                assert coder.tok.decode([ids[token]]).strip() == q.text[:end].split()[-1]
                found.add(q.kind)
                for thing in things:
                    if isinstance(thing, Item):
                        labels = names(meant(video, (thing,), list(range(video.frames))))
                        assert (thing.kind, thing.name) in labels
                        assert ("scene", video.scene_of(thing)) in labels
    assert found >= {*KINDS, *LESSONS} - {"option"}


def test_every_word_of_a_telling_sentence_is_about_what_comes_next(coder: Coder) -> None:
    """Told of in order, each to the word before its last,
    and after the last that nothing follows; no word left out between.
    """
    seen_lengths = set()
    for seed in range(80):
        for q in all_questions(make_video(seed))["open"]:
            spans, text = sequel(q), f"{q.answer}{END}"
            seen_lengths.add(len(spans))
            assert len(spans) == len(q.told) + bool(q.told)
            ids, next_token = coder.ids(text), None
            for (begin, end, things), (phrase, meant_things) in zip(
                spans, [*q.told, (".", ())], strict=len(q.told) > 0
            ):
                first, last = coder.token_at(text, begin), coder.token_at(text, end)
                assert things == meant_things
                assert first < last
                assert next_token in (None, first)
                next_token = last
                assert coder.tok.decode([ids[last]]).strip() == phrase.split()[-1]
    assert seen_lengths >= {0, 2, 3, 4}


def test_batches_label_what_comes_next(coder: Coder) -> None:
    """In a packed batch, the labelled token is the one before the word that it must lead to."""
    checked = 0
    for seed in range(40):
        video = make_video(seed)
        asked = [q for q in all_questions(video, lessons=True)["open"] if q.told][:2]
        if len(asked) < 2:
            continue
        rows = torch.zeros(video.frames * 21, 8, dtype=torch.bfloat16)
        encoded = Encoded(video, rows, {}, seen(video))
        batch = collate(coder, [encoded], [stock_plan(video.frames)], [asked])
        assert batch.clues is not None
        for at, labels in zip(batch.clues.phrases.tolist(), batch.clues.meant, strict=True):
            target = int(batch.targets[0, at])
            if target < 0:
                continue  # a phrase of the question
            word = coder.tok.decode([target]).strip()
            told = names(labels)
            if ("absent", "yes") in told:
                assert word == "."
            elif word in SHAPES + DIGITS + WORDS + SCENES:
                assert word in {value for _, value in told}
            checked += 1
    assert checked > 100


def test_rows_tell_what_they_show_and_what_was_before() -> None:
    moved = changed = 0
    for seed in range(60):
        video = make_video(seed, (16, 24))
        rows = seen(video).view(video.frames, 21, STATIC)
        for frame in range(video.frames):
            scene = next(s for s in video.scenes if s.start <= frame < s.end)
            whole = names(rows[frame, 20])  # the one row of stride 8
            assert ("scene", scene.kind) in whole
            assert {v for g, v in whole if g == "scene's nth"} == {
                str(1 + [s.kind for s in video.scenes].index(scene.kind))
            }
            earlier = [sum(scene.start <= j.start < i.start for j in video.items) for i in video.visible(frame)]
            assert {v for g, v in whole if g == "nth"} == {str(1 + n) for n in earlier}
            assert {v for g, v in whole if g == "shape"} == {i.name for i in video.visible(frame) if i.kind == "shape"}
            for item in video.visible(frame):
                if item.kind != "shape" or len(video.visible(frame)) > 1:
                    continue
                before = frame < (item.start + item.end) // 2
                assert (("colour2", item.colour2) in whole) == (item.colour2 is not None and not before)
                changed += item.colour2 is not None and not before
                if item.direction and frame == item.start:
                    assert not {g for g, _ in whole} & {"direction", "place2"}
                if item.direction and frame == item.end - 1:
                    assert ("direction", item.direction) in whole
                    moved += 1
    assert moved > 5
    assert changed > 5


def test_a_scene_and_its_things_are_known_by_their_place_in_line() -> None:
    video = next(v for v in map(make_video, range(100)) if len(v.scenes) > 2 and sum(i.scene == 1 for i in v.items) > 2)
    starts = list(range(video.frames))
    middle = names(meant(video, (video.scenes[1],), starts))
    assert middle == {("scene", video.scenes[1].kind), ("scene's nth", "2")}
    second = [i for i in video.items if i.scene == 1][1]
    assert {("nth", "2"), ("scene's nth", "2")} < names(meant(video, (second,), starts))
    assert not {("nth", n) for n in "13456"} & names(meant(video, (second,), starts))


def test_sentences_that_tell_of_several_things_are_asked_more_in_training_only() -> None:
    shares = []
    for match in (None, {"open": 0.5}):
        rng, asked = random.Random(1), []
        for seed in range(30):
            video = make_video(seed)
            asked += pick(Encoded(video, torch.zeros(0), all_questions(video)), 20, ("open",), rng, match)
        shares.append(sum(bool(q.told) for q in asked) / len(asked))
    assert 0.2 < shares[0] < 0.6
    assert 0.1 < shares[1] - shares[0] < 0.3


def test_a_thing_that_is_not_there_is_only_absent() -> None:
    assert names(meant(make_video(0), (), [3])) == {("absent", "yes")}


def test_times_are_a_thermometer() -> None:
    table = when(torch.arange(1200)).int()
    assert table.shape == (1200, len(TIMES))
    assert (table.diff(dim=0) >= 0).all()
    assert (table.diff(dim=1) <= 0).all()
    assert table[2].sum() == 0
    assert table[-1].all()


def test_options_end_at_tokens_and_one_is_right(coder: Coder) -> None:
    asked = [(draw(make_video(seed), "letter", random.Random(seed))) for seed in range(30)]
    assert sum(q is not None for q in asked) > 15
    for q in asked:
        if q is None:
            continue
        found = [(coder.token_at(coder.asked(q), 1 + end), right) for end, right in options(q)]
        ids = coder.ids(coder.asked(q))
        words = [coder.tok.decode([ids[token]]).strip() for token, _ in found]
        assert words == [option.split()[-1] for option in q.options]
        assert [o for o, (_, right) in zip(q.options, found, strict=True) if right] == [q.plain]


def test_read_outs_look_at_their_own_tokens_only() -> None:
    torch.manual_seed(0)
    outs = ReadOuts(16)
    rows = torch.zeros(2, 5, dtype=torch.bool)
    rows[0, 3] = rows[1, 4] = True
    labels = torch.randint(0, 2, (3, WIDTH), dtype=torch.uint8)
    right = torch.tensor([[1]], dtype=torch.uint8)
    clues = Clues(rows, labels[:2], torch.tensor([4]), labels[2:], torch.tensor([2]), right)
    states = {layer: torch.randn(2, 8, 16, requires_grad=True) for layer in (SEEING, MEANING, CHOOSING)}
    sum(outs.loss(clues, states, prefix=5)).backward()
    grads = [states[layer].grad for layer in (SEEING, MEANING, CHOOSING)]
    touched = [g.abs().sum(-1).gt(0).nonzero().tolist() for g in grads if g is not None]
    assert touched == [[[0, 3], [1, 4]], [[1, 6]], [[0, 7]]]
