"""LongVA, LLaVA-OneVision and LLaVA-Video from folders in their authors' format, against the oracle.

One engine a layout, with small steps: prompts are deferred over several chunks, and requests share batches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from metok_vllm.demo.original_checkpoint import Kind
from tests.engine.test_oracle import cases
from tests.support.families import PREFACE, cached_tokens, check, check_in_chunks, check_preempted
from tests.support.harness import Case, Engine, engine
from tests.support.oracle.originals import load_original, time_instruction
from tests.support.oracle.samples import scene_video

# Seed and server settings of each.
KINDS: dict[Kind, tuple[int, dict[str, Any]]] = {
    "longva": (31, {}),
    "longva-dpo": (33, {"decode_retention": 0.5, "aligner": "none"}),
    "llava-onevision": (35, {}),
    "llava-video": (37, {"preset": "balanced", "keep_ratio": 0.6}),
}


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed, server = KINDS[request.param]
    sample = load_original(tmp_path_factory.mktemp("model"), request.param, seed=seed)
    # A pool too small for many requests at once.
    with engine(
        sample, server, max_num_batched_tokens=400, max_num_seqs=12, max_model_len=832, num_gpu_blocks_override=62
    ) as started:
        yield started


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    check_in_chunks(running, cases(seed=8, max_tokens=12))


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    asked = [
        Case((scene_video(seed, 24 + seed),), metok=metok, max_tokens=40)
        for seed, metok in enumerate([{"decode_retention": 1}, {"decode_retention": 0.5}, "off", None, None])
    ]
    check_preempted(running, asked)


def test_text_is_served_from_the_prefix_cache_and_a_pruned_video_never(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    text, video = Case((), PREFACE, max_tokens=4), Case((scene_video(9, 20),), "Who?", max_tokens=4)
    assert [cached_tokens(running, case) for case in (text, video, video)] == [0, 0, 0]
    assert cached_tokens(running, text) >= running.prefix_unit
    off = replace(video, metok="off")
    assert cached_tokens(running, off) <= running.prefix_unit
    assert cached_tokens(running, off) >= running.prefix_unit


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
