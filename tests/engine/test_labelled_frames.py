"""A family whose frames are labelled by text inside the video, and whose tower has extra channels: the engine
against the oracle. The family is made up (`support/labelled/`): it has separators too, and frames without
text, which Qwen3-VL (`test_qwen3.py`) has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from metok_vllm.contract.kv_spec import TEXT_AND_RETAINED
from metok_vllm.scheduler.kv_manager import DeepKVManager
from tests.support.guards.host_reads import waits_of_metok
from tests.support.harness import Case, Engine, engine
from tests.support.labelled.family import ARCHITECTURE, registered
from tests.support.labelled.labels import LABELS, LEVELS, frame_ids
from tests.support.oracle import OracleResult, assert_same
from tests.support.oracle.samples import load_sample, picture, scene_video

ATOL = 1e-3
LAYERS = [LEVELS, 4, 6]  # L1 as early as the extra channels allow


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Steps shorter than most prompts, and a pool too small for all of them at once."""
    sample = load_sample(tmp_path_factory.mktemp("model"), seed=23)
    limits = {"max_model_len": 768, "max_num_batched_tokens": 160, "max_num_seqs": 8, "num_gpu_blocks_override": 72}
    with registered(), engine(sample, {"prune_layers": LAYERS}, **limits) as started:
        started.labels = LABELS
        yield started


def video(frames: int, scenes: int = 4) -> np.ndarray:
    return scene_video(300 + frames, frames, min(scenes, frames))


def cases(max_tokens: int = 24) -> list[Case]:
    """Every retention, one and several videos, beside text, pictures and a video with METok off."""
    asked: list[dict[str, Any]] = [
        {"videos": (video(20),)},
        {"videos": (video(18),), "metok": {"decode_retention": 0.5}},
        {"videos": (video(12),), "metok": {"decode_retention": 1, "aligner": "none"}},
        {"videos": (video(9), video(14)), "between": "\nand then\n", "metok": {"decode_retention": 0.5}},
        {"videos": (video(5), video(2), video(11)), "question": "Which one?"},
        {"videos": (video(17),), "metok": {"token_budget": 110, "decode_retention": 0.25}},
        {"videos": (video(1),), "metok": {"decode_retention": 1}},
        {"videos": (video(10),), "images": (picture(3, 90, 60),), "metok": {"decode_retention": 1}},
        {
            "videos": (video(16), video(6)),
            "between": " and ",
            "metok": {"quota": "video", "score_rows": "question", "frame_smoothing": 0.5},
        },
        {"videos": (video(13),), "metok": "off"},
        {"videos": (video(1),), "metok": "off"},
        {"question": "Say something without a video."},
        {"question": "What is in the picture?", "images": (picture(4, 50, 70),)},
    ]
    return [Case(**{"max_tokens": max_tokens, **one}) for one in asked]


def text_inside(case: Case) -> int:
    """How much of the case's prompt labels frames."""
    counts = [len(film) for film in case.videos]
    return sum(len(ids) for frames in counts for frame in range(frames) for ids in frame_ids(frame, frames))


def test_the_family_is_the_one_that_runs(running: Engine) -> None:
    assert running.runner.model_config.architectures == [ARCHITECTURE]


def test_a_mixed_batch_equals_the_oracle(running: Engine) -> None:
    """In chunks, with preemptions; labels make a difference, and so do the extra channels."""
    preemptions: dict[str, int] = {}
    deferred: list[int] = []

    def watch(running: Engine) -> None:
        for request_id, request in running.scheduler.requests.items():
            preemptions[request_id] = request.num_preemptions
        deferred.append(running.runner.model_state.pruned.deferred_bytes)

    asked = cases(60)
    for case, answer in zip(asked, running.run(asked, watch), strict=True):
        expected = running.oracle(case)
        assert expected.score_margin > 1e-5, f"choose another seed for {case}"
        assert_same(expected, answer, ATOL)
        check_labels_stay(case, expected)
    assert max(deferred) > 0, "nothing was deferred"
    assert sum(preemptions.values()) > 0, "nothing was preempted"
    running.check_drained()


def check_labels_stay(case: Case, expected: OracleResult) -> None:
    """The oracle itself keeps every label in every layer, and prunes beside them."""
    if case.metok == "off" or not case.videos:
        return
    assert expected.kv_positions is not None
    assert expected.videos is not None
    inside = [p for film in expected.videos for p in range(*(film.span or (0, 0)))]
    kept = set(expected.kv_positions[-1])
    assert len(kept & set(inside)) == text_inside(case)
    assert len(inside) > text_inside(case)


def test_each_alone(running: Engine) -> None:
    for case in cases(6)[:6]:
        (answer,) = running.run([case])
        assert_same(running.oracle(case), answer, ATOL)
    running.check_drained()


def test_labels_and_extra_channels_matter(running: Engine) -> None:
    """The comparison would notice if either were left out."""
    from tests.support.oracle import Labels

    case = cases(4)[0]
    whole = running.oracle(case)
    for less in (Labels(text=frame_ids), Labels(extra=LABELS.extra)):
        running.labels = less
        try:
            without = running.oracle(case)
        finally:
            running.labels = LABELS
        with pytest.raises(AssertionError):
            assert_same(whole, without, ATOL)


@pytest.mark.parametrize("retention", [0, 1])
def test_blocks_are_what_the_text_needs(running: Engine, retention: int) -> None:
    """Deep groups hold blocks for text, that inside the video too, and for what may be retained."""
    case = Case((video(24),), metok={"decode_retention": retention}, max_tokens=4)
    request_id = running.add(case)
    spans, outputs = (), {}
    while running.llm.llm_engine.has_unfinished_requests():
        outputs |= running.step()
        counts = running.scheduler.slot_counts.get(running.internal[request_id])
        spans = counts.spans if counts else spans
    expected = running.oracle(case)
    assert expected.kv_positions is not None
    prompt = len(outputs[request_id].prompt_token_ids)
    (span,) = spans
    text = prompt - span.length + text_inside(case)
    assert text == len(expected.kv_positions[-1])
    assert span.plan.text_tokens == text_inside(case)
    seen = running.groups_seen[running.internal[request_id]]
    complete = next(held for held in seen if held[0] == -(-prompt // running.managers[0].block_size))
    for manager, held in zip(running.managers, complete, strict=True):
        tokens = prompt
        if isinstance(manager, DeepKVManager):
            tokens = text + (retention * span.plan.most_after_l2 if manager.kind == TEXT_AND_RETAINED else 0)
        assert held == -(-tokens // manager.block_size), f"{held} blocks for {tokens} tokens"
    for group in zip(*seen, strict=True):
        assert list(group) == sorted(group), "a block was given back"
    running.check_drained()


def test_the_report_counts_labels_as_text(running: Engine) -> None:
    case = Case((video(15),), metok={"report": True}, max_tokens=2)
    (answer,) = running.run([case])
    (recent, *_) = running.runner.model_state.reports.recent()
    visual = recent["visual_tokens"]["encoded"]
    assert recent["prompt_tokens"] == len(answer.prompt_ids)
    assert recent["text_tokens"] == recent["prompt_tokens"] - visual
    (film,) = recent["videos"]
    assert sum(film["tokens"]) == visual
    assert visual + text_inside(case) == (lambda span: span[1] - span[0])(running.oracle(case).videos[0].span)


def test_one_read_in_a_prefill_and_none_in_decoding(running: Engine) -> None:
    asked = [cases(6)[1], cases(6)[9]]
    with waits_of_metok() as found:
        answers = running.run(asked)
    on_the_host = {
        "video_plan.py:from_tensor tolist", "base.py:_fit __int__", "requests.py:_numbers tolist",
        "spans.py:_counted tolist", "frame_text.py:fits tolist", "beside.py:with_fields numpy",
        "attn_metadata.py:others_metadata numpy",
    }  # fmt: skip
    assert found.pop("survivors.py:survivors_of_l1 tolist") == 1
    assert set(found) <= on_the_host, found
    for case, answer in zip(asked, answers, strict=True):
        assert_same(running.oracle(case), answer, ATOL)
