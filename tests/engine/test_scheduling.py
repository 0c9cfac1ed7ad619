"""Chunks, preemption, abort: the answer never depends on how the work was cut, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from metok_vllm.contract.admission import HOOK
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import assert_same
from tests.support.oracle.samples import Sample, load_sample, picture, scene_video

ATOL = 1e-3


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    return load_sample(tmp_path_factory.mktemp("model"), seed=5)


def requests(max_tokens: int = 24) -> list[Case]:
    """Prompts of several chunks each, whose borders fall inside frames,
    between videos and inside the question.
    """
    return [
        Case((scene_video(1, 30),), metok={"decode_retention": 0.5}, max_tokens=max_tokens),
        Case((scene_video(2, 12), scene_video(3, 21)), between="\nand then\n", max_tokens=max_tokens),
        Case((), "A question without any video, long enough for two chunks " * 4, max_tokens=max_tokens),
        Case((scene_video(4, 17),), images=(picture(1, 80, 60),), metok={"decode_retention": 1}, max_tokens=max_tokens),
        Case((scene_video(5, 16),), metok="off", max_tokens=max_tokens),
    ]


@pytest.fixture(scope="module", params=[32, 50, 129])
def chunked(request: pytest.FixtureRequest, sample: Sample) -> Iterator[Engine]:
    with engine(sample, max_num_batched_tokens=request.param, max_num_seqs=8) as started:
        yield started


def test_chunks_do_not_change_the_answer(chunked: Engine) -> None:
    deferred: list[int] = []

    def watch(running: Engine) -> None:
        held = running.runner.model_state.pruned.deferred_bytes
        reserved = sum(running.scheduler.deferral.held.values())
        assert held <= reserved, "a worker holds more than the scheduler has reserved"
        deferred.append(held)

    asked = requests()
    for case, answer in zip(asked, chunked.run(asked, watch), strict=True):
        assert_same(chunked.oracle(case), answer, ATOL)
    assert max(deferred) > 0, "nothing was deferred"
    chunked.check_drained()


def test_a_chunked_prompt_keeps_its_question(sample: Sample) -> None:
    """vLLM 0.33 takes a video's data away from the worker once its tokens are computed, so here too."""
    dropped = 0

    def drop(running: Engine) -> None:
        nonlocal dropped
        for features in running.runner.encoder_cache.mm_features.values():
            for i, feature in enumerate(features):
                dropped += feature.data is not None
                features[i] = replace(feature, data=None)

    with engine(sample, {"status_shows_questions": True}, max_num_batched_tokens=50) as running:
        running.run([Case((scene_video(1, 30),), max_tokens=2)], drop)
        (shown,) = running.runner.model_state.reports.recent()
    assert dropped == 1
    assert shown["question_ids"] == sample.question_ids()


@pytest.fixture(scope="module")
def cramped(sample: Sample) -> Iterator[Engine]:
    """A pool too small for all requests at once."""
    with engine(
        sample, max_model_len=640, max_num_batched_tokens=256, max_num_seqs=8, num_gpu_blocks_override=62
    ) as started:
        yield started


def test_preempted_requests_continue_with_the_same_survivors(cramped: Engine) -> None:
    preemptions: dict[str, int] = {}

    def watch(running: Engine) -> None:
        for request_id, request in running.scheduler.requests.items():
            preemptions[request_id] = request.num_preemptions

    # Long answers, so that requests outgrow the pool while they decode and are resumed with tokens of their
    # own.
    asked = [*requests(60), *requests(60)]
    answers = cramped.run(asked, watch)
    pruned = [cramped.internal[f"r{i}"] for i in range(len(asked)) if i % 5 in (0, 1, 3)]
    assert sum(preemptions[request_id] for request_id in pruned) > 0, "no pruned request was preempted"
    for case, answer in zip(asked, answers, strict=True):
        assert_same(cramped.oracle(case), answer, ATOL)
    cramped.check_drained()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_an_aborted_request_leaves_nothing(chunked: Engine, steps: int) -> None:
    """Aborted when queued, mid-prompt or while decoding, beside a request that must not notice."""
    victim = Case((scene_video(9, 26),), metok={"decode_retention": 1}, max_tokens=40)
    neighbour = Case((scene_video(8, 14),), max_tokens=12)
    victim_id, neighbour_id = chunked.add(victim), chunked.add(neighbour)
    outputs: dict[str, Any] = {}
    for _ in range(steps):
        outputs |= chunked.step()
    chunked.llm.llm_engine.abort_request([victim_id])
    while chunked.llm.llm_engine.has_unfinished_requests():
        outputs |= chunked.step()
    assert victim_id not in outputs
    assert_same(chunked.oracle(neighbour), observed(outputs[neighbour_id]), ATOL)
    chunked.check_drained()


def test_several_samples_of_one_request(cramped: Engine) -> None:
    """n = 2 and one token, so cold that chance decides nothing:
    vLLM takes no greedy request for several samples.
    """
    case = Case((scene_video(30, 20),), max_tokens=1)
    request_id = cramped.add(case, n=2, temperature=1e-3)
    outputs: dict[str, Any] = {}
    while cramped.llm.llm_engine.has_unfinished_requests():
        outputs |= cramped.step()
    expected = cramped.oracle(case).tokens
    assert [list(c.token_ids) for c in outputs[request_id].outputs] == [expected, expected]
    cramped.check_drained()


def test_prompt_logprobs_of_a_pruned_prompt_are_refused(cramped: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence when they are asked for; and should that be got round, the request ends with an error
    instead of numbers that mean nothing. One beside it does not notice.
    """
    with pytest.raises(VLLMValidationError, match="prompt_logprobs do not exist"):
        cramped.add(Case((scene_video(31, 12),)), prompt_logprobs=1)
    monkeypatch.setattr(current_platform, HOOK, lambda inputs, params: None)
    refused = cramped.add(Case((scene_video(31, 12),)), prompt_logprobs=1)
    neighbour = Case((), "Say something.", max_tokens=6)
    neighbour_id = cramped.add(neighbour)
    outputs: dict[str, Any] = {}
    while cramped.llm.llm_engine.has_unfinished_requests():
        outputs |= cramped.step()
    assert outputs[refused].outputs[0].finish_reason == "error"
    assert_same(cramped.oracle(neighbour), observed(outputs[neighbour_id]), ATOL)
    cramped.check_drained()


# Last in this file: an engine of its own ends the distributed state of those that the fixtures hold.
def test_the_deferral_buffer_is_bounded(sample: Sample) -> None:
    """With room for one deferred prompt, two are deferred one after the other,
    and both are answered right.
    """
    asked = [Case((scene_video(seed, 30),), max_tokens=6) for seed in (20, 21)]
    most = 0

    def watch(running: Engine) -> None:
        nonlocal most
        most = max(most, len(running.scheduler.deferral.held))

    with engine(sample, {"max_deferred_bytes": 800_000}, max_num_batched_tokens=96, max_num_seqs=8) as running:
        for case, answer in zip(asked, running.run(asked, watch), strict=True):
            assert_same(running.oracle(case), answer, ATOL)
        assert most == 1
        with pytest.raises(ValueError, match="max_deferred_bytes"):
            running.add(Case((scene_video(22, 60), scene_video(23, 60))))
        running.check_drained()
