"""The engine against the oracle: same tokens, logprobs within 1e-3,
over shapes, settings, lengths and mixtures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, picture, scene_video

ATOL = 1e-3

# Each shape starts one engine: depth, heads with and without grouped queries, tower grid, seed, server
# settings.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "8 layers, grouped queries, 7x7": ({"seed": 0}, {}),
    "3 layers, one KV head, 9x9": (
        {"seed": 1, "layers": 3, "heads": 4, "kv_heads": 1, "image_size": 72},
        {"decode_retention": 0.5, "aligner": "none"},
    ),
    "12 layers, no grouping, 5x5": (
        {"seed": 2, "layers": 12, "heads": 4, "kv_heads": 4, "image_size": 40},
        {"preset": "balanced", "keep_ratio": 0.6, "prune_layers": [2, 5, 12]},
    ),
}


DIALS = {
    "quota": "video",
    "score_rows": "question",
    "frame_smoothing": 0.5,
    "final_keep": 0.5,
    "decode_retention": 0.25,
}
"""Every dial of the choice at once; each alone: `test_dials.py`."""


def cases(seed: int, max_tokens: int = 24) -> list[Case]:
    """Requests that differ in everything a request can differ in."""

    def video(frames: int, scenes: int = 4) -> np.ndarray:
        return scene_video(100 * seed + frames, frames, scenes)

    asked = [
        Case((video(16),)),
        Case((video(33, 6),), metok={"decode_retention": 1}),
        Case((video(20),), "Where?", metok={"decode_retention": 0.5, "events": 7, "key_events": 2, "key_frames": 1}),
        Case((video(1, 1),)),
        Case((video(2, 2),), metok={"decode_retention": 1, "aligner": "none"}),
        Case((video(7),), metok={"events": 3, "key_events": 3, "keep_ratio": 1.0, "strides": [1, 2, 3]}),
        Case((video(16),), "How many?", metok={"events": 1, "key_frames": 0}),
        Case((video(24),), metok={"token_budget": 150, "decode_retention": 0.25}),
        Case((video(12),), metok="off"),
        Case((), "Say something without a video."),
        Case((video(9), video(18)), between="\nand then\n"),
        Case((video(5), video(11), video(14)), "Which one?", metok={"decode_retention": 0.5}),
        Case((video(10),), images=(picture(seed, 90, 60),), metok={"decode_retention": 1}),
        Case((), "What is in the picture?", images=(picture(seed + 1, 50, 70),)),
        Case((video(16),), metok={"query": "Who plays the drums?"}),
        Case((video(15), video(8)), "Who is it?", metok=DIALS),
    ]
    return [replace(case, max_tokens=max_tokens) for case in asked]


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    shape, server = SHAPES[request.param]
    sample = load_sample(tmp_path_factory.mktemp("model"), **shape)
    with engine(sample, server, max_num_batched_tokens=2048) as started:
        yield started


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = cases(seed=8)
    answers = running.run(asked)
    pruned = 0
    for case, answer in zip(asked, answers, strict=True):
        expected = running.oracle(case)
        # A decision closer than float32 can tell apart would make the comparison a coin toss, not a test.
        assert expected.score_margin > 1e-5, f"choose another seed for {case}"
        assert_same(expected, answer, ATOL)
        pruned += sum(len(v.after_l2 or ()) < v.span[1] - v.span[0] for v in expected.videos or () if v.after_l2)
    assert pruned > 5
    running.check_drained()


def test_each_alone_equals_the_batch(running: Engine) -> None:
    asked = cases(seed=4, max_tokens=8)
    together = running.run(asked)
    order = np.random.default_rng(0).permutation(len(asked))
    shuffled = running.run([asked[i] for i in order])
    for place, i in enumerate(order):
        assert shuffled[place].tokens == together[i].tokens, f"case {i}: {asked[i]}"
    for case, answer in zip(asked[8:12], together[8:12], strict=True):
        (alone,) = running.run([case])
        assert alone.tokens == answer.tokens, case
    running.check_drained()


def test_a_preset_stated_by_the_request(running: Engine) -> None:
    video = scene_video(77, 18)
    (answer,) = running.run([Case((video,), metok={"preset": "balanced"})])
    assert_same(running.oracle(Case((video,), metok={"decode_retention": 1, "quota": "video"})), answer, ATOL)


def test_blocks_are_what_the_text_needs(running: Engine) -> None:
    """Deep groups hold blocks for text alone; the shallow group for every token that stage 1 left."""
    from metok_vllm.scheduler.kv_manager import DeepKVManager

    case = Case((scene_video(5, 40),), metok={"decode_retention": 0}, max_tokens=4)
    request_id = running.add(case)
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    answer = observed(outputs[request_id])
    expected = running.oracle(case)
    seen = running.groups_seen[running.internal[request_id]]
    first, _second, third = expected.prune_layers or (0, 0, 0)
    text = len(expected.kv_positions[-1]) if third < len(expected.kv_positions) else len(expected.kv_positions[first])
    prompt = len(answer.prompt_ids)
    for manager, held in zip(running.managers, seen[0], strict=True):
        size = manager.block_size
        tokens = text if isinstance(manager, DeepKVManager) else prompt
        assert held == -(-tokens // size), f"{type(manager).__name__} holds {held} blocks for {tokens} tokens"
    assert prompt > 2 * text, "the video must dominate for this to say something"
    running.check_drained()
