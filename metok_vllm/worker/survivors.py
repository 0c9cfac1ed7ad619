"""Which tokens of the prompts in a pruned step are still alive, and the choices at L1, L2 and L3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from metok_vllm.compression.events import event_lengths
from metok_vllm.compression.ordering import true_indices
from metok_vllm.compression.retention import retain, retained_count
from metok_vllm.compression.selection import keep_counts
from metok_vllm.scheduler.slot_counts import VideoSpan
from metok_vllm.worker import ops
from metok_vllm.worker.batch import PrefillRow
from metok_vllm.worker.requests import PruningResult, VideoTags


@dataclass(frozen=True)
class EventCounts:
    """Tokens that every event of one video has before L1, keeps at L1 and keeps at L2; each int64 [events].

    Its tokens stand event after event, so the counts are also the lengths of their runs.
    """

    before: torch.Tensor
    after_l1: torch.Tensor
    after_l2: torch.Tensor

    @classmethod
    def of(cls, span: VideoSpan, tags: VideoTags) -> EventCounts:
        """By method.md section 2, from the tags of the video's tokens; stays on the device."""
        before = event_lengths(tags.event, span.plan.events)
        key = torch.zeros_like(before, dtype=torch.bool).index_put_((tags.event,), tags.key)
        after_l1 = keep_counts(before, key, span.plan.keep_ratio, 1)
        return cls(before, after_l1, keep_counts(after_l1, key, span.plan.keep_ratio, 2))


@dataclass(frozen=True)
class Pruning:
    """The counts of one pruned video, on the device and, of the totals, on the host."""

    counts: EventCounts
    total1: int  # visual tokens that pass L1
    total2: int  # and L2


@dataclass
class Survivors:
    """The tokens of one prompt that are still alive, in prompt order."""

    row: PrefillRow
    positions: torch.Tensor  # int64 [n]
    static: torch.Tensor  # int64 [text and image tokens], where they stand among the n
    visual: list[tuple[int, int]]  # for each pruned video, until L2: offset among the n, and count
    videos: list[Pruning]
    retained: int  # R: visual tokens that keep their KV below L3
    retained_rows: torch.Tensor | None = None  # int64 [R], where they stand among the n, once L2 has chosen
    held_rows: torch.Tensor | None = None  # int64 [R], where they stood among the survivors of L1

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def total2(self) -> int:
        """Visual tokens of all videos that pass L2."""
        return sum(video.total2 for video in self.videos)


def survivors_of_l1(rows: Sequence[PrefillRow], scores: Sequence[Sequence[torch.Tensor]]) -> list[Survivors]:
    """Prune complete prompts at L1.

    Args:
        rows: the prompts.
        scores: of every pruned video of each, float32 [its tokens].
    """
    counts = [
        EventCounts.of(span, _present(tags))
        for row in rows
        for span, tags in zip(row.request.spans, row.request.tags, strict=True)
    ]
    if not counts:
        return []
    # The one read of the device in a pruned prompt's prefill: how many tokens survive, which sizes everything after.
    totals = torch.stack([torch.stack([c.after_l1.sum(), c.after_l2.sum()]) for c in counts]).tolist()
    videos = [Pruning(c, *total) for c, total in zip(counts, totals, strict=True)]
    kept = _select(
        [score for of_prompt in scores for score in of_prompt],
        [video.counts.before for video in videos],
        [video.counts.after_l1 for video in videos],
        [video.total1 for video in videos],
    )
    survivors, first = [], 0
    for row in rows:
        last = first + len(row.request.spans)
        survivors.append(_after_l1(row, videos[first:last], kept[first:last]))
        first = last
    return survivors


def prune_l2(survivors: Sequence[Survivors], scores: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Prune at L2 and choose what is retained; updates `survivors` to what is left.

    Returns:
        For each prompt the rows that go on, int64, among those it had.
    """
    videos = [video for of_prompt in survivors for video in of_prompt.videos]
    flat = [score for of_prompt in scores for score in of_prompt]
    kept = _select(
        flat,
        [video.counts.after_l1 for video in videos],
        [video.counts.after_l2 for video in videos],
        [video.total2 for video in videos],
    )
    rows, first = [], 0
    for of_prompt in survivors:
        last = first + len(of_prompt.videos)
        rows.append(_after_l2(of_prompt, kept[first:last], flat[first:last]))
        first = last
    return rows


def prune_l3(survivors: Sequence[Survivors]) -> list[torch.Tensor]:
    """Drop every visual token; updates `survivors`. Returns the rows that go on, as `prune_l2` does."""
    rows = []
    for of_prompt in survivors:
        rows.append(of_prompt.static)
        of_prompt.positions = of_prompt.positions[of_prompt.static]
        of_prompt.static = torch.arange(of_prompt.static.shape[0], device=of_prompt.static.device)
        of_prompt.retained_rows = None
    return rows


def _present(tags: VideoTags | None) -> VideoTags:
    assert tags is not None, "a prompt's videos are encoded before its last chunk"
    return tags


def _select(
    scores: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    keep: Sequence[torch.Tensor],
    totals: Sequence[int],
) -> list[torch.Tensor]:
    """The choice in every event of all videos at once. Returns for each video ascending indices among its own tokens."""
    chosen = ops.select(torch.cat(list(scores)), torch.cat(list(lengths)), torch.cat(list(keep)), sum(totals))
    kept, start = [], 0
    for score, part in zip(scores, torch.split(chosen, list(totals)), strict=True):
        kept.append(part - start)
        start += score.shape[0]
    return kept


def _after_l1(row: PrefillRow, videos: Sequence[Pruning], kept: Sequence[torch.Tensor]) -> Survivors:
    request = row.request
    alive = torch.zeros(request.prompt_len, dtype=torch.bool, device=request.static.device)
    alive.index_fill_(0, request.static, True)
    visual, offset, previous_end = [], 0, 0
    for span, video, index in zip(request.spans, videos, kept, strict=True):
        alive.index_fill_(0, index + span.start, True)
        offset += span.start - previous_end
        visual.append((offset, video.total1))
        offset += video.total1
        previous_end = span.end
    static = request.static.shape[0]
    size = static + sum(video.total1 for video in videos)
    positions = true_indices(alive, size)
    after_l2 = sum(video.total2 for video in videos)
    retained = retained_count(after_l2, request.retention)
    request.result = PruningResult(request.visual, size - static, after_l2, retained)
    return Survivors(
        row=row,
        positions=positions,
        static=torch.searchsorted(positions, request.static),
        visual=visual,
        videos=list(videos),
        retained=retained,
    )


def _after_l2(survivors: Survivors, kept: Sequence[torch.Tensor], scores: Sequence[torch.Tensor]) -> torch.Tensor:
    alive = torch.zeros(survivors.size, dtype=torch.bool, device=survivors.positions.device)
    alive.index_fill_(0, survivors.static, True)
    visual = torch.cat([index + start for (start, _), index in zip(survivors.visual, kept, strict=True)])
    alive.index_fill_(0, visual, True)
    rows = true_indices(alive, survivors.static.shape[0] + survivors.total2)
    if survivors.retained:
        kept_scores = torch.cat([score[index] for score, index in zip(scores, kept, strict=True)])
        chosen = retain(kept_scores, survivors.row.request.retention)
        survivors.held_rows = visual[true_indices(chosen, survivors.retained)]
        survivors.retained_rows = torch.searchsorted(rows, survivors.held_rows)
    survivors.static = torch.searchsorted(rows, survivors.static)
    survivors.positions = survivors.positions[rows]
    return rows
