"""InternVL3 and InternVL3.5 against the oracle: frames that text counts, in both formats.

One engine a format, with small steps: prompts are deferred over several chunks, and requests share batches.
The Hugging Face format has an odd grid and a Qwen2, the authors' an even one and a Qwen3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from metok_vllm.scheduler.kv_manager import DeepKVManager
from tests.engine.test_host_reads import ON_THE_HOST, THE_READ
from tests.support.families import ATOL, PREFACE, cached_tokens, check, check_cut, check_in_chunks, check_preempted
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine, observed
from tests.support.oracle import OracleResult, assert_same, stage1
from tests.support.oracle import internvl as internvl_oracle
from tests.support.oracle.internvl_chat import load_internvl_chat
from tests.support.oracle.internvl_samples import InternVLSample, load_internvl
from tests.support.oracle.samples import picture, scene_video

LIMITS = {"max_num_batched_tokens": 272, "max_num_seqs": 12}
# How each is loaded, its longest prompt, blocks of all groups (too few for many requests), and what stock
# vLLM asks for.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "internvl": (partial(load_internvl, seed=3), {"max_model_len": 1088, "num_gpu_blocks_override": 80}),
    "internvl-chat": (
        partial(load_internvl_chat, seed=3),
        {"max_model_len": 992, "num_gpu_blocks_override": 72, "trust_remote_code": True},
    ),
}
ONE = {"stages": 1, "aligner": "none"}

OF_THIS_FAMILY = {
    "frame_text.py:fits tolist",  # the plan's text, looked at once
    "internvl.py:video_grid __int__",  # the front end, in the test's own process
    "internvl.py:video_features tolist",  # the worker, where the counts stay on the host (`keep_on_cpu`)
}


@pytest.fixture(scope="module", params=KINDS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    load, options = KINDS[request.param]
    with engine(load(tmp_path_factory.mktemp("model")), **LIMITS, **options) as started:
        yield started


def film(frames: int, seed: int = 0, height: int = 84, width: int = 84) -> Any:
    whole = scene_video(100 * seed + frames, frames, min(4, frames), max(height, width))
    return np.ascontiguousarray(whole[:, :height, :width])


def cases(max_tokens: int = 24) -> list[Case]:
    """Requests that differ in everything a request can differ in."""
    asked: list[dict[str, Any]] = [
        {"videos": (film(20),)},
        {"videos": (film(17, 1, 40, 90),), "metok": {"decode_retention": 1}},
        {"videos": (film(1),)},
        {"videos": (film(2),), "metok": {"decode_retention": 1, "aligner": "none"}},
        {"videos": (film(14),), "metok": {"events": 3, "key_events": 3, "keep_ratio": 1.0, "strides": [2, 3, 5]}},
        {"videos": (film(16),), "question": "How many?", "metok": {"events": 1, "key_frames": 0}},
        {"videos": (film(18, 2),), "metok": {"token_budget": 120, "decode_retention": 0.25}},
        {"videos": (film(12),), "metok": "off"},
        {"question": "Say something without a video."},
        {"videos": (film(9), film(12, 1)), "images": (picture(3, 90, 60),), "between": "\nand then\n"},
        {"question": "What is in the picture?", "images": (picture(4, 150, 170), picture(5, 50, 120))},
        {
            "videos": (film(15),),
            "metok": {"quota": "video", "score_rows": "question", "frame_smoothing": 0.5, "final_keep": 0.3},
        },
        {"videos": (film(6, 3), film(5, 4)), "question": "When?", "metok": "off"},
        {"videos": (film(16, 5),), "images": (picture(6, 64, 64),), "metok": {"stages": 1}},
    ]
    return [Case(**{"max_tokens": max_tokens, **one}) for one in asked]


def text_inside(running: Engine, case: Case) -> int:
    """How much of the case's prompt labels frames."""
    sample: Any = running.sample
    return sum(len(before) + len(behind) for shown in case.videos for before, behind in sample.pixels(shown).text)


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    check_in_chunks(running, cases())


def test_one_alone(running: Engine) -> None:
    asked = cases(6)
    for case in (asked[1], asked[9]):
        (answer,) = running.run([case])
        check(running, [case], [answer])


def test_a_prompt_may_be_cut_anywhere(running: Engine) -> None:
    """A chunk ends inside a frame, inside a label, and on both sides of a frame."""
    shown = film(20)
    check_cut(
        running,
        lambda words: Case((shown,), before=" the" * words, max_tokens=3),
        kind_of_border,
        ("in a frame", "in a label", "before a frame", "behind a frame"),
    )


def kind_of_border(expected: OracleResult, border: int) -> str:
    """What stands on both sides of a prompt's token `border`. Without retention only text keeps KV."""
    assert expected.videos is not None
    assert expected.kv_positions is not None
    start, stop = expected.videos[0].span or (0, 0)
    if not start < border < stop:
        return "elsewhere"
    text = set(expected.kv_positions[-1])
    sides = border - 1 in text, border in text
    return {
        (False, False): "in a frame",
        (True, True): "in a label",
        (True, False): "before a frame",
        (False, True): "behind a frame",
    }[sides]


def test_preempted_requests_continue_with_the_same_survivors(running: Engine) -> None:
    settings = [{"decode_retention": 1}, {"decode_retention": 0.5}, "off", {"decode_retention": 1}, None]
    settings += ["off", {"decode_retention": 1}]
    check_preempted(
        running, [Case((film(20 - i, 30 + i),), metok=metok, max_tokens=40) for i, metok in enumerate(settings)]
    )


def test_what_the_prefix_cache_has(running: Engine) -> None:
    """Text, a video with METok off, all of one of stage 1, whatever is asked of it; never a pruned one."""
    running.scheduler.reset_prefix_cache()
    text, video = Case((), PREFACE, max_tokens=2), Case((film(12),), "Who?", max_tokens=2)
    assert [cached_tokens(running, case) for case in (text, video, video)] == [0, 0, 0]
    assert cached_tokens(running, text) >= running.prefix_unit
    # Longer than its video: the item's data come without its pixels then.
    for metok in ("off", ONE):
        running.scheduler.reset_prefix_cache()
        asked = replace(video, metok=metok, question="Who? " + PREFACE)
        cached_tokens(running, asked)
        assert cached_tokens(running, asked) >= running.prefix_unit
    other = replace(asked, question="Who? " + PREFACE + "Where?")
    _, stop = running.oracle(other).videos[0].span  # type: ignore[index, misc]
    assert cached_tokens(running, other) > stop
    running.scheduler.reset_prefix_cache()


def test_text_inside_the_video_is_text(running: Engine) -> None:
    """It owns slots in every layer, METok counts it as text, and the oracle drops none of it."""
    case = Case((film(22),), metok={"report": True}, max_tokens=4)
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
    assert_same(expected, observed(outputs[request_id]), ATOL)
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


def a_label_that_may_be_pruned(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = stage1.around
    patch.setattr(
        stage1, "around", lambda *given: [(rows, is_text and i > 0) for i, (rows, is_text) in enumerate(honest(*given))]
    )


def a_grid_read_across(running: Engine, patch: pytest.MonkeyPatch) -> None:
    """Tokens of a frame as if they stood column by column."""
    honest = internvl_oracle.LAYOUT

    def across(model: Any, pixels: Any) -> Any:
        assert honest.tower is not None
        return honest.tower(model, pixels).transpose(1, 2)

    patch.setattr(running.sample.model, "layout", replace(honest, tower=across))


def a_wider_window(running: Engine, patch: pytest.MonkeyPatch) -> None:
    """Sums over windows that reach beyond the frame, divided by the whole window."""
    honest = stage1.pool

    def padded(model: Any, frame: Any, stride: int) -> Any:
        wide = np.pad(frame.numpy(), ((0, -frame.shape[0] % stride), (0, -frame.shape[1] % stride), (0, 0)))
        return honest(model, frame.new_tensor(wide), stride)

    patch.setattr(stage1, "pool", padded)


def frames_in_another_order(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = internvl_oracle.LAYOUT

    def turned(model: Any, pixels: Any) -> Any:
        assert honest.tower is not None
        return honest.tower(model, pixels).flip(0)

    patch.setattr(running.sample.model, "layout", replace(honest, tower=turned))


def labels_one_frame_late(running: Engine, patch: pytest.MonkeyPatch) -> None:
    honest = InternVLSample.text_of
    patch.setattr(InternVLSample, "text_of", lambda *given: honest(*given)[1:] + honest(*given)[:1])


@pytest.mark.parametrize("running", ["internvl"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    [a_label_that_may_be_pruned, a_grid_read_across, a_wider_window, frames_in_another_order, labels_one_frame_late],
)
def test_the_comparison_would_notice(running: Engine, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    case = Case((film(16),), metok={"strides": [2, 3, 4], "key_frames": 1, "decode_retention": 1}, max_tokens=4)
    right = running.oracle(case)
    fault(running, monkeypatch)
    wrong = running.oracle(case)
    with pytest.raises(AssertionError, match="logprob"):
        assert_same(right, wrong, ATOL)


@pytest.mark.parametrize("kwargs", [{"size": {"height": 80, "width": 80}}, {"do_resize": False}, {"num_frames": 4}])
def test_other_kwargs_are_refused(running: Engine, kwargs: dict[str, Any]) -> None:
    prompt = {
        "prompt_token_ids": running.sample.prompt_ids(),
        "multi_modal_data": {"video": [film(8)]},
        "mm_processor_kwargs": kwargs,
    }
    (name,) = kwargs
    with pytest.raises(
        ValueError, match=rf"^METok \(mm_processor_kwargs\): a request may state [^\n]*, not '{name}'\.$"
    ):
        running.llm._preprocess_cmpl_one(prompt)


def test_a_prompt_without_a_place_for_its_video_is_refused(running: Engine) -> None:
    prompt = {"prompt_token_ids": running.sample.prompt_ids(videos=0), "multi_modal_data": {"video": [film(8)]}}
    with pytest.raises(ValueError, match=r"^METok: the prompt has lost the place of a video or an image; do not"):
        running.llm._preprocess_cmpl_one(prompt)


def test_nothing_waits_for_the_device(running: Engine) -> None:
    asked = [cases(3)[1], cases(3)[9]]
    with waits_of_metok() as found:
        running.run(asked)
    assert 1 <= found.pop(THE_READ) <= len(asked)
    assert set(found) <= ON_THE_HOST | OF_THIS_FAMILY, found
