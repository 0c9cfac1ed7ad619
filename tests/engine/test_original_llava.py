"""LongVA, LLaVA-OneVision and LLaVA-Video from folders in their authors' format, against the oracle.

One engine a layout, with small steps: prompts are deferred over several chunks, and requests share batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from metok_vllm.demo.original_checkpoint import Kind
from tests.engine.test_oracle import ATOL, cases
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import OracleResult, assert_same
from tests.support.oracle.originals import load_original, time_instruction
from tests.support.oracle.samples import scene_video

# Seed and server settings of each.
KINDS: dict[Kind, tuple[int, dict[str, Any]]] = {
    "longva": (31, {}),
    "longva-dpo": (33, {"decode_retention": 0.5, "aligner": "none"}),
    "llava-onevision": (35, {}),
    "llava-video": (37, {"preset": "balanced", "keep_ratio": 0.6}),
}


PREFACE = "You watch a film with care and say only what you have seen in it. " * 18


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed, server = KINDS[request.param]
    sample = load_original(tmp_path_factory.mktemp("model"), request.param, seed=seed)
    # A pool too small for many requests at once.
    with engine(
        sample, server, max_num_batched_tokens=400, max_num_seqs=12, max_model_len=832, num_gpu_blocks_override=62
    ) as started:
        yield started


def check(running: Engine, asked: Sequence[Case], answers: Sequence[OracleResult]) -> None:
    for case, answer in zip(asked, answers, strict=True):
        expected = running.oracle(case)
        # A decision closer than float32 can tell apart would make the comparison a coin toss, not a test.
        assert expected.score_margin > 1e-5, f"choose another seed for {case}"
        assert_same(expected, answer, ATOL)
    running.check_drained()


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    asked = cases(seed=8, max_tokens=12)
    deferred: list[int] = []
    answers = running.run(asked, lambda engine: deferred.append(len(engine.scheduler.deferral.held)))
    assert max(deferred) > 0, "no prompt went over several chunks"
    check(running, asked, answers)


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    preemptions: dict[str, int] = {}

    def watch(engine: Engine) -> None:
        preemptions.update((name, request.num_preemptions) for name, request in engine.scheduler.requests.items())

    asked = [
        Case((scene_video(seed, 24 + seed),), metok=metok, max_tokens=40)
        for seed, metok in enumerate([{"decode_retention": 1}, {"decode_retention": 0.5}, "off", None, None])
    ]
    first = running._next
    answers = running.run(asked, watch)
    pruned = [running.internal[f"r{first + i}"] for i, case in enumerate(asked) if case.metok != "off"]
    assert sum(preemptions[name] for name in pruned) > 0, "no pruned request was preempted"
    check(running, asked, answers)


def test_text_is_served_from_the_prefix_cache_and_a_pruned_video_never(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()

    def cached(case: Case) -> int:
        name = running.add(case)
        outputs: dict[str, Any] = {}
        while running.llm.llm_engine.has_unfinished_requests():
            outputs |= running.step()
        check(running, [case], [observed(outputs[name])])
        return int(outputs[name].num_cached_tokens)

    text, video = Case((), PREFACE, max_tokens=4), Case((scene_video(9, 20),), "Who?", max_tokens=4)
    assert (cached(text), cached(video), cached(video)) == (0, 0, 0)
    assert cached(text) >= running.prefix_unit
    off = replace(video, metok="off")
    assert cached(off) <= running.prefix_unit
    assert cached(off) >= running.prefix_unit


def test_times_of_frames_are_told_to_the_model_that_reads_them(running: Engine) -> None:
    """Behind each video, on a line of its own; nothing where they are not known."""
    sample: Any = running.sample
    shown, other = scene_video(5, 7), scene_video(6, 3)
    metadata = {"fps": 12.5, "total_num_frames": 70, "frames_indices": [0, 11, 22, 33, 44, 55, 66], "duration": 5.6}
    asked = [
        Case((shown,), "Who?", max_tokens=4),
        Case((shown, other), "Who?", between="\nand then\n", max_tokens=4),
        Case((shown,), "Who?", metok="off", max_tokens=4),
    ]
    plain = running.run(asked)
    timed = []
    for case in asked:
        first = (shown, metadata)
        timed.append(replace(case, videos=(first, *case.videos[1:])))  # type: ignore[arg-type]
    answers = running.run(timed)
    check(running, asked, plain)
    if not sample.tells_times:
        check(running, asked, answers)
        return
    told = time_instruction([0, 0.88, 1.76, 2.64, 3.52, 4.4, 5.28], 5.6)
    with_text = [
        replace(asked[0], question=f"{told}\nWho?", metok={"query": "Who?"}),
        replace(asked[1], between=f"\n{told}\nand then\n", metok={"query": "and then Who?"}),
        replace(asked[2], question=f"{told}\nWho?"),
    ]
    check(running, with_text, answers)
