"""Stage 1 alone: fewer tokens enter, and inside the language model all is stock vLLM's, its prefix cache too.

Asked for by a request of a server of three stages, or by the server: then nothing else runs there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from metok_vllm.demo.qwen3_checkpoint import TOKEN
from tests.support.families import check, check_preempted
from tests.support.harness import Case, Engine, deep_managers, engine, observed
from tests.support.oracle.internvl_samples import InternVLSample, load_internvl
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.qwen_samples import QwenSample, load_qwen
from tests.support.oracle.samples import Sample, load_sample, picture, scene_video

ONE = {"stages": 1}
LONG = "Who is it that comes in last, and what do they carry, and where do they put it down when all are gone? " * 3


KINDS = {
    "qwen2.5-vl": (3, 832, 62),
    "qwen2-vl-alone": (1, 832, 34),
    "llava-alone": (1, 512, 24),
    "internvl-alone": (1, 992, 36),
    "qwen3-vl-alone": (1, 832, 34),
    "qwen3-vl-moe": (3, 832, 62),
}
"""The stages of the servers, their longest prompt, and blocks of all groups: too few for all requests."""


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder, (stages, longest, blocks) = tmp_path_factory.mktemp("model"), KINDS[request.param]
    sample: Sample
    if request.param == "qwen2.5-vl":
        sample = load_qwen(folder, "qwen2.5-vl", seed=41)
    elif request.param == "qwen2-vl-alone":
        sample = load_qwen(folder, "qwen2-vl", seed=41)
    elif request.param == "qwen3-vl-alone":
        sample = load_qwen3(folder, "qwen3-vl", seed=3, deepstack=(1, 2, 3))
    elif request.param == "qwen3-vl-moe":
        sample = load_qwen3(folder, "qwen3-vl-moe", seed=3)
    elif request.param == "internvl-alone":
        sample = load_internvl(folder, seed=3)
    else:
        sample = load_sample(folder, seed=11)
    limits = {"max_num_batched_tokens": 272, "max_model_len": longest, "num_gpu_blocks_override": blocks}
    with engine(sample, {"stages": stages}, enable_prefix_caching=True, **limits) as started:
        yield started


def alone(running: Engine) -> bool:
    """Whether no other stage runs in this server."""
    return not deep_managers(running)


def video(running: Engine, seed: int, frames: int) -> Any:
    if not isinstance(running.sample, QwenSample):
        return scene_video(seed, frames)
    frame = TOKEN if running.sample.kind.startswith("qwen3") else 28
    return scene_video(seed, frames, side=frame * seed)


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = [
        Case((video(running, 5, 24),), metok=ONE),
        Case((video(running, 3, 17),), metok={**ONE, "aligner": "none"}),
        Case((video(running, 7, 20),), "Where?", metok={**ONE, "events": 7, "key_events": 2, "key_frames": 1}),
        Case((video(running, 4, 14),), metok={**ONE, "token_budget": 110}),
        Case((video(running, 4, 14),), metok=None if alone(running) else {"decode_retention": 1}),
        Case((video(running, 5, 12),), metok="off"),
        Case((), "Say something without a video."),
        Case((video(running, 3, 9), video(running, 5, 11)), between="\nand then\n", metok=ONE),
        Case((video(running, 4, 10),), images=(picture(3, 90, 60),), metok=ONE),
        Case((video(running, 4, 16),), metok={**ONE, "query": "Who plays the drums?"}),
    ]
    check_preempted(running, asked)


def test_nothing_is_pruned(running: Engine) -> None:
    case = Case((video(running, 5, 20),), metok=ONE, max_tokens=4)
    name = running.add(case)
    running.step()
    assert running.scheduler.slot_counts == {}
    request = running.scheduler.requests[running.internal[name]]
    while running.llm.llm_engine.has_unfinished_requests():
        running.step()
    most = [max(column) for column in zip(*running.groups_seen[running.internal[name]], strict=True)]
    for manager, blocks in zip(running.managers, most, strict=True):
        # The last token is never computed, and the one before it in the step behind which all is given back.
        least, largest = (-(-(request.num_prompt_tokens + n) // manager.kv_cache_spec.block_size) for n in (2, 3))
        assert least <= blocks <= largest
    assert alone(running) == (len(running.managers) == 1)


def hit(running: Engine, case: Case) -> tuple[int, int]:
    """Run one case against the oracle: its tokens that the prefix cache had, and where its video ends."""
    name = running.add(case)
    place = running.scheduler.requests[running.internal[name]].mm_features[0].mm_position
    outputs: dict[str, Any] = {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
    check(running, [case], [observed(outputs[name])])
    return int(outputs[name].num_cached_tokens), place.offset + place.length


def test_a_video_is_shared_by_all_that_see_it_alike(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    seen, blind = video(running, 4, 20), {**ONE, "aligner": "none"}
    case = Case((seen,), LONG + "Who?", metok=blind, max_tokens=6)
    assert hit(running, case)[0] == 0
    cached, end = hit(running, case)
    assert cached > end
    # Nothing of it depends on the question, so another question finds it, too.
    assert hit(running, replace(case, question=LONG + "Where?"))[0] > end
    # Other settings are other tokens.
    assert hit(running, replace(case, metok={**blind, "events": 2}))[0] <= running.prefix_unit
    if not alone(running):
        assert hit(running, replace(case, metok={"aligner": "none"}))[0] == 0
    assert hit(running, replace(case, metok="off"))[0] <= running.prefix_unit


def test_a_video_that_the_question_has_shaped_is_for_that_question(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    case = Case((video(running, 4, 20),), LONG + "Who?", metok=ONE, max_tokens=6)
    assert hit(running, case)[0] == 0
    cached, end = hit(running, case)
    assert cached > end
    # Another question, the same text in front of it: at most what stands before the video.
    assert hit(running, replace(case, question=LONG + "Where?"))[0] <= running.prefix_unit


def test_a_hit_may_end_inside_the_video(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    frames = 25 if running.sample.strides[0] == 2 else 24
    seed = 7 if isinstance(running.sample, InternVLSample) else 5  # of 5 two frames fit their event equally well
    case = Case((video(running, seed, frames),), "Who?", metok={**ONE, "aligner": "none"}, max_tokens=2)
    hit(running, case)
    cached, end = hit(running, case)
    assert 0 < cached < end


def test_a_server_of_stage_1_refuses_the_others(running: Engine) -> None:
    if not alone(running):
        pytest.skip("a server of all stages")
    for stated, why in (
        ({"stages": 3}, "this server was started with stages 1"),
        ({"keep_ratio": 0.5}, "'keep_ratio' has no effect"),
        ({"preset": "balanced"}, "'preset' has no effect"),
    ):
        with pytest.raises(ValueError, match=why):
            running.add(Case((video(running, 4, 8),), metok=stated))
