"""Stages 2 and 3 by the book: which visual tokens stay, given their scores (docs/method.md 2, 3 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support.oracle import settings as rules
from tests.support.oracle.settings import OracleSettings


@dataclass
class Video:
    """The visual tokens of one video in the prompt; token `i` of the video sits at position `start + i`."""

    start: int
    event_of_token: list[int]  # -1: text that labels a frame
    key_events: list[int]
    alive: list[int]  # prompt positions of visual tokens still there, ascending
    after: list[list[int]] = field(default_factory=list)  # prompt positions left after L1, L2, L3
    frame_of_token: list[int] = field(default_factory=list)  # a separator is of the frame before it

    @property
    def stop(self) -> int:
        """One past the video's last prompt position."""
        return self.start + len(self.event_of_token)

    @property
    def visual(self) -> list[int]:
        """Prompt positions of its visual tokens."""
        return [self.start + i for i, event in enumerate(self.event_of_token) if event >= 0]


def text_rows(video: Video, is_text: list[bool]) -> list[int]:
    """2: the prompt's text positions after the video's last token."""
    return [p for p in range(video.stop, len(is_text)) if is_text[p]]


def scoring_rows(video: Video, is_text: list[bool], question: list[int] | None) -> list[int]:
    """2 and 4.6: the positions that score a video; `question`: the question's, None where all text scores."""
    return [p for p in text_rows(video, is_text) if question is None or p in question]


def score(probabilities: Tensor, rows: list[int]) -> Tensor:
    """2: a[keys], the mean over heads and over `rows` of `probabilities` [heads, queries, keys].

    A video that no text follows has no rows: all its scores are 0.
    """
    if not rows:
        return torch.zeros(probabilities.shape[-1])
    return probabilities[:, rows].mean((0, 1))


def smooth(video: Video, scores: dict[int, float], settings: OracleSettings) -> dict[int, float]:
    """4.6: each score mixed with the mean over the tokens of its frame that are alive."""
    if not settings.frame_smoothing:
        return scores
    by_frame: dict[int, list[float]] = {}
    for p, a in scores.items():
        by_frame.setdefault(video.frame_of_token[p - video.start], []).append(a)
    w = settings.frame_smoothing
    means = {frame: sum(own) / len(own) for frame, own in by_frame.items()}
    return {p: (1 - w) * a + w * means[video.frame_of_token[p - video.start]] for p, a in scores.items()}


def keep(video: Video, scores: dict[int, float], settings: OracleSettings, stage: int) -> list[int]:
    """2: the positions that survive L1 (`stage` 1) or L2 (`stage` 2), ascending.

    `scores`: a of each position alive. Higher score = kept; equal scores keep the lower position.
    """
    kept: list[int] = []
    wanted = 0
    for event in sorted(set(video.event_of_token) - {-1}):
        tokens = [p for p in video.alive if video.event_of_token[p - video.start] == event]
        count = rules.keep_count(settings, len(tokens), event in video.key_events, stage)
        kept += sorted(tokens, key=lambda p: (-scores[p], p))[:count]
        wanted += by_event(video, event, settings, stage)
    if settings.quota == "video":
        kept = sorted(video.alive, key=lambda p: (-scores[p], p))[:wanted]
    return sorted(kept)


def by_event(video: Video, event: int, settings: OracleSettings, stage: int) -> int:
    """2.3: how many of an event's tokens L1 (`stage` 1) or L2 leaves where every event keeps its own."""
    left = video.event_of_token.count(event)
    for earlier in range(1, stage + 1):
        left = rules.keep_count(settings, left, event in video.key_events, earlier)
    return left


def chosen_among(video: Video, scores: dict[int, float], settings: OracleSettings) -> list[dict[int, float]]:
    """The scores that a choice compares with one another: each event's, or all of the video's."""
    if settings.quota == "video":
        return [scores]
    events = sorted(set(video.event_of_token) - {-1})
    return [{p: a for p, a in scores.items() if video.event_of_token[p - video.start] == e} for e in events]


def retain(scores: dict[int, float], settings: OracleSettings) -> list[int]:
    """4: the positions whose KV stays in layers L1 .. L3-1. `scores`: a at L2 of all videos' survivors."""
    count = rules.retained_count(settings, len(scores))
    return sorted(sorted(scores, key=lambda p: (-scores[p], p))[:count])


def passes_l3(scores: dict[int, float], settings: OracleSettings) -> list[int]:
    """4.7: the positions that go on to the last layer. `scores`: a at L3 of all videos' survivors of L2."""
    count = rules.final_count(settings, len(scores))
    return sorted(sorted(scores, key=lambda p: (-scores[p], p))[:count])


def margin(scores: dict[int, float], kept: list[int]) -> float:
    """How far apart, relative to the larger, the lowest score kept and the highest score dropped are."""
    dropped = [a for p, a in scores.items() if p not in kept]
    if not dropped or not kept:
        return math.inf
    lowest, highest = min(scores[p] for p in kept), max(dropped)
    return (lowest - highest) / max(lowest, 1e-30)
