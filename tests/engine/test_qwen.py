"""Qwen2.5-VL and Qwen2-VL against the oracle: rotary positions of three axes, and grids of any size.

One engine a family, with small steps: prompts are deferred over several chunks whose borders lie inside
frames, and requests of different grids share batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metok_vllm.demo.qwen_checkpoint import QwenKind
from metok_vllm.models import qwen2_5_vl
from tests.engine.test_host_reads import ON_THE_HOST, THE_READ
from tests.support.families import ATOL, PREFACE, cached_tokens, check, check_cut, check_in_chunks, check_preempted
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import OracleResult, assert_same
from tests.support.oracle import qwen as qwen_oracle
from tests.support.oracle.qwen_samples import QwenSample, load_qwen
from tests.support.oracle.samples import picture, scene_video

# Seed and server settings of each.
KINDS: dict[QwenKind, tuple[int, dict[str, Any]]] = {
    "qwen2.5-vl": (41, {}),
    "qwen2-vl": (43, {"preset": "balanced", "keep_ratio": 0.6}),
}

TOKEN = 28
"""Pixels a side of one visual token."""

GRIDS_ON_THE_HOST = {
    "qwen2_5_vl.py:video_grid tolist",  # the front end, in the test's own process
    "qwen2_5_vl.py:video_extent __float__",
    "qwen2_5_vl.py:video_extent _local_scalar_dense",
    "extents.py:taken tolist",  # the scheduler
    "qwen2_5_vl.py:video_features tolist",  # the worker, where the grid stays on the host (`keep_on_cpu`)
}


def film(frames: int, rows: int, columns: int, scenes: int = 4) -> Any:
    """A video whose grid is `rows` x `columns`, of `frames` frames."""
    side = TOKEN * max(rows, columns)
    whole = scene_video(1000 * rows + 100 * columns + frames, frames, min(scenes, frames), side)
    return np.ascontiguousarray(whole[:, : TOKEN * rows, : TOKEN * columns])


def timed(frames: Any, seconds: float, rate: float = 25.0) -> Any:
    """The frames and when they are, out of a longer video."""
    total = int(seconds * rate)
    indices = np.linspace(0, total - 1, len(frames), dtype=int).tolist()
    return frames, {"fps": rate, "total_num_frames": total, "frames_indices": indices, "duration": seconds}


DIALS = {"quota": "video", "score_rows": "question", "frame_smoothing": 0.5, "final_keep": 0.3}


def cases(max_tokens: int = 24) -> list[Case]:
    """Requests that differ in everything a request can differ in; odd and even grids, pairs of one frame."""
    asked = [
        Case((film(24, 5, 7),)),
        Case((film(17, 3, 3),), metok={"decode_retention": 1}),
        Case(
            (film(20, 7, 5),), "Where?", metok={"decode_retention": 0.5, "events": 7, "key_events": 2, "key_frames": 1}
        ),
        Case((film(1, 4, 6, 1),)),
        Case((film(3, 6, 2, 2),), metok={"decode_retention": 1, "aligner": "none"}),
        Case((film(14, 4, 5),), metok={"events": 3, "key_events": 3, "keep_ratio": 1.0, "strides": [2, 3, 5]}),
        Case((film(16, 1, 9),), "How many?", metok={"events": 1, "key_frames": 0}),
        Case((film(30, 5, 5),), metok={"token_budget": 90, "decode_retention": 0.25}),
        Case((film(12, 5, 3),), metok="off"),
        Case((), "Say something without a video."),
        Case((film(9, 3, 5), film(18, 5, 3)), between="\nand then\n"),
        Case((film(5, 7, 3), film(11, 2, 2), film(14, 3, 7)), "Which one?", metok={"decode_retention": 0.5}),
        Case((film(10, 4, 4),), images=(picture(3, 90, 60),), metok={"decode_retention": 1}),
        Case((), "What is in the picture?", images=(picture(4, 150, 170),)),
        Case((film(16, 4, 4),), metok={"query": "Who plays the drums?"}),
        Case((timed(film(12, 3, 4), 47.0), timed(film(8, 5, 5), 3.0)), "When?", metok={"decode_retention": 0.5}),
        Case((timed(film(12, 4, 3), 31.0), film(6, 3, 3)), "When?", metok="off"),
        Case((film(22, 4, 5), film(7, 3, 3)), "Which?", metok=DIALS),
    ]
    return [replace(case, max_tokens=max_tokens) for case in asked]


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed, server = KINDS[request.param]
    sample = load_qwen(tmp_path_factory.mktemp("model"), request.param, seed=seed)
    limits = {"max_num_batched_tokens": 272, "max_num_seqs": 12, "max_model_len": 832, "num_gpu_blocks_override": 62}
    with engine(sample, server, **limits) as started:
        yield started


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    check_in_chunks(running, sent(running, cases()))


def sent(running: Engine, asked: Sequence[Case]) -> list[Case]:
    """Qwen2-VL does not read when a video's frames are."""
    sample = running.sample
    assert isinstance(sample, QwenSample)
    if sample.kind != "qwen2-vl":
        return list(asked)

    def bare(video: Any) -> Any:
        return video[0] if isinstance(video, tuple) else video

    return [replace(case, videos=tuple(map(bare, case.videos))) for case in asked]


def test_each_alone(running: Engine) -> None:
    asked = sent(running, cases(6))
    for case in (asked[0], asked[2], asked[11], asked[15]):
        (answer,) = running.run([case])
        check(running, [case], [answer])


@pytest.mark.parametrize("metok", [None, {"decode_retention": 1}])
def test_a_prompt_may_be_cut_anywhere(running: Engine, metok: Any) -> None:
    """A chunk ends inside a pair of frames, and between two."""
    shown = film(20, 3, 5)
    check_cut(
        running,
        lambda words: Case((shown,), before="so " * words, metok=metok, max_tokens=4),
        lambda expected, border: kind_of_border(running.sample, shown, expected, border),
        ("in a frame", "between pairs"),
    )


def kind_of_border(sample: Any, shown: Any, expected: OracleResult, border: int) -> str:
    """What stands on both sides of a prompt's token `border`, by the sizes of the video's pairs of frames."""
    assert expected.videos is not None
    (video,) = expected.videos
    start, stop = video.span or (0, 0)
    if not start < border < stop:
        return "elsewhere"
    pixels, merge = sample.pixels(shown), sample.model.config.vision_config.spatial_merge_size
    pairs, rows, columns = (pixels.grid[0] // pixels.grid.new_tensor([1, merge, merge])).tolist()
    text = getattr(pixels, "text", None) or [([], [])] * pairs
    places: list[tuple[int, bool]] = []
    for pair, ((before, behind), stride) in enumerate(zip(text, video.strides or (), strict=True)):
        tokens = -(-rows // stride) * -(-columns // stride)
        places += [(pair, True)] * len(before) + [(pair, False)] * tokens + [(pair, True)] * len(behind)
    assert len(places) == stop - start
    (pair, is_text), following = places[border - start - 1], places[border - start]
    if pair != following[0]:
        return "between pairs"
    return ("in a timestamp" if is_text else "in a frame") if is_text == following[1] else "elsewhere"


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    asked = [
        Case((film(24 + 2 * place, 4, 5 + place % 2),), metok=metok, max_tokens=60)
        for place, metok in enumerate([{"decode_retention": 1}, {"decode_retention": 0.5}, "off", None, None])
    ]
    check_preempted(running, asked)


def test_text_is_served_from_the_prefix_cache_and_a_pruned_video_never(running: Engine) -> None:
    running.scheduler.reset_prefix_cache()
    text, video = Case((), PREFACE, max_tokens=4), Case((film(12, 4, 4),), "Who?", max_tokens=4)
    assert [cached_tokens(running, case) for case in (text, video, video)] == [0, 0, 0]
    assert cached_tokens(running, text) >= running.prefix_unit
    # Longer than its video: the item's data come without its pixels then.
    asked = replace(video, metok="off", question="Who? " + PREFACE)
    cached_tokens(running, asked)
    assert cached_tokens(running, asked) >= running.prefix_unit
    running.scheduler.reset_prefix_cache()


def test_positions_matter(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison would notice tokens that stand in a corner of their window, or are numbered anew."""
    case = Case((film(16, 7, 7),), metok={"strides": [3, 4, 5], "key_frames": 1, "decode_retention": 1}, max_tokens=6)
    right = running.oracle(case)
    honest = qwen_oracle.centres

    def corner(size: int, stride: int) -> list[int]:
        return [window[0] for window in (range(start, size) for start in range(0, size, stride))]

    def renumbered(size: int, stride: int) -> list[int]:
        return list(range(len(honest(size, stride))))

    for wrong in (corner, renumbered):
        monkeypatch.setattr(qwen_oracle, "centres", wrong)
        with pytest.raises(AssertionError):
            assert_same(right, running.oracle(case), ATOL)


def test_the_tower_takes_a_long_video_in_blocks(running: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pairs; a window of its attention lies within one."""
    monkeypatch.setattr(qwen2_5_vl, "PATCHES_PER_BLOCK", 3 * 4 * (4 * 5))
    passes: list[int] = []
    hook = running.runner.model.visual.register_forward_hook(lambda *_: passes.append(1))
    try:
        case = Case((film(16, 4, 5),), metok={"decode_retention": 1}, max_tokens=4)
        check(running, [case], running.run([case]))
    finally:
        hook.remove()
    assert len(passes) == 3, "eight pairs"


@pytest.mark.parametrize(
    ("kwargs", "rows", "columns"),
    [
        ({}, 6, 8),
        ({"fps": 2}, 6, 8),
        ({"num_frames": 4}, 6, 8),
        ({"size": {"shortest_edge": TOKEN * TOKEN, "longest_edge": 12 * TOKEN * TOKEN}}, 3, 4),
    ],
)
def test_stated_kwargs_are_taken_as_stock_takes_them(
    running: Engine, kwargs: dict[str, Any], rows: int, columns: int
) -> None:
    """`size` gives another grid; the others choose no frames, since vLLM's processor is given chosen ones."""
    sample: Any = running.sample
    prompt = {
        "prompt_token_ids": sample.prompt_ids(),
        "multi_modal_data": {"video": [sample.as_sent(film(4, 6, 8, 1))]},
        "mm_processor_kwargs": {"metok": "off", **kwargs},
    }
    processed = running.llm._preprocess_cmpl_one(prompt)
    (place,) = processed["mm_placeholders"]["video"]
    assert place.length == 2 * rows * columns


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"do_resize": False}, "may state 'metok', 'fps', 'num_frames', 'size', not 'do_resize'"),
        ({"fps": 0}, "'fps' takes a number above 0, not 0"),
        ({"fps": "2"}, "'fps' takes a number above 0, not '2'"),
        ({"num_frames": 2.5}, "'num_frames' takes a whole number above 0, not 2.5"),
        ({"size": 3}, "'size' takes whole numbers of pixels"),
        ({"size": {"height": 3}}, "'size' takes whole numbers of pixels"),
        ({"size": {"longest_edge": 10**9}}, "not 784 and 1000000000"),
        ({"size": {"shortest_edge": 10**9}}, "not 1000000000 and"),
    ],
)
def test_other_kwargs_are_refused(running: Engine, kwargs: dict[str, Any], why: str) -> None:
    sample: Any = running.sample
    prompt = {
        "prompt_token_ids": sample.prompt_ids(),
        "multi_modal_data": {"video": [sample.as_sent(film(4, 3, 4, 1))]},
        "mm_processor_kwargs": kwargs,
    }
    with pytest.raises(ValueError, match=r"^METok \(mm_processor_kwargs\): [^\n]*\.$") as refused:
        running.llm._preprocess_cmpl_one(prompt)
    assert why in str(refused.value)


def test_nothing_waits_for_the_device(running: Engine) -> None:
    """Nor does what writes positions back."""
    asked = sent(running, cases(3))[10:12]
    with waits_of_metok() as found:
        running.run(asked)
    assert 1 <= found.pop(THE_READ) <= len(asked)
    assert set(found) <= ON_THE_HOST | GRIDS_ON_THE_HOST, found
