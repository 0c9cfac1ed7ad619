"""Prefix caching stays on: text is shared as in stock vLLM, in units of all groups' blocks,
and nothing that a video stands before is ever shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.families import ATOL, PREFACE, cached_tokens
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import assert_same
from tests.support.oracle.samples import load_sample, scene_video


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=11)
    with engine(sample, max_num_batched_tokens=128, enable_prefix_caching=True) as started:
        yield started


def test_a_text_request_hits_as_in_stock_vllm(running: Engine) -> None:
    case = Case((), PREFACE + "Begin.")
    assert cached_tokens(running, case) == 0
    assert cached_tokens(running, case) >= running.prefix_unit
    # Another ending: all but the last blocks.
    assert cached_tokens(running, Case((), PREFACE + "Now end it.")) >= running.prefix_unit


def test_a_pruned_video_is_never_served_from_the_cache(running: Engine) -> None:
    video, other = scene_video(1, 20), scene_video(2, 20)
    assert cached_tokens(running, Case((video,), "Who?")) == 0
    for case in (
        Case((video,), "Who?"),  # the very same request
        Case((video,), "Where?"),
        Case((other,), "Who?"),
        Case((video,), "Who?", metok={"decode_retention": 1}),
        Case((video,), "Who?", metok={"events": 2}),
    ):
        assert cached_tokens(running, case) == 0


def test_an_unpruned_video_hits_but_only_its_own_blocks(running: Engine) -> None:
    video = scene_video(3, 14)
    assert cached_tokens(running, Case((video,), "Who?")) == 0
    # With METok off the prompt is another one: other placeholders, other hash.
    assert cached_tokens(running, Case((video,), "Who?", metok="off")) <= running.prefix_unit
    assert cached_tokens(running, Case((video,), "Who?", metok="off")) >= running.prefix_unit
    # A hit that covers the video whole, which vLLM then does not send to the worker again.
    long = "Who is it that comes in last, and what do they carry, and where do they put it down when all are gone? " * 3
    covered = Case((video,), long, metok="off")
    cached_tokens(running, covered)
    assert cached_tokens(running, covered) > 14 * 16
    # And back: what the unpruned request wrote is not what the pruned one needs.
    assert cached_tokens(running, Case((video,), "Who?")) == 0


def test_text_before_a_video_is_shared_once_it_is_written(running: Engine) -> None:
    """Requests that share a long system turn with a video request,
    queued while that one is still being deferred.
    """
    case = Case((scene_video(4, 30),), before=PREFACE, max_tokens=8)
    text = Case((), before=PREFACE, max_tokens=8)
    asked = [case, text, Case((scene_video(4, 30),), before=PREFACE, metok={"decode_retention": 1}, max_tokens=8), text]
    for one, answer in zip(asked, running.run(asked), strict=True):
        assert_same(running.oracle(one), answer, ATOL)
    running.check_drained()
    # Now that a video request alone has written it, a text request that comes later finds it.
    running.scheduler.reset_prefix_cache()
    assert cached_tokens(running, case) == 0
    assert cached_tokens(running, text) >= running.prefix_unit
    # And a deferred request publishes nothing before its deep layers have run.
    running.scheduler.reset_prefix_cache()
    first = running.add(case)
    running.step()
    assert len(running.scheduler.deferral.held) == 1
    second = running.add(text)
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    assert_same(running.oracle(text), observed(outputs[second]), ATOL)
    assert_same(running.oracle(case), observed(outputs[first]), ATOL)
    running.check_drained()
