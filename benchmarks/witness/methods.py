"""What each method makes of one question: which visual rows enter,
which layers drop them, what decoding may see.

Answers are scored against the expected text in one pass: its tokens are fed, and each must be the most likely
one after those before it. That is exactly "greedy decoding gives this text", without a step for every token.
The visual KV that stage 3 releases is gone before any of them is fed; the first token comes from prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.witness.model import Cache, Decoder
from metok_vllm.compression import alignment, retention, scoring, selection, tiers
from metok_vllm.compression.ordering import top
from metok_vllm.compression.pooling import PoolStyle
from metok_vllm.compression.ratios import to_micro
from metok_vllm.compression.stage1 import Recipe, compress_video
from metok_vllm.compression.stage2 import EventCounts, survivor_mask

EVENTS, KEY_EVENTS, KEY_FRAMES, KEEP = 5, 3, 6, to_micro(0.76)
FINE, PAPER = (2, 2, 2), (2, 4, 8)  # pooling strides: every frame as stock has it; the method's


@dataclass(frozen=True)
class Visual:
    """A video's rows as they enter the language model, and whose they are."""

    rows: Tensor  # [V, D]
    event: Tensor  # int64 [V]
    is_key: Tensor  # bool [events]


def stage1(grid: Tensor, question: Tensor, strides: tuple[int, int, int]) -> Visual:
    """Events, alignment in embedding space, tiers and pooling of `grid`
    [T, H, W, D] for a question's rows [Q, D].

    Average pooling, no separators; the same function as in the engine.
    """
    recipe = Recipe(
        tiers.quota(len(grid), EVENTS, KEY_EVENTS, KEY_FRAMES),
        KEY_EVENTS,
        KEY_FRAMES,
        strides,
        PoolStyle("average", "none"),
    )

    def align(vectors: Tensor, event: Tensor, events: int) -> alignment.Alignment:
        return alignment.by_question(alignment.embedding(vectors, question), event, events)

    video = compress_video(grid, recipe, align, None)
    return Visual(video.tokens, video.event, video.choice.is_key)


Choose = Callable[[Tensor], Tensor]
"""Scores of the visual tokens alive, [n], to the mask of those that stay."""


def metok_schedule(
    visual: Visual, layers: selection.PruneLayers, random: torch.Generator | None = None
) -> dict[int, Choose]:
    """Stage 2: what is dropped before each pruning layer. With `random`, as many tokens, but any."""

    counts = EventCounts.of(visual.event, visual.is_key, KEEP)

    def choose(pruning_layer: selection.PruningLayer) -> Choose:
        def mask(scores: Tensor) -> Tensor:
            by = scores if random is None else torch.rand(len(scores), generator=random)
            return survivor_mask(by, counts, pruning_layer)

        return mask

    first, second, third = layers
    return {first: choose(1), second: choose(2), third: choose(3)}


def one_cut(layer: int, count: int) -> dict[int, Choose]:
    """FastV-like: the `count` most attended tokens of the whole video stay from `layer` on;
    nothing more happens.
    """
    return {layer: lambda scores: top(scores, count)}


@dataclass
class Prefill:
    """The prompt's way through the layers."""

    cache: Cache = field(default_factory=Cache)
    last: Tensor = field(default_factory=lambda: torch.empty(0))  # [1, D], what the first token is read from
    video: tuple[int, int] = (0, 0)  # first position, one past the last
    length: int = 0  # of the prompt
    tokens: list[int] = field(default_factory=list)  # visual tokens alive in each layer
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer: survivors' positions and scores


@torch.no_grad()
def prefill(decoder: Decoder, past: Cache, visual: Visual, after: list[int], schedule: dict[int, Choose]) -> Prefill:
    """Run a prompt: `past` holds the text before the video, `after` the ids of the text behind it."""
    begin = len(past.positions[0])
    video, length = len(visual.rows), begin + len(visual.rows) + len(after)
    hidden = torch.cat([visual.rows, decoder.embed(after)])
    positions = torch.arange(begin, length)
    alive, seen = len(visual.rows), None
    out = Prefill(video=(begin, begin + video), length=length)
    for number in range(len(decoder.layers)):
        if number in schedule:
            if seen is None:
                raise ValueError("no layer before the first one has attention to score by")
            rows, before = slice(alive, None), positions[:alive]
            index = len(seen.positions) - len(positions) + torch.arange(alive)
            scores = scoring.text_to_visual_scores(
                seen.query[rows], seen.keys, index, positions[rows], seen.positions, decoder.scale
            )
            mask = schedule[number](scores)
            out.scores[number] = (before[mask], scores[mask])
            kept = torch.cat([mask, torch.ones(len(after), dtype=torch.bool)])
            hidden, positions, alive = hidden[kept], positions[kept], int(mask.sum())
        hidden, seen = decoder.layer(number, hidden, positions, past)
        out.tokens.append(alive)
        out.cache.keys.append(seen.keys)
        out.cache.values.append(seen.values)
        out.cache.positions.append(seen.positions)
    out.last = hidden[-1:]
    return out


def released(done: Prefill, layers: selection.PruneLayers, delta: float) -> Cache:
    """Stage 3: what decoding may see after a METok prefill, with `decode_retention` = `delta`."""
    first, second, third = layers
    survivors, scores = done.scores[second]
    spared = survivors[retention.retain(scores, to_micro(delta))]
    masks: list[Tensor | None] = []
    for number, positions in enumerate(done.cache.positions):
        text = (positions < done.video[0]) | (positions >= done.video[1])
        if number < first:
            masks.append(None)
        else:
            masks.append(text | torch.isin(positions, spared) if number < third else text)
    return done.cache.kept(masks)


def visual_rows(cache: Cache, video: tuple[int, int]) -> float:
    """Visual KV rows that a cache holds, mean over the layers."""
    held = [int(((p >= video[0]) & (p < video[1])).sum()) for p in cache.positions]
    return sum(held) / len(held)


@torch.no_grad()
def hits(decoder: Decoder, done: Prefill, caches: list[Cache], answer: list[int]) -> list[list[bool]]:
    """For each of `caches`, what decoding behind one prefill may see:
    which tokens of `answer` greedy decoding gives.

    Token n is judged behind the right ones before it. Where the first is wrong already, so is the answer:
    nothing more is computed, and the list is `[False]`.
    """
    if decoder.best(done.last) != answer[:1]:
        return [[False]] * len(caches)
    fed = answer[:-1]
    if not fed:
        return [[True]] * len(caches)
    positions = torch.arange(done.length, done.length + len(fed)).repeat(len(caches))
    rows = decoder.run_many(decoder.embed(fed).repeat(len(caches), 1), positions, caches)
    tokens = torch.tensor(decoder.best(rows)).view(len(caches), -1) == torch.tensor(answer[1:])
    return [[True, *row] for row in tokens.tolist()]


@torch.no_grad()
def plain_hits(decoder: Decoder, pasts: list[Cache], after: list[int], answer: list[int]) -> list[list[bool]]:
    """The same where nothing is dropped: each of `pasts` holds a prompt up to and with its video."""
    ids = after + answer[:-1]
    positions = torch.cat([torch.arange(len(ids)) + len(past.positions[0]) for past in pasts])
    rows = decoder.run_many(decoder.embed(ids).repeat(len(pasts), 1), positions, pasts)
    rows = rows.view(len(pasts), len(ids), -1)[:, len(after) - 1 :]
    tokens = torch.tensor(decoder.best(rows.flatten(0, 1))).view(len(pasts), -1) == torch.tensor(answer)
    out: list[list[bool]] = tokens.tolist()
    return out


@torch.no_grad()
def with_rows(decoder: Decoder, past: Cache, rows: Tensor) -> Cache:
    """The cache behind more rows [n, D] of a prompt."""
    begin = len(past.positions[0]) if past.positions else 0
    return decoder.run(rows, torch.arange(begin, begin + len(rows)), past)[1]
