"""Which tokens of the prompts in a pruned step are still alive, and the choices at L1,
L2 and L3 (docs/method.md section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from metok_vllm.compression.ordering import top, true_indices
from metok_vllm.compression.retention import retain, retained_count
from metok_vllm.compression.stage2 import EventCounts
from metok_vllm.contract.spans import VideoSpan
from metok_vllm.worker import ops
from metok_vllm.worker.batch import PromptChunk
from metok_vllm.worker.requests import PruningResult, VideoTags


@dataclass(frozen=True)
class VideoCounts:
    """How many visual tokens of one pruned video survive: by event (with `quota` "video" all as one) on the
    device, in total on the host.
    """

    by_event: EventCounts
    after_l1: int
    after_l2: int


@dataclass(frozen=True)
class VideoRows:
    """The visual tokens of one video that are alive, among its prompt's survivors: a run of rows, unless text
    stands between them.
    """

    start: int  # row of the first token of the video's span
    length: int
    rows: torch.Tensor | None = None  # int64 [length], where text stands among them
    frame: torch.Tensor | None = None  # int64 [length], of each, where frames smooth the scores

    def every(self, device: torch.device) -> torch.Tensor:
        """Their rows, int64 [length]."""
        if self.rows is None:
            return torch.arange(self.start, self.start + self.length, device=device)
        return self.rows

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Rows of some of them, by int64 indices among them."""
        return index + self.start if self.rows is None else self.rows[index]


@dataclass
class Survivors:
    """The tokens of one prompt that are still alive, in prompt order."""

    chunk: PromptChunk  # the prompt's last one
    positions: torch.Tensor  # int64 [n]: where they stood in the prompt
    text: torch.Tensor  # int64 [text tokens], where the text stands among the n
    visual: list[VideoRows]  # of each pruned video, until L2; until L3 where it lets any pass
    videos: list[VideoCounts]
    retained: int  # visual tokens that keep their KV in layers L1 .. L3-1
    after_l3: int = 0  # visual tokens that pass L3
    keeps_all: bool = False  # whether the window `kv_layers` keeps all that are alive, up to L3
    kept_rows: torch.Tensor | None = None
    """int64: where visual tokens with slots in the next layers stand among the n.

    Behind L2 the retained ones, behind L3 those that passed it. With `keeps_all` all of them up to L3.
    """
    retained_rows_at_l1: torch.Tensor | None = None  # int64 [retained], where they stood among the survivors of L1

    @property
    def size(self) -> int:
        return self.positions.shape[0]

    @property
    def after_l2(self) -> int:
        """Visual tokens of all videos that pass L2."""
        return sum(video.after_l2 for video in self.videos)


def survivors_of_l1(
    chunks: Sequence[PromptChunk], scores: Sequence[Sequence[torch.Tensor]], keeps_all: bool = False
) -> list[Survivors]:
    """Prune complete prompts at L1.

    Args:
        chunks: the last chunk of each.
        scores: of every pruned video of each, float32 [its visual tokens].
        keeps_all: see `Survivors`.
    """
    counts = [
        event_counts(span, tags)
        for chunk in chunks
        for span, tags in zip(chunk.request.spans, chunk.request.tags, strict=True)
    ]
    if not counts:
        return []
    # The one read of the device in a pruned prompt's prefill: how many tokens survive, which sizes everything
    # after.
    sums = torch.stack([torch.stack([c.after_l1.sum(), c.after_l2.sum()]) for c in counts])
    with gpu_sync_allowed():
        totals = sums.tolist()
    videos = [VideoCounts(c, *total) for c, total in zip(counts, totals, strict=True)]
    kept = _select(
        [score for of_prompt in scores for score in of_prompt],
        [video.by_event.before for video in videos],
        [video.by_event.after_l1 for video in videos],
        [video.after_l1 for video in videos],
    )
    survivors, first = [], 0
    for chunk in chunks:
        last = first + len(chunk.request.spans)
        survivors.append(_after_l1(chunk, videos[first:last], kept[first:last], keeps_all))
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
        [video.by_event.after_l1 for video in videos],
        [video.by_event.after_l2 for video in videos],
        [video.after_l2 for video in videos],
    )
    rows, first = [], 0
    for of_prompt in survivors:
        last = first + len(of_prompt.videos)
        rows.append(_after_l2(of_prompt, kept[first:last], flat[first:last]))
        first = last
    return rows


def prune_l3(
    survivors: Sequence[Survivors], scores: Sequence[Sequence[torch.Tensor]] | None = None
) -> list[torch.Tensor]:
    """Drop every visual token but those that `final_keep` lets pass; updates `survivors`.

    Args:
        survivors: what L2 has left of the prompts.
        scores: of every pruned video of each that lets any pass, of others nothing; None where none does.

    Returns:
        For each prompt the rows that go on, as `prune_l2` does.
    """
    rows = []
    for i, of_prompt in enumerate(survivors):
        of_prompt.kept_rows = None
        if of_prompt.after_l3:
            assert scores is not None
            rows.append(_after_l3(of_prompt, torch.cat(list(scores[i]))))
            continue
        rows.append(of_prompt.text)
        of_prompt.positions = of_prompt.positions[of_prompt.text]
        of_prompt.text = torch.arange(of_prompt.text.shape[0], device=of_prompt.text.device)
    return rows


def event_counts(span: VideoSpan, tags: VideoTags | None) -> EventCounts:
    """Of one video, from the tags of its tokens; stays on the device. One run with `quota` "video"."""
    assert tags is not None, "a prompt's videos are encoded before its last chunk"
    is_key = torch.zeros(span.plan.events, dtype=torch.bool, device=tags.event.device)
    is_key.index_put_((tags.event,), tags.is_key)
    counts = EventCounts.of(tags.event, is_key, span.plan.keep_ratio_micro)
    return counts.over_the_video() if span.plan.whole_video else counts


def _select(
    scores: Sequence[torch.Tensor],
    lengths: Sequence[torch.Tensor],
    keep: Sequence[torch.Tensor],
    totals: Sequence[int],
) -> list[torch.Tensor]:
    """The choice in every event of all videos at once.

    Returns for each video ascending indices among its own visual tokens.
    """
    chosen = ops.select(torch.cat(list(scores)), torch.cat(list(lengths)), torch.cat(list(keep)), sum(totals))
    kept, start = [], 0
    for score, part in zip(scores, torch.split(chosen, list(totals)), strict=True):
        kept.append(part - start)
        start += score.shape[0]
    return kept


def _after_l1(
    chunk: PromptChunk, videos: Sequence[VideoCounts], kept: Sequence[torch.Tensor], keeps_all: bool
) -> Survivors:
    request, text = chunk.request, chunk.request.text()
    alive = torch.zeros(request.prompt_len, dtype=torch.bool, device=text.device)
    alive.index_fill_(0, text, True)
    chosen = []  # positions of each video's survivors
    for span, tags, index in zip(request.spans, request.tags, kept, strict=True):
        assert tags is not None
        chosen.append(tags.positions(span.start, index))
        alive.index_fill_(0, chosen[-1], True)
    after_l1 = sum(video.after_l1 for video in videos)
    after_l2 = sum(video.after_l2 for video in videos)
    retained = retained_count(after_l2, request.retention_micro)
    after_l3 = retained_count(after_l2, request.final_micro)
    request.result = PruningResult(request.visual_tokens, after_l1, after_l2, retained, after_l3)
    positions = true_indices(alive, request.text_tokens + after_l1)
    visual, row, previous_end = [], 0, 0
    for span, video, tags, places, index in zip(request.spans, videos, request.tags, chosen, kept, strict=True):
        row += span.start - previous_end
        rows = torch.searchsorted(positions, places) if span.plan.text_tokens else None
        assert tags is not None
        frame = tags.frames_of(span)[index] if span.plan.smoothing_micro else None
        visual.append(VideoRows(row, video.after_l1, rows, frame))
        row += span.plan.text_tokens + video.after_l1
        previous_end = span.end
    return Survivors(
        chunk=chunk,
        positions=positions,
        text=torch.searchsorted(positions, text),
        visual=visual,
        videos=list(videos),
        retained=retained,
        after_l3=after_l3,
        keeps_all=keeps_all,
        kept_rows=torch.searchsorted(positions, torch.cat(chosen)) if keeps_all else None,
    )


def _after_l2(survivors: Survivors, kept: Sequence[torch.Tensor], scores: Sequence[torch.Tensor]) -> torch.Tensor:
    alive = torch.zeros(survivors.size, dtype=torch.bool, device=survivors.positions.device)
    alive.index_fill_(0, survivors.text, True)
    chosen = [of_video.at(index) for of_video, index in zip(survivors.visual, kept, strict=True)]
    visual = torch.cat(chosen)
    alive.index_fill_(0, visual, True)
    rows = true_indices(alive, survivors.text.shape[0] + survivors.after_l2)
    if survivors.keeps_all:
        survivors.kept_rows = torch.searchsorted(rows, visual)
    elif survivors.retained:
        kept_scores = torch.cat([score[index] for score, index in zip(scores, kept, strict=True)])
        mask = retain(kept_scores, survivors.chunk.request.retention_micro)
        survivors.retained_rows_at_l1 = visual[true_indices(mask, survivors.retained)]
        survivors.kept_rows = torch.searchsorted(rows, survivors.retained_rows_at_l1)
    if survivors.after_l3:  # L3 scores them once more
        survivors.visual = [
            VideoRows(0, index.shape[0], torch.searchsorted(rows, places), None if v.frame is None else v.frame[index])
            for v, index, places in zip(survivors.visual, kept, chosen, strict=True)
        ]
    else:
        survivors.visual = []
    survivors.text = torch.searchsorted(rows, survivors.text)
    survivors.positions = survivors.positions[rows]
    return rows


def _after_l3(survivors: Survivors, scores: torch.Tensor) -> torch.Tensor:
    """Let the best pass L3, of all the prompt's videos together; `scores` float32 [C2]. Returns the rows."""
    alive = torch.zeros(survivors.size, dtype=torch.bool, device=survivors.positions.device)
    alive.index_fill_(0, survivors.text, True)
    visual = torch.cat([of_video.every(alive.device) for of_video in survivors.visual])
    passed = visual[true_indices(top(scores, survivors.after_l3), survivors.after_l3)]
    alive.index_fill_(0, passed, True)
    rows = true_indices(alive, survivors.text.shape[0] + survivors.after_l3)
    survivors.kept_rows = torch.searchsorted(rows, passed)
    survivors.text = torch.searchsorted(rows, survivors.text)
    survivors.positions = survivors.positions[rows]
    survivors.visual = []
    return rows
