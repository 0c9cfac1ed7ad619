"""Qwen3-VL against the oracle: text between the frames of a video, and what the tower adds behind the first
layers.

One engine with small steps: prompts are deferred over several chunks, and requests of different grids share
batches. With experts: `test_qwen3_experts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from metok_vllm.contract.extents import TABLE_FACTOR
from metok_vllm.demo.qwen3_checkpoint import TOKEN
from metok_vllm.scheduler.kv_manager import DeepKVManager
from tests.engine.test_host_reads import ON_THE_HOST, THE_READ
from tests.engine.test_qwen import DIALS
from tests.support.families import ATOL, PREFACE, cached_tokens, check, check_cut, check_in_chunks, check_preempted
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine
from tests.support.oracle import assert_same, labelled, stage1
from tests.support.oracle import qwen3 as qwen3_oracle
from tests.support.oracle.qwen3_samples import load_qwen3
from tests.support.oracle.samples import picture, scene_video

LAYERS = [3, 5, 7]  # L1 as early as three levels allow

OF_THIS_FAMILY = {
    "frame_text.py:fits tolist",  # the plan's text, looked at once
    "qwen2_5_vl.py:video_grid tolist",  # the front end, in the test's own process
    "extents.py:taken tolist",  # the scheduler
    "qwen2_5_vl.py:video_features tolist",  # the worker, where the grid stays on the host (`keep_on_cpu`)
    "qwen3_vl.py:frames_of_items tolist",
    "qwen3_vl.py:_text_around tolist",
}


LIMITS: dict[str, Any] = {
    "max_num_batched_tokens": 272,
    "max_num_seqs": 12,
    "max_model_len": 832,
    "num_gpu_blocks_override": 62,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    sample = load_qwen3(tmp_path_factory.mktemp("model"), "qwen3-vl", seed=3, deepstack=(1, 2, 3))
    with engine(sample, {"prune_layers": LAYERS}, **LIMITS) as started:
        yield started


def film(frames: int, rows: int, columns: int, scenes: int = 4) -> Any:
    """A video whose grid is `rows` x `columns`, of `frames` frames."""
    side = TOKEN * max(rows, columns)
    whole = scene_video(1000 * rows + 100 * columns + frames, frames, min(scenes, frames), side)
    return np.ascontiguousarray(whole[:, : TOKEN * rows, : TOKEN * columns])


def timed(frames: Any, seconds: float, rate: float = 25.0, resampled: bool = False) -> Any:
    """Frames and when they are, out of a longer video; or all that there are, for transformers to sample."""
    total = len(frames) if resampled else int(seconds * rate)
    indices = np.linspace(0, total - 1, len(frames), dtype=int).tolist()
    known = {"fps": rate, "total_num_frames": total, "frames_indices": indices, "duration": total / rate}
    return frames, {**known, "do_sample_frames": resampled}


def cases(max_tokens: int = 24) -> list[Case]:
    """Requests that differ in everything a request can differ in; odd and even grids, pairs of one frame."""
    asked = [
        Case((film(24, 5, 7),)),
        Case((film(17, 3, 3),), metok={"decode_retention": 1}),
        Case((film(2, 4, 6, 1),)),
        Case((film(3, 6, 2, 2),), metok={"decode_retention": 1, "aligner": "none"}),
        Case((film(14, 4, 5),), metok={"events": 3, "key_events": 3, "keep_ratio": 1.0, "strides": [2, 3, 5]}),
        Case((film(16, 1, 9),), "How many?", metok={"events": 1, "key_frames": 0}),
        Case((film(26, 5, 5),), metok={"token_budget": 90, "decode_retention": 0.25}),
        Case((film(12, 5, 3),), metok="off"),
        Case((), "Say something without a video."),
        Case((film(9, 3, 5), film(18, 5, 3)), "When?", images=(picture(3, 90, 60),), between="\nand then\n"),
        Case((), "What is in the picture?", images=(picture(4, 150, 170),)),
        Case((timed(film(12, 3, 4), 477.0, 23.976), timed(film(8, 5, 5), 3.0, 7)), metok={"decode_retention": 0.5}),
        Case((timed(film(15, 2, 3), 0, 5, resampled=True),), metok={"quota": "video", "score_rows": "question"}),
        Case((timed(film(9, 3, 3), 31.0, 29.97), film(6, 3, 3)), "When?", metok="off"),
        Case((film(5, 7, 3), film(11, 2, 2), film(14, 3, 7)), metok={"decode_retention": 0.5, "query": "Who drums?"}),
        Case((film(20, 4, 4),), "Which?", metok={**DIALS, "events": 7, "key_events": 2, "key_frames": 1}),
    ]
    return [replace(case, max_tokens=max_tokens) for case in asked]


def text_inside(running: Engine, case: Case) -> int:
    """How much of the case's prompt labels frames."""
    sample: Any = running.sample
    return sum(len(b) + len(e) for film_ in case.videos for b, e in sample.pixels(film_).text)


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    check_in_chunks(running, cases())


def test_each_alone(running: Engine) -> None:
    asked = cases(6)
    for case in (asked[1], asked[11], asked[12]):
        (answer,) = running.run([case])
        check(running, [case], [answer])


def test_a_prompt_may_be_cut_anywhere(running: Engine) -> None:
    """A chunk ends inside a frame, inside a timestamp, and between two pairs."""
    shown = film(20, 3, 5)
    check_cut(
        running,
        lambda words: Case((shown,), before="so " * words, max_tokens=4),
        kind_of_border,
        ("in a frame", "in a timestamp", "between pairs"),
    )


def kind_of_border(expected: Any, border: int) -> str:
    """What stands on both sides of a prompt's token `border`. Without retention only text keeps KV."""
    start, stop = expected.videos[0].span
    if not start + 1 < border < stop:
        return "elsewhere"
    before, at, behind = (place in expected.kv_positions[-1] for place in (border - 2, border - 1, border))
    if at != behind:
        return "elsewhere"
    if not at:
        return "in a frame"
    return "in a timestamp" if before else "between pairs"  # behind vision_end


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    asked = [
        Case((film(20 + 2 * place, 4, 5 + place % 2),), metok=metok, max_tokens=60)
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


def test_text_inside_the_video_is_text(running: Engine) -> None:
    """It owns slots in every layer, METok counts it as text, and the oracle drops none of it."""
    case = Case((film(22, 4, 4),), metok={"report": True}, max_tokens=4)
    request_id = running.add(case)
    spans, outputs = (), {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
        counts = running.scheduler.slot_counts.get(running.internal[request_id])
        spans = counts.spans if counts else spans
    (span,) = spans
    inside = text_inside(running, case)
    expected = running.oracle(case)
    assert expected.kv_positions is not None
    prompt = len(outputs[request_id].prompt_token_ids)
    text = prompt - span.length + inside
    assert span.plan.text_tokens == inside
    assert text == len(expected.kv_positions[-1])
    seen = running.groups_seen[running.internal[request_id]]
    complete = next(held for held in seen if held[0] == -(-prompt // running.managers[0].block_size))
    for manager, held in zip(running.managers, complete, strict=True):
        tokens = text if isinstance(manager, DeepKVManager) else prompt
        assert held == -(-tokens // manager.block_size), f"{held} blocks for {tokens} tokens"
    (recent, *_) = running.runner.model_state.reports.recent()
    assert recent["text_tokens"] == text
    assert recent["visual_tokens"]["encoded"] == prompt - text
    running.check_drained()


def wrong_places(running: Engine, patch: pytest.MonkeyPatch) -> None:
    """Tokens in a corner of their window."""
    patch.setattr(qwen3_oracle, "centres", lambda size, stride: list(range(0, size, stride)))


def renumbered(running: Engine, patch: pytest.MonkeyPatch) -> None:
    """Text behind a pair as if the pair were as small as what is left of it."""
    honest = qwen3_oracle.LAYOUT

    def closed_up(model: Any, ids: list[int], videos: Any, images: Any, strides: Any) -> Any:
        found, upcoming = honest.rotary(model, ids, videos, images, strides)
        return found - (found[0] - torch.arange(found.shape[1])).clamp(min=0), upcoming

    patch.setattr(running.sample.model, "layout", replace(honest, rotary=closed_up))


def a_timestamp_that_may_be_pruned(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = stage1.around
    patch.setattr(
        stage1, "around", lambda *given: [(rows, is_text and i > 0) for i, (rows, is_text) in enumerate(honest(*given))]
    )


def deepstack_one_row_late(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = labelled.levels
    patch.setattr(
        import_module("tests.support.oracle.run"),
        "levels",
        lambda *given: [level.roll(1, 0) for level in honest(*given)],
    )


def deepstack_one_level_late(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = labelled.levels
    patch.setattr(
        import_module("tests.support.oracle.run"), "levels", lambda *given: honest(*given)[-1:] + honest(*given)[:-1]
    )


@pytest.mark.parametrize(
    "fault",
    [wrong_places, renumbered, a_timestamp_that_may_be_pruned, deepstack_one_row_late, deepstack_one_level_late],
)
def test_the_comparison_would_notice(running: Engine, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    case = Case((film(16, 7, 5),), metok={"strides": [3, 4, 5], "key_frames": 1, "decode_retention": 1}, max_tokens=6)
    right = running.oracle(case)
    fault(running, monkeypatch)
    wrong = running.oracle(case)
    with pytest.raises(AssertionError, match="logprob"):
        assert_same(right, wrong, ATOL)


def test_positions_of_lost_tokens_have_their_place_in_the_table(running: Engine) -> None:
    """vLLM's own is as long as the longest prompt, of which every token takes a position at most."""
    text = running.runner.model_config.hf_text_config
    tables = {
        id(layer.self_attn.rotary_emb): layer.self_attn.rotary_emb for layer in running.runner.model.decoder().layers
    }
    assert [len(one.cos_sin_cache) for one in tables.values()] == [TABLE_FACTOR * text.max_position_embeddings]


@pytest.mark.parametrize(
    ("kwargs", "pairs", "rows", "columns"),
    [
        ({}, 8, 3, 4),
        ({"fps": 1}, 4, 3, 4),
        ({"num_frames": 5}, 3, 3, 4),
        ({"size": {"shortest_edge": TOKEN * TOKEN, "longest_edge": 96 * TOKEN * TOKEN}}, 8, 2, 2),
    ],
)
def test_stated_kwargs_are_taken_as_stock_takes_them(
    running: Engine, kwargs: dict[str, Any], pairs: int, rows: int, columns: int
) -> None:
    """All frames of a video of two a second are sent; transformers samples from them."""
    sample: Any = running.sample
    prompt = {
        "prompt_token_ids": sample.prompt_ids(),
        "multi_modal_data": {"video": [timed(film(16, 3, 4), 0, 2, resampled=True)]},
        "mm_processor_kwargs": {"metok": "off", **kwargs},
    }
    processed = running.llm._preprocess_cmpl_one(prompt)
    (place,) = processed["mm_placeholders"]["video"]
    assert place.get_num_embeds() == pairs * rows * columns
    ids = processed["prompt_token_ids"][place.offset : place.offset + place.length]
    assert ids.count(sample.model.config.vision_start_token_id) == pairs


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"do_resize": False}, "may state 'metok', 'fps', 'num_frames', 'size', not 'do_resize'"),
        ({"fps": 0}, "'fps' takes a number above 0, not 0"),
        ({"fps": 1, "num_frames": 4}, "this model takes 'fps' or 'num_frames', not both"),
        ({"num_frames": 3}, "'num_frames' takes from 4 to 8 frames of a video of 8, not 3"),
        ({"num_frames": 9}, "'num_frames' takes from 4 to 8 frames of a video of 8, not 9"),
        ({"size": {"longest_edge": 10**9}}, "not 1024 and 1000000000"),
    ],
)
def test_other_kwargs_are_refused(running: Engine, kwargs: dict[str, Any], why: str) -> None:
    sample: Any = running.sample
    prompt = {
        "prompt_token_ids": sample.prompt_ids(),
        "multi_modal_data": {"video": [timed(film(8, 3, 4, 1), 0, 2, resampled=True)]},
        "mm_processor_kwargs": kwargs,
    }
    with pytest.raises(ValueError, match=r"^METok \(mm_processor_kwargs\): [^\n]*\.$") as refused:
        running.llm._preprocess_cmpl_one(prompt)
    assert why in str(refused.value)


def test_nothing_waits_for_the_device(running: Engine) -> None:
    """Nor does what writes positions back, and lays text."""
    asked = [cases(3)[9], cases(3)[11]]
    with waits_of_metok() as found:
        running.run(asked)
    assert 1 <= found.pop(THE_READ) <= len(asked)
    assert set(found) <= ON_THE_HOST | OF_THIS_FAMILY, found
