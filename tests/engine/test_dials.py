"""The dials of the choice (docs/method.md section 4.6) in the engine, against the oracle: each alone and all
together, in prompts of one chunk and of several.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metok_vllm.contract.kv_spec import TEXT
from metok_vllm.contract.spans import final_bound
from metok_vllm.scheduler.kv_manager import DeepKVManager
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
    "final": Case((video(14, 16),), metok={"final_keep": 0.3}),
    "final, all": Case((video(15, 10),), QUESTION, metok={"final_keep": 1, "decode_retention": 1}),
    "final, more than is retained": Case(
        (video(16, 9), video(17, 14)), between=" then ", metok={"final_keep": 0.8, "decode_retention": 0.2}
    ),
    "final, fewer than are retained": Case((video(19, 19),), metok={"final_keep": 0.1, "decode_retention": 0.9}),
    "all of them": Case(
        (video(11, 17), video(12, 5)),
        QUESTION,
        metok={
            "quota": "video",
            "score_rows": "question",
            "frame_smoothing": 0.4,
            "final_keep": 0.25,
            "decode_retention": 0.3,
        },
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
        (a.after_l1, a.after_l2, a.after_l3) != (b.after_l1, b.after_l2, b.after_l3)
        for a, b in zip(ours.videos, without.videos, strict=True)
    )


def test_blocks_are_what_text_and_final_tokens_need(running: Engine) -> None:
    """From L3 up: for its text, and for the share `final_keep` of the most that its plan lets survive L2."""
    case = Case((video(20, 40),), metok={"final_keep": 0.5}, max_tokens=4)
    request_id = running.add(case)
    bounds: list[int] = []
    while running.llm.llm_engine.has_unfinished_requests():
        running.step()
        bounds += [final_bound(counts.spans) for counts in running.scheduler.slot_counts.values()]
    expected = running.oracle(case)
    assert expected.kv_positions is not None
    assert expected.videos is not None
    assert expected.videos[0].after_l3
    text = len(expected.kv_positions[-1]) - len(expected.videos[0].after_l3)
    assert len(expected.videos[0].after_l3) <= bounds[0]
    held = running.groups_seen[running.internal[request_id]]
    whole = next(blocks for blocks in held if blocks[0] * running.managers[0].block_size >= len(expected.prompt_ids))
    for manager, blocks in zip(running.managers, whole, strict=True):
        kept = bounds[0] if isinstance(manager, DeepKVManager) and manager.kind == TEXT else 0
        tokens = text + kept if isinstance(manager, DeepKVManager) else len(expected.prompt_ids)
        assert blocks == -(-tokens // manager.block_size), f"{blocks} blocks for {tokens} tokens"
    running.check_drained()


DIALS = ("quota", "score_rows", "frame_smoothing", "final_keep")
