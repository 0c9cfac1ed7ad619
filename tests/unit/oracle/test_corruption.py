"""A judge that accepts a wrong run is none: a corrupted oracle must fail the comparison with the honest one.

The engine shows its prompt, tokens and logprobs, so those alone must give a wrong run away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support.oracle import OracleResult, OracleSettings, VideoTrace, assert_same, run, stage1, stage2
from tests.support.oracle import settings as rules
from tests.support.oracle.run import Prefill
from tests.support.oracle.samples import Sample, scene_video

ATOL = 1e-3
SETTINGS = OracleSettings(decode_retention=0.5)
DIALS = OracleSettings(quota="video", score_rows="question", frame_smoothing=0.5, decode_retention=0.5, final_keep=0.4)
Patch = pytest.MonkeyPatch


def observed(result: OracleResult) -> OracleResult:
    """What the outside sees."""
    return OracleResult(result.prompt_ids, result.tokens, result.logprobs)


def answer(sample: Sample, settings: OracleSettings = SETTINGS) -> OracleResult:
    videos = [sample.pixels(scene_video(3, 12)), sample.pixels(scene_video(8, 7))]
    ids = sample.prompt_ids(videos=2, between=" and then")
    behind = ids.index(sample.model.config.video_token_id) + 1
    question = [i for i in range(behind, len(ids) - 8) if ids[i] != sample.model.config.video_token_id]
    return run(
        sample.model, ids, videos, None, sample.question_ids(), settings, max_new_tokens=24, question_at=question
    )


def pruned_one_layer_late(index: int) -> Callable[[Patch], None]:
    def corrupt(patch: Patch) -> None:
        honest = rules.prune_layers

        def late(settings: OracleSettings, layers: int) -> tuple[int, ...]:
            limits = list(honest(settings, layers))
            limits[index] += 1
            return tuple(limits)

        patch.setattr(rules, "prune_layers", late)

    return corrupt


def scored_by_the_wrong_layer(patch: Patch) -> None:
    """Before L2, the attention that already served L1 is used again."""
    honest, first = Prefill.drop, {}

    def drop(self: Prefill, stage: int, probabilities: torch.Tensor) -> None:
        if stage == 1:
            first["attention"], first["alive"] = probabilities, list(self.alive)
        if stage == 2:
            index = [first["alive"].index(p) for p in self.alive]
            probabilities = first["attention"][:, index][:, :, index]
        honest(self, stage, probabilities)

    patch.setattr(Prefill, "drop", drop)


def wrong_ratio(patch: Patch) -> None:
    honest = rules.keep_count
    patch.setattr(rules, "keep_count", lambda s, *rest: honest(replace(s, keep_ratio=0.72), *rest))


def rounded_down(patch: Patch) -> None:
    honest = math.ceil
    patch.setattr(rules, "math", type("floor", (), {"ceil": staticmethod(lambda x: honest(x) - (x % 1 > 0))}))


def other_events_kept_at_l2(patch: Patch) -> None:
    honest = rules.keep_count
    patch.setattr(rules, "keep_count", lambda s, n, key, stage: honest(s, n, key, 1))


def separators_dropped(patch: Patch) -> None:
    patch.setattr(stage1, "separators", lambda model: [])


def separator_after_the_video_only(patch: Patch) -> None:
    """As many tokens as before, but the events' newlines are zero rows."""
    honest = stage1.separators
    patch.setattr(stage1, "separators", lambda model: [torch.zeros_like(honest(model)[0])])


def positions_closed_up(patch: Patch) -> None:
    """After pruning, tokens are numbered from 0 again."""
    patch.setattr(Prefill, "rotary_positions", lambda self: torch.arange(len(self.alive)))


def positions_shifted_by_one(patch: Patch) -> None:
    def shifted(self: Prefill) -> torch.Tensor:
        dropped = len(self.alive) < len(self.is_text)
        return torch.tensor(self.alive) + int(dropped)

    patch.setattr(Prefill, "rotary_positions", shifted)


def one_retained_too_many(patch: Patch) -> None:
    honest = rules.retained_count
    patch.setattr(rules, "retained_count", lambda s, n: honest(s, n) + 1)


def retained_by_the_lowest_score(patch: Patch) -> None:
    honest = stage2.retain
    patch.setattr(stage2, "retain", lambda scores, s: honest({p: -a for p, a in scores.items()}, s))


def kv_not_released(patch: Patch) -> None:
    patch.setattr(Prefill, "release", lambda self: None)


def scored_by_the_last_row_only(patch: Patch) -> None:
    honest = stage2.text_rows
    patch.setattr(stage2, "text_rows", lambda *args: honest(*args)[-1:])


def scored_without_the_text_between_videos(patch: Patch) -> None:
    def rows(video: Any, is_text: list[bool]) -> list[int]:
        return list(range(len(is_text) - is_text[::-1].index(False), len(is_text)))

    patch.setattr(stage2, "text_rows", rows)


def scored_by_the_next_videos_tokens(patch: Patch) -> None:
    """At L1, where every token is still alive, all that follows a video counts as text."""
    honest = stage2.text_rows

    def rows(video: Any, is_text: list[bool]) -> list[int]:
        return honest(video, is_text) if video.after else list(range(video.stop, len(is_text)))

    patch.setattr(stage2, "text_rows", rows)


def scored_by_one_head(patch: Patch) -> None:
    honest = stage2.score
    patch.setattr(stage2, "score", lambda probabilities, rows: honest(probabilities[:1], rows))


def survivors_chosen_across_events(patch: Patch) -> None:
    def keep(video: Any, scores: Any, settings: Any, stage: int) -> list[int]:
        count = rules.keep_count(settings, len(video.alive), True, stage)
        return sorted(sorted(video.alive, key=lambda p: (-scores[p], p))[:count])

    patch.setattr(stage2, "keep", keep)


def key_events_by_the_lowest_score(patch: Patch) -> None:
    honest = stage1.pick_key_events
    patch.setattr(stage1, "pick_key_events", lambda scores, n: honest([-s for s in scores], n))


def cut_one_frame_late(patch: Patch) -> None:
    honest = stage1.cut_events

    def late(similarities: list[float], events: int) -> list[tuple[int, int]]:
        cuts = [start + 1 for start, _ in honest(similarities, events)[1:]]
        starts = sorted({0, *(cut for cut in cuts if cut <= len(similarities))})
        return list(zip(starts, [*starts[1:], len(similarities) + 1], strict=True))

    patch.setattr(stage1, "cut_events", late)


def pooled_by_averaging(patch: Patch) -> None:
    def pool(model: Any, frame: torch.Tensor, stride: int) -> torch.Tensor:
        grid = frame.permute(2, 0, 1)[None]
        mean = torch.nn.functional.avg_pool2d(grid, stride, ceil_mode=True)
        return mean[0].permute(1, 2, 0).reshape(-1, frame.shape[-1])

    patch.setattr(stage1, "pool", pool)


CORRUPTIONS = {
    "L1 late": pruned_one_layer_late(0),
    "L2 late": pruned_one_layer_late(1),
    "L3 late": pruned_one_layer_late(2),
} | {
    function.__name__.replace("_", " "): function
    for function in (
        scored_by_the_wrong_layer,
        wrong_ratio,
        rounded_down,
        other_events_kept_at_l2,
        separators_dropped,
        separator_after_the_video_only,
        positions_closed_up,
        positions_shifted_by_one,
        one_retained_too_many,
        retained_by_the_lowest_score,
        kv_not_released,
        scored_by_the_last_row_only,
        scored_without_the_text_between_videos,
        scored_by_the_next_videos_tokens,
        scored_by_one_head,
        survivors_chosen_across_events,
        key_events_by_the_lowest_score,
        cut_one_frame_late,
        pooled_by_averaging,
    )
}


def as_if(**settings: Any) -> Callable[[Patch], None]:
    """A dial that was stated is not heard, or heard as another value."""

    def corrupt(patch: Patch) -> None:
        honest = Prefill.__init__

        def deaf(self: Prefill, model: Any, hidden: Any, is_text: Any, stated: OracleSettings) -> None:
            honest(self, model, hidden, is_text, replace(stated, **settings))

        patch.setattr(Prefill, "__init__", deaf)

    return corrupt


def all_text_scores(patch: Patch) -> None:
    honest = stage2.scoring_rows
    patch.setattr(stage2, "scoring_rows", lambda video, is_text, question: honest(video, is_text, None))


def quota_of_what_is_left_of_each_event(patch: Patch) -> None:
    """At L2 an event's share is taken of what L1 happened to leave of it."""

    def left(video: Any, event: int, settings: OracleSettings, stage: int) -> int:
        there = sum(video.event_of_token[p - video.start] == event for p in video.alive)
        return rules.keep_count(settings, there, event in video.key_events, stage)

    patch.setattr(stage2, "by_event", left)


def smoothed_by_what_the_frame_once_was(patch: Patch) -> None:
    """At L2 the mean is over all of a frame's tokens, and those that L1 dropped count 0."""
    honest = stage2.smooth

    def smooth(video: Any, scores: dict[int, float], settings: OracleSettings) -> dict[int, float]:
        smoothed = honest(video, {**dict.fromkeys(video.visual, 0.0), **scores}, settings)
        return {p: smoothed[p] for p in scores}

    patch.setattr(stage2, "smooth", smooth)


def passed_by_the_lowest_score(patch: Patch) -> None:
    honest = stage2.passes_l3
    patch.setattr(stage2, "passes_l3", lambda scores, s: honest({p: -a for p, a in scores.items()}, s))


def passed_but_not_kept(patch: Patch) -> None:
    """What passes L3 is seen in prefill, and decoding has no KV of it."""
    honest = Prefill.release

    def release(self: Prefill) -> None:
        self.passed = []
        honest(self)

    patch.setattr(Prefill, "release", release)


DIAL_CORRUPTIONS = {
    "quota unheard": as_if(quota="event"),
    "smoothing unheard": as_if(frame_smoothing=0.0),
    "smoothing as 0.6": as_if(frame_smoothing=0.6),
    "final_keep unheard": as_if(final_keep=0.0),
    "one more passes L3": as_if(final_keep=0.44),
} | {
    function.__name__.replace("_", " "): function
    for function in (
        all_text_scores,
        quota_of_what_is_left_of_each_event,
        smoothed_by_what_the_frame_once_was,
        passed_by_the_lowest_score,
        passed_but_not_kept,
    )
}


@pytest.fixture(scope="module")
def dialled(sample: Callable[..., Sample]) -> OracleResult:
    return answer(sample(seed=1), DIALS)


@pytest.mark.parametrize("corrupt", DIAL_CORRUPTIONS.values(), ids=DIAL_CORRUPTIONS.keys())
def test_a_dial_read_wrongly_is_caught(sample: Callable[..., Sample], dialled: OracleResult, corrupt, monkeypatch):
    corrupt(monkeypatch)
    wrong = answer(sample(seed=1), DIALS)
    with pytest.raises(AssertionError, match=r"step|prompt_ids"):
        assert_same(dialled, observed(wrong), ATOL)


WINDOW = OracleSettings(kv_layers=(1, 6), prune_layers=(3, 5, 7))


@pytest.mark.parametrize("wrong", [None, (0, 6), (2, 6), (1, 5), (1, 7), (3, 6), (1, 3)])
def test_a_window_read_wrongly_is_caught(sample: Callable[..., Sample], wrong: tuple[int, int] | None):
    tiny = sample(seed=1)
    honest = answer(tiny, WINDOW)
    assert_same(honest, observed(answer(tiny, WINDOW)), 1e-6)
    with pytest.raises(AssertionError, match="step"):
        assert_same(honest, observed(answer(tiny, replace(WINDOW, kv_layers=wrong))), ATOL)


@pytest.fixture(scope="module")
def honest(sample: Callable[..., Sample]) -> OracleResult:
    return answer(sample(seed=1))


def test_an_honest_run_is_accepted(sample: Callable[..., Sample], honest: OracleResult):
    assert_same(honest, observed(answer(sample(seed=1))), 1e-6)
    assert_same(honest, answer(sample(seed=1)), 1e-6)


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupted_run_is_caught(sample: Callable[..., Sample], honest: OracleResult, corrupt, monkeypatch):
    corrupt(monkeypatch)
    wrong = answer(sample(seed=1))
    with pytest.raises(AssertionError, match=r"step|prompt_ids"):
        assert_same(honest, observed(wrong), ATOL)


def small_changes(honest: OracleResult) -> dict[str, OracleResult]:
    """The honest result with one thing about it wrong."""
    video = honest.videos[0]

    def with_video(**change: Any) -> OracleResult:
        return replace(honest, videos=[replace(video, **change), *honest.videos[1:]])

    top = honest.top_logprobs(3)
    return {
        "prompt": replace(honest, prompt_ids=honest.prompt_ids[:-1]),
        "a step less": replace(honest, tokens=honest.tokens[:-1], logprobs=honest.logprobs[:-1]),
        "last token": replace(honest, tokens=[*honest.tokens[:-1], honest.tokens[-1] ^ 1]),
        "one logprob": replace(honest, logprobs=honest.logprobs + 2 * ATOL * torch.eye(24, 512)),
        "one of the top": replace(honest, logprobs=[*top[:-1], {t: p - 2 * ATOL for t, p in top[-1].items()}]),
        "own token unstated": replace(honest, logprobs=[{}, *top[1:]]),
        "layers": replace(honest, prune_layers=(1, 3, 6)),
        "retained": replace(honest, retained=honest.retained[1:]),
        "held": replace(honest, kv_positions=[*honest.kv_positions[:-1], honest.kv_positions[0]]),
        "videos": replace(honest, videos=honest.videos[:1]),
        "events": with_video(events=video.events[1:]),
        "strides": with_video(strides=[8, *video.strides[1:]]),
        "relevance": with_video(relevance=[video.relevance[0] + 2 * ATOL, *video.relevance[1:]]),
        "survivors": with_video(after_l2=video.after_l2[1:]),
    }


@pytest.mark.parametrize("number", range(14))
def test_the_comparison_sees_each_small_change(honest: OracleResult, number: int):
    changes = small_changes(honest)
    assert len(changes) == 14
    with pytest.raises(AssertionError):
        assert_same(honest, list(changes.values())[number], ATOL)


def test_the_comparison_accepts_what_an_engine_can_state(honest: OracleResult):
    some = OracleResult(
        honest.prompt_ids,
        honest.tokens,
        honest.top_logprobs(5),
        videos=[VideoTrace(strides=video.strides) for video in honest.videos],
    )
    assert_same(honest, some, 1e-6)
    assert len(honest.top_logprobs(5)[0]) == 5
