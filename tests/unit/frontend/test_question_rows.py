"""Which of a prompt's tokens are the question's, in prompts as real chat templates render them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from metok_vllm.contract.beside import Beside, with_fields
from metok_vllm.contract.fields import ROWS_FIELD
from metok_vllm.contract.spans import UnusableItem, pruned_spans
from metok_vllm.frontend.question import turn_markers
from metok_vllm.frontend.question_rows import ITEM, MOST_TOKENS, question_parts, question_rows, text_runs, token_spans
from metok_vllm.worker.requests import of_question
from metok_vllm.worker.requests import question_rows as rows_of_items
from tests.support.fakes import Prompt, item, plan
from tests.unit.frontend.test_question import QUESTIONS, TEMPLATES, Template

VIDEO = "<video>"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def expanded(tokenizer: Any, text: str, tokens: int = 3) -> tuple[list[int], list[tuple[int, int]]]:
    """A prompt's ids with `tokens` placeholders for each video, and where the videos stand."""
    placeholder = tokenizer.convert_tokens_to_ids(VIDEO)
    ids: list[int] = []
    items: list[tuple[int, int]] = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if token == placeholder:
            items.append((len(ids), tokens))
        ids += [token] * (tokens if token == placeholder else 1)
    return ids, items


def found(tokenizer: Any, template: Template, text: str, query: str | None = None) -> tuple[list[int], tuple[int, ...]]:
    ids, items = expanded(tokenizer, text)
    markers = turn_markers(tokenizer, template.source)
    end = items[-1][0] + items[-1][1]
    return ids, question_rows(ids, items, end, tokenizer, markers, (VIDEO, *template.special), query)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_the_rows_are_the_questions_tokens(tokenizer: Any, template: Template, question: str) -> None:
    turns = [("user", f"{VIDEO}\nWhat was that?"), ("assistant", "A video."), ("user", f"{question}\n")]
    ids, rows = found(tokenizer, template, template.render(tokenizer, turns))
    text = tokenizer.decode([ids[row] for row in rows])
    assert question in text
    assert rows == tuple(range(rows[0], rows[-1] + 1))
    inner = tokenizer.decode([ids[row] for row in rows[1:-1]])
    assert inner.strip("\ufffd") in question, "only the first and the last token may hold something else"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_text_between_videos_is_part_of_it(tokenizer: Any, template: Template) -> None:
    if template.parts:
        pytest.skip("this template puts all videos in front")
    ids, rows = found(tokenizer, template, template.render(tokenizer, [("user", f"{VIDEO} and {VIDEO}\nWhich?")]))
    second = ids.index(tokenizer.convert_tokens_to_ids(VIDEO), rows[0])
    assert tokenizer.decode([ids[row] for row in rows if row < second]).strip() == "and"
    assert tokenizer.decode([ids[row] for row in rows if row > second]).startswith("Which?")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_a_question_in_front_of_the_video_is_not_found_behind_it(tokenizer: Any, template: Template) -> None:
    if template.parts:
        pytest.skip("this template puts all videos in front")
    assert found(tokenizer, template, template.render(tokenizer, [("user", f"Which? {VIDEO}")]))[1] == ()


def test_another_template_is_not_guessed_at(tokenizer: Any) -> None:
    text = TEMPLATES["vicuna"].render(tokenizer, [("user", f"{VIDEO}\nWhich?")])
    assert found(tokenizer, TEMPLATES["gemma"], text)[1] == ()
    ids, items = expanded(tokenizer, text)
    assert question_rows(ids, items, 0, tokenizer, None, ()) == ()


@pytest.mark.parametrize(("query", "is_there"), [("What was", True), ("  that? ", True), ("Why", False), (" ", False)])
def test_a_stated_question_is_looked_for_in_the_prompt(tokenizer: Any, query: str, is_there: bool) -> None:
    template = TEMPLATES["chatml"]
    turns = [("user", f"{VIDEO}\nWhat was that?"), ("assistant", "A video."), ("user", "And then?")]
    ids, rows = found(tokenizer, template, template.render(tokenizer, turns), query)
    assert bool(rows) == is_there
    assert not rows or query.strip() in tokenizer.decode([ids[row] for row in rows])


def test_what_the_model_reads_behind_a_video_is_not_the_users() -> None:
    markers = turn_markers_of("<user>", "</user>")
    text = f"<user>{ITEM}\nThe video lasts for 3 s.\n  Who?  </user><bot>"
    assert [text[a:b] for a, b in question_parts(text, markers, ("The video lasts for 3 s.",), None)] == ["Who?"]
    assert [text[a:b] for a, b in question_parts(text, markers, (), None)] == ["The video lasts for 3 s.\n  Who?"]


def turn_markers_of(start: str, end: str) -> Any:
    from metok_vllm.frontend.question import TurnMarkers

    return TurnMarkers(start, end)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_spans_cover_the_text_whatever_it_is(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    decoded = token_spans(tokenizer, ids)
    assert decoded is not None
    whole, spans = decoded
    assert whole == tokenizer.decode(ids, skip_special_tokens=False)
    assert len(spans) == len(ids)
    edges = [0, *dict.fromkeys(edge for span in spans for edge in span)]
    assert list(dict.fromkeys(edges)) == sorted(set(edges))
    assert not spans or spans[-1][1] == len(whole)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_text_end(tokenizer: Any, ids: list[int]) -> None:
    """Prompts may come as ids. What is no text is decoded in pieces or refused, and never for long."""
    decoded = token_spans(tokenizer, ids)
    assert decoded is None or len(decoded[1]) == len(ids)


def test_a_tokenizer_that_decodes_otherwise_in_pieces_is_not_trusted() -> None:
    class Cleaning:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join("ab ."[i] for i in ids).replace(" .", ".")

    assert token_spans(Cleaning(), [0, 1]) == ("ab", [(0, 1), (1, 2)])
    assert token_spans(Cleaning(), [0, 2, 3]) is None


def test_a_long_text_is_not_looked_through(tokenizer: Any) -> None:
    ids, items = expanded(tokenizer, TEMPLATES["chatml"].render(tokenizer, [("user", f"{VIDEO}\nWho?")]))
    long = ids[:-1] + [ids[-1]] * MOST_TOKENS
    assert question_rows(long, items, 0, tokenizer, turn_markers(tokenizer, TEMPLATES["chatml"].source), ()) == ()


def test_runs_of_text() -> None:
    assert text_runs(10, [(0, 2), (2, 3), (7, 1)]) == [(0, 0), (2, 2), (5, 7), (8, 10)]


# --- on their way to the worker ---


def test_rows_travel_and_do_not_name_the_video() -> None:
    prompt = Prompt((3, 5), (plan(10),))
    features = prompt.features("r")
    with_rows, without = (with_fields(features, Beside(18, (7,), rows=rows).fields()) for rows in ((13, 15), ()))
    assert rows_of_items(with_rows) == (13, 15)
    assert rows_of_items(without) == ()
    assert [one.identifier for one in with_rows] == [one.identifier for one in without]
    assert pruned_spans(with_rows, 18) == pruned_spans(without, 18)


@pytest.mark.parametrize("rows", [[1, 18], [2, 13], [1, -1], [-1], []])
def test_rows_outside_the_prompt_are_refused(rows: list[int]) -> None:
    (feature,) = Prompt((3, 5), (plan(10),)).features("r")
    feature.data = item({**{k: v.data for k, v in feature.data.items()}, ROWS_FIELD: torch.tensor(rows).long()})
    with pytest.raises(UnusableItem):
        pruned_spans([feature], 18)


def test_rows_score_among_those_that_may() -> None:
    may = np.array([False] * 5 + [True] * 4 + [False] + [True] * 2)
    asked, which = of_question(may, (2, 6, 9, 11), 10)
    assert (np.flatnonzero(asked).tolist(), which) == ([6, 11], "question")
    for rows in ((), (6,), (9,)):
        asked, which = of_question(may, rows, 10)
        assert asked is may, "nothing of the question behind the last video: all text scores"
        assert which == "text"
