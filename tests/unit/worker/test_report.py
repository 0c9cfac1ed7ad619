"""What a worker remembers of pruned requests: what it holds, for how long, and what it costs the step."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.contract.request_ids import key
from metok_vllm.contract.settings import RequestSettings
from metok_vllm.contract.spans import VideoSpan
from metok_vllm.contract.video_plan import VideoGrid, VideoPlan, plan_video
from metok_vllm.worker import report as report_module
from metok_vllm.worker.report import KEPT_RECENT, KEPT_REPORTS, Reports, per_frame
from metok_vllm.worker.requests import PruningResult, VideoTags
from tests.support.choices import attach_settings
from tests.support.guards.host_sync import no_host_sync

FRAMES = 14


def make_plan(report: bool) -> VideoPlan:
    return plan_video(
        VideoGrid(FRAMES, 4, 4), PoolStyle("bilinear"), 4 * FRAMES + 1, RequestSettings(report=report), "none"
    )


def make_tags(plan: VideoPlan, seed: int = 0) -> VideoTags:
    """Tags of a video whose tokens are laid out by the plan:
    frames of random tiers, a separator behind each event.
    """
    rng = np.random.default_rng(seed)
    tiers = rng.permutation(np.repeat([0, 1, 2], plan.frames_per_tier))
    cuts = np.sort(rng.choice(np.arange(1, plan.frames), plan.events - 1, replace=False))
    events = np.searchsorted(cuts, np.arange(plan.frames), side="right")
    rows = []
    for frame in range(plan.frames):
        ends = frame + 1 == plan.frames or events[frame + 1] != events[frame]
        count = {0: 4, 1: 1, 2: 1}[int(tiers[frame])] + ends
        rows += [(events[frame], events[frame] % 2 == 0, frame, tiers[frame])] * count
    event, key, frame_of, tier = (torch.tensor([int(row[i]) for row in rows]) for i in range(4))
    return VideoTags(event, key > 0, frame_of, tier)


def make_reports(monkeypatch: pytest.MonkeyPatch, rank: int = 0, **settings: Any) -> Reports:
    text = SimpleNamespace(
        num_hidden_layers=4, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1
    )
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(), hf_text_config=text, get_head_size=lambda: 32, dtype=torch.float32
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )
    attach_settings(config.model_config.hf_config, 4, **settings)
    monkeypatch.setattr(report_module, "get_tensor_model_parallel_rank", lambda: rank)
    return Reports(config)


def make_request(name: str, report: bool = False, seed: int = 0) -> Any:
    plan = make_plan(report)
    tags = make_tags(plan, seed)
    visual = tags.frame.shape[0]
    result = PruningResult(visual, visual // 2, visual // 4, 0)
    spans = (VideoSpan(5, visual, plan),)
    return SimpleNamespace(
        is_shadow=False,
        req_id=name,
        prompt_len=visual + 20,
        visual_tokens=visual,
        spans=spans,
        tags=[tags],
        result=result,
        question=(7, 8, 9),
        score_rows="text",
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_timeline_is_what_the_tags_say(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    request = make_request("chatcmpl-1-0123abcd", report=True, seed=seed)
    reports = make_reports(monkeypatch)
    reports.add(request)
    tags, plan = request.tags[0], request.spans[0].plan
    expected: list[dict[str, Any]] = [{} for _ in range(FRAMES)]
    rows = zip(*(t.tolist() for t in (tags.event, tags.is_key, tags.frame, tags.tier)), strict=True)
    for event, is_key, frame, tier in rows:
        entry = {"event": event, "key_event": is_key, "stride": plan.strides[tier]}
        assert {k: v for k, v in expected[frame].items() if k != "tokens"} in ({}, entry)
        expected[frame] = {**entry, "tokens": expected[frame].get("tokens", 0) + 1}
    found: Any = reports.find(key("chatcmpl-1"))
    assert found["videos"] == [{"frames": FRAMES, "events": 5, "stock_tokens": 4 * FRAMES + 1, "per_frame": expected}]
    assert reports.find(key("chatcmpl-1")) == found, "a second reading is the same"
    (recent,) = reports.recent()
    assert recent["videos"][0]["tokens"] == [entry["tokens"] for entry in expected]
    assert recent["videos"][0]["key"] == [int(entry["key_event"]) for entry in expected]


def test_adding_a_request_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make_reports(monkeypatch)
    request = make_request("r", report=True)
    with no_host_sync():
        reports.add(request)
    with pytest.raises(AssertionError), no_host_sync():
        reports.recent()


def test_a_record_holds_a_few_numbers_a_frame() -> None:
    plan = make_plan(False)
    table = per_frame(make_tags(plan), FRAMES)
    assert table.dtype == torch.int32
    assert table.shape == (4, FRAMES)
    assert int(table[3].sum()) == plan.tokens


def test_only_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make_reports(monkeypatch)
    for i in range(KEPT_REPORTS + 30):
        reports.add(make_request(f"r{i}", report=True))
    recent = reports.recent()
    assert [one["request_id"] for one in recent] == [f"r{KEPT_REPORTS + 29 - i}" for i in range(KEPT_RECENT)]
    assert reports.find(key("r29")) is None
    assert reports.find(key("r30")) is not None
    assert reports.counters.requests == KEPT_REPORTS + 30


def test_they_are_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2048 + 64 * FRAMES
    monkeypatch.setattr(report_module, "KEPT_REPORT_BYTES", 3 * size)
    monkeypatch.setattr(report_module, "KEPT_RECENT_BYTES", size - 1)
    reports = make_reports(monkeypatch)
    for i in range(9):
        reports.add(make_request(f"r{i}", report=True))
        reports.add(make_request(f"r{i}", report=True))  # in the place of the first
        assert [one["request_id"] for one in reports.recent()] == [f"r{i}"], "the latest, whatever its size"
    assert [i for i in range(9) if reports.find(key(f"r{i}"))] == [6, 7, 8]
    assert (reports._asked_for.held_bytes, reports._recent.held_bytes) == (3 * size, size)


@pytest.mark.parametrize("status_shows_questions", [True, False])
def test_what_is_held_is_what_an_answer_takes(monkeypatch: pytest.MonkeyPatch, status_shows_questions: bool) -> None:
    monkeypatch.setattr(f"{__name__}.FRAMES", 2000)
    reports = make_reports(monkeypatch, status_shows_questions=status_shows_questions)
    request = make_request("x" * 100_000, report=True)
    request.question = tuple(range(100_000, 100_400))
    reports.add(request)
    for answer, kept in (
        (reports.recent()[0], reports._recent),
        (reports.find(key("x" * 100_000)), reports._asked_for),
    ):
        assert 0.1 < len(json.dumps(answer)) / kept.held_bytes < 1.1


def test_a_report_is_found_by_its_exact_id_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make_reports(monkeypatch)
    for name in ("chatcmpl-alice-00000001", "chatcmpl-alice-2-00000002", "0_chatcmpl-bob-00000003"):
        reports.add(make_request(name, report=True))
    found = {name: reports.find(key(name)) for name in ("chatcmpl-alice", "chatcmpl-alice-2", "chatcmpl-bob")}
    assert {name: report and report["request_id"] for name, report in found.items()} == {name: name for name in found}
    for other in ("chatcmpl", "chatcmpl-alice-", "alice", "chatcmpl-alice-00000001", "0_chatcmpl-bob", ""):
        assert reports.find(key(other)) is None


def test_hostile_ids_are_shortened_and_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    reports, said = make_reports(monkeypatch), []
    monkeypatch.setattr(report_module.logger, "info", lambda text, *args: said.append(text % args))
    for name in ("a\nINFO forged", "x" * 1_000_000, "z\ud800"):
        reports.add(make_request(name, report=True))
        shown: Any = reports.find(key(name))
        assert shown["request_id"] == reports.recent()[0]["request_id"] != name
        json.dumps(shown, ensure_ascii=False).encode()
    assert len(said) == 3
    for line in said:
        assert line.isprintable()
        assert len(line) < 400


def test_another_videos_encoding_under_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may give one uuid to two videos of as many tokens."""
    request = make_request("r", report=True)
    request.tags[0].frame[-1] = FRAMES + 5
    reports = make_reports(monkeypatch)
    reports.add(request)
    assert reports.recent()


def test_requests_without_a_report_are_recent_but_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make_reports(monkeypatch)
    reports.add(make_request("quiet"))
    assert reports.find(key("quiet")) is None
    assert [one["request_id"] for one in reports.recent()] == ["quiet"]


def test_a_prompt_computed_again_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "REMEMBERED", 3)
    reports = make_reports(monkeypatch)
    for name in ("a", "b", "a", "c"):
        reports.add(make_request(name))
    once = make_request("a")
    assert (reports.counters.requests, reports.counters.recomputed) == (3, 1)
    assert reports.counters.visual_tokens["encoded"] == 3 * once.visual_tokens
    for name in ("d", "e", "f"):
        reports.add(make_request(name))
    assert len(reports._counted) == 3


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = make_reports(monkeypatch, rank=1)
    reports.add(make_request("a", report=True))
    assert (reports.recent(), reports.find(key("a")), reports.counters.requests) == ([], None, 0)


def test_questions_are_kept_only_where_the_operator_lets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, open_ = make_reports(monkeypatch), make_reports(monkeypatch, status_shows_questions=True)
    for reports in (silent, open_):
        reports.add(make_request("a"))
    assert "question_ids" not in silent.recent()[0]
    assert open_.recent()[0]["question_ids"] == [7, 8, 9]
