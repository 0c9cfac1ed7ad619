"""The dials of the choice (docs/method.md section 4.6) in the engine, against the oracle: each alone and all
together, in prompts of one chunk and of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same
from tests.support.oracle import run as run_oracle
from tests.support.oracle.samples import load_sample, picture, scene_video

ATOL = 1e-3
QUESTION = "Who leaves last?"


def video(seed: int, frames: int, scenes: int = 4) -> np.ndarray:
    return scene_video(700 + seed, frames, scenes)


CASES: dict[str, Case] = {
    "quota": Case((video(1, 16),), metok={"quota": "video"}),
    "quota, two videos, retention": Case(
        (video(2, 9), video(3, 14)), between="\nand then\n", metok={"quota": "video", "decode_retention": 0.5}
    ),
    "smoothing": Case((video(4, 18),), metok={"frame_smoothing": 0.5}),
    "smoothing, one event, image": Case(
        (video(5, 12),), images=(picture(1, 90, 60),), metok={"frame_smoothing": 0.3, "events": 1, "key_events": 1}
    ),
    "quota and smoothing": Case(
        (video(6, 20),), QUESTION, metok={"quota": "video", "frame_smoothing": 0.7, "decode_retention": 1}
    ),
    "rows": Case((video(8, 13),), QUESTION, metok={"score_rows": "question"}),
    "rows, several videos and an image": Case(
        (video(9, 6), video(10, 8)),
        "Wer spricht \u00fcber das \U0001f3b8?\n\nUnd wann?  ",
        images=(picture(2, 60, 80),),
        between="\n erst \u00e9l und \U0001f9ff dann \n",
        metok={"score_rows": "question", "decode_retention": 0.5},
    ),
    "all of them": Case(
        (video(11, 17), video(12, 5)),
        QUESTION,
        metok={"quota": "video", "score_rows": "question", "frame_smoothing": 0.4, "decode_retention": 0.3},
    ),
    "none of them": Case((video(7, 15),)),
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=21)
    with engine(sample, max_num_batched_tokens=96, max_num_seqs=8) as started:
        yield started


def answers(running: Engine, asked: list[Case]) -> list[Any]:
    """Their answers, and whether any of them was deferred: some prompts must take several chunks."""
    deferred = 0

    def watch(engine: Engine) -> None:
        nonlocal deferred
        deferred += any(request.chunks for request in engine.runner.model_state.pruned.by_id.values())

    found = running.run(asked, watch)
    assert deferred
    return found


def test_every_dial_equals_the_oracle(running: Engine) -> None:
    asked = list(CASES.values())
    for (name, case), answer in zip(CASES.items(), answers(running, asked), strict=True):
        expected = running.oracle(case)
        assert expected.score_margin > 1e-5, f"choose another seed for {name}"
        assert_same(expected, answer, ATOL)
    running.check_drained()


@pytest.mark.parametrize("query", ["Who plays the drums?", "leaves"])
def test_a_stated_question_scores_where_the_prompt_has_it(running: Engine, query: str) -> None:
    """Else all text does, as the oracle of such a request has it."""
    case = Case((video(13, 14),), QUESTION, metok={"score_rows": "question", "query": query}, max_tokens=4)
    (answer,) = running.run([case])
    settings = case.settings(running.server)
    ids = running.prompt_ids(case)
    words = [running.sample.processor.tokenizer.decode([token]) for token in ids]
    first = "".join(words).rfind(query)  # all of it is ASCII, so tokens are whole characters
    starts = [len("".join(words[:i])) for i in range(len(words))]
    at = [i for i, s in enumerate(starts) if first < s + len(words[i]) and s < first + len(query)]
    assert (first >= 0) == (query == "leaves")
    expected = run_oracle(
        running.sample.model,
        ids,
        [running.sample.pixels(one) for one in case.videos],
        None,
        running.sample.question_ids(query),
        settings,
        case.max_tokens,
        question_at=at if first >= 0 else None,
    )
    assert_same(expected, answer, ATOL)


@pytest.mark.parametrize("name", [name for name in CASES if name != "none of them"])
def test_a_dial_makes_a_difference(running: Engine, name: str) -> None:
    """Else the comparison above would say nothing of it."""
    case = CASES[name]
    plain = replace(case, metok={key: value for key, value in case.metok.items() if key not in DIALS})
    ours, without = running.oracle(case), running.oracle(plain)
    assert ours.videos is not None
    assert without.videos is not None
    assert any(
        (a.after_l1, a.after_l2) != (b.after_l1, b.after_l2) for a, b in zip(ours.videos, without.videos, strict=True)
    )


DIALS = ("quota", "score_rows", "frame_smoothing")
