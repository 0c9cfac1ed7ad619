"""Qwen3-VL with experts against the oracle, a dual tower beside it; what it shares with the dense one is in
`test_qwen3.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.test_qwen3 import LAYERS, LIMITS, cases, film, kind_of_border, timed
from tests.support.families import PREFACE, cached_tokens, check, check_cut, check_in_chunks, check_preempted
from tests.support.harness import Case, Engine, engine
from tests.support.oracle.qwen3_samples import Qwen3Sample, load_qwen3
from tests.support.towers import with_dual_tower


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sample = load_qwen3(tmp_path_factory.mktemp("model"), "qwen3-vl-moe", seed=7, deepstack=(1, 2, 3))
    towers = with_dual_tower(sample.path, "siglip", seed=8)
    server: dict[str, Any] = {"preset": "balanced", "keep_ratio": 0.6, "prune_layers": LAYERS}
    with engine(sample, server, **LIMITS) as started:
        started.towers = towers
        yield started


def test_the_model_has_experts(running: Engine) -> None:
    assert running.runner.model_config.is_moe
    assert running.runner.model_config.architectures == ["METokQwen3VLMoeForConditionalGeneration"]


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    check_in_chunks(running, cases())


def test_each_alone(running: Engine) -> None:
    for case in (cases(6)[2], cases(6)[10]):
        (answer,) = running.run([case])
        check(running, [case], [answer])


def test_a_prompt_may_be_cut_inside_a_timestamp(running: Engine) -> None:
    shown = film(20, 3, 5)

    def asked(words: int) -> Case:
        return Case((shown,), before="so " * words, metok={"decode_retention": 0}, max_tokens=4)

    check_cut(running, asked, kind_of_border, ("in a frame", "in a timestamp", "between pairs"))


def test_a_dual_tower_looks_at_the_first_of_each_pair(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert running.runner.model.metok_aligner is not None
    asked = [
        Case((film(24, 4, 6), film(15, 5, 3)), "Which of them is about a band that leaves?", max_tokens=6),
        Case((timed(film(17, 4, 4), 31.0, 29.97),), metok={"query": "Who plays the drums?"}, max_tokens=6),
        Case((film(18, 4, 5),), metok={"aligner": "embedding"}, max_tokens=6),
    ]
    check(running, asked, running.run(asked))
    right = running.oracle(asked[0])
    second = {True: slice(1, None, 2), False: slice(None, None, 2)}  # an odd number's last pair has one frame
    monkeypatch.setattr(Qwen3Sample, "looked_at", lambda sample, video: video[second[len(video) % 2 == 0]])
    others = running.oracle(asked[0])
    monkeypatch.setattr(running, "towers", None)
    embedded = running.oracle(asked[0])
    chosen = [[video.strides for video in result.videos or ()] for result in (right, others, embedded)]
    assert chosen[0] != chosen[1], "the other frames of the pairs would have done"
    assert chosen[0] != chosen[2], "the tower decided nothing that the embeddings would not have decided"


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    asked = [
        Case((film(20 + 2 * place, 4, 5 + place % 2),), metok=metok, max_tokens=60)
        for place, metok in enumerate([None, {"decode_retention": 0.5}, "off", {"quota": "event"}, None, None])
    ]
    check_preempted(running, asked)


def test_text_is_served_from_the_prefix_cache_and_a_pruned_video_never(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    text, video = Case((), PREFACE, max_tokens=4), Case((film(12, 4, 4),), "Who?", max_tokens=4)
    assert [cached_tokens(running, case) for case in (text, video, video)] == [0, 0, 0]
    assert cached_tokens(running, text) >= running.prefix_unit
    asked = replace(video, metok="off", question="Who? " + PREFACE)
    cached_tokens(running, asked)
    assert cached_tokens(running, asked) >= running.prefix_unit
    running.scheduler.reset_prefix_cache()
