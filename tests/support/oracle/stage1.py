"""Stage 1 by the book: events, alignment, tiers and pooling of one video (docs/method.md 1 and 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle import settings as rules
from tests.support.oracle.labelled import PLAIN, Labels, around, widen
from tests.support.oracle.settings import OracleSettings


@dataclass
class Stage1:
    """What stage 1 decided about one video of T frames, and the rows it hands to the language model."""

    similarities: list[float]  # S, T - 1 values
    events: list[tuple[int, int]]  # first frame, one past the last; empty when METok is off
    relevance: list[float]  # r, one a frame
    key_events: list[int]  # ascending
    strides: list[int]  # one a frame
    embeddings: Tensor  # [tokens, D]
    event_of_token: list[int]  # a separator belongs to the event it follows, text to none (-1); empty when METok is off
    frame_of_token: list[int] = field(default_factory=list)  # a separator is of the frame that it follows
    margin: float = math.inf  # smallest difference of two cosines that a decision rested on
    written: dict[int, int] = field(default_factory=dict)  # row and id of text, when METok is off


@dataclass(frozen=True)
class Layout:
    """What differs between the models: how a grid is pooled, and where one `image_newline` follows.

    A model has another one than LLaVA-OneVision's as its attribute `layout`.
    """

    pool: str = "bilinear"  # or "average"
    newline: str = "event"  # or "row", "none"
    pictures: str = "spatial_unpad"  # as transformers lays them out; or "unires"
    plain: int = 2  # stride of a video without METok
    tower: Callable[[Any, Any], Tensor] | None = None  # model and pixels to V[T, H, W, D]; None: LLaVA's
    rotary: Callable[..., tuple[Tensor, int]] | None = None  # see `run.positions`; None: a token's place is its own
    labels: Callable[[Any, Any], Labels] | None = None
    """Model and pixels to a video's labels and extra channels. METok off, the prompt has the text's ids."""
    encode_pictures: Callable[..., list[Tensor]] | None = None  # as the function of that name
    answer: Callable[..., tuple[list[int], Tensor]] | None = None
    """In place of the oracle's own layers, where the model's have to stay whole: see `qwen3_5.answer`."""


def layout_of(model: Any) -> Layout:
    return getattr(model, "layout", Layout())


def features(model: Any, pixels: Tensor) -> Tensor:
    """V[T, H, W, D]: the tower's chosen layer, projected, of frames [T, 3, height, width]."""
    tower = layout_of(model).tower
    if tower is not None:
        return tower(model, pixels)
    config = model.config
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    chosen = states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":  # the first token is the class's
        chosen = chosen[:, 1:]
    tokens = model.model.multi_modal_projector(chosen)
    side = config.vision_config.image_size // config.vision_config.patch_size
    return tokens.reshape(len(pixels), side, side, -1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the last dimension in float32."""
    a, b = a.float(), b.float()
    norms = a.norm(dim=-1).clamp_min(1e-12) * b.norm(dim=-1).clamp_min(1e-12)
    return (a * b).sum(-1) / norms


def cut_events(similarities: list[float], events: int) -> list[tuple[int, int]]:
    """1.2: [start, stop) of each event, cut after the lowest similarities; equal ones: the lower index."""
    frames = len(similarities) + 1
    order = sorted(range(len(similarities)), key=lambda i: (similarities[i], i))
    starts = [0, *(i + 1 for i in sorted(order[: min(events, frames) - 1]))]
    return list(zip(starts, [*starts[1:], frames], strict=True))


def align(
    model: Any,
    vectors: Tensor,
    events: list[tuple[int, int]],
    question_ids: list[int],
    mode: str,
    towers: tuple[Any, Tensor, Tensor] | None,
) -> Tensor:
    """1.3: r[T]. `towers`, for "dual-tower": the model, frames [T, 3, h, w], token windows [windows, n]."""
    if mode == "none":
        means = torch.cat([vectors[a:b].mean(0).expand(b - a, -1) for a, b in events])
        return cosine(vectors, means)
    if mode == "embedding":
        ids = torch.tensor(question_ids, dtype=torch.long)
        words = model.get_input_embeddings()(ids).float()
        text = words.mean(0) if len(ids) else torch.zeros(vectors.shape[-1])
        return cosine(vectors, text)
    assert mode == "dual-tower", mode
    assert towers is not None, "dual-tower alignment needs the towers"
    tower, pixels, windows = towers
    images = tower.get_image_features(pixel_values=pixels).pooler_output
    texts = tower.get_text_features(input_ids=windows).pooler_output
    return cosine(images, texts.float().amax(0))


def pick_key_events(scores: list[float], key_events: int) -> list[int]:
    """1.4: the best events, in ascending order; equal scores prefer the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(order[:key_events])


def rank_frames(
    relevance: list[float], events: list[tuple[int, int]], key_events: list[int], key_frames: int
) -> list[tuple[int, float, int]]:
    """4: (class 0 to 2, -r, index) of every frame, best first: by class, then higher r, then index."""
    ranked = []
    for number, (start, stop) in enumerate(events):
        order = sorted(range(start, stop), key=lambda i: (-relevance[i], i))
        for place, frame in enumerate(order):
            lower = (number not in key_events) + (place >= key_frames)
            ranked.append((lower, -relevance[frame], frame))
    return sorted(ranked)


def assign_strides(
    ranked: list[tuple[int, float, int]], counts: tuple[int, int, int], strides: tuple[int, int, int]
) -> list[int]:
    """4: the stride of each frame; the first `counts[0]` of `ranked` get `strides[0]`, and so on."""
    result = [0] * len(ranked)
    quota = [s for s, n in zip(strides, counts, strict=True) for _ in range(n)]
    for (_, _, frame), stride in zip(ranked, quota, strict=True):
        result[frame] = stride
    return result


def pool(model: Any, frame: Tensor, stride: int) -> Tensor:
    """1.5: one frame [H, W, D] as [t(stride), D], pooled and with newlines like the model's own frames."""
    height, width, depth = frame.shape
    layout = layout_of(model)
    if stride > 1 and layout.pool == "average":
        rows = [
            torch.stack([frame[y : y + stride, x : x + stride].mean((0, 1)) for x in range(0, width, stride)])
            for y in range(0, height, stride)
        ]
        frame = torch.stack(rows)
    elif stride > 1:
        size = (math.ceil(height / stride), math.ceil(width / stride))
        grid = frame.permute(2, 0, 1).unsqueeze(0)
        frame = torch.nn.functional.interpolate(grid, size=size, mode="bilinear")[0].permute(1, 2, 0)
    if layout.newline == "row":
        newline = widen(model.model.image_newline.unsqueeze(0), depth)
        return torch.cat([torch.cat([row, newline]) for row in frame])
    return frame.reshape(-1, depth)


def separators(model: Any) -> list[Tensor]:
    """1.6: the rows that follow an event, and a video without METok: one `image_newline`, or none."""
    return [model.model.image_newline.unsqueeze(0)] if layout_of(model).newline == "event" else []


def encode_pictures(model: Any, pixels: Tensor, sizes: Tensor) -> list[Tensor]:
    """Tokens [n, D] of each picture, whose whole and whose tiles are `pixels` [pictures, 1 + tiles, 3, h, w];
    [n, D + extra channels] where the model has its own way.

    "unires" (LongVA's paper): only the tiles, each pooled by 2, in the order in which one reads.
    """
    own_way = layout_of(model).encode_pictures
    if own_way is not None:
        return own_way(model, pixels, sizes)
    if layout_of(model).pictures != "unires":
        return list(model.model.get_image_features(pixels, sizes).pooler_output)
    side, found = model.config.vision_config.image_size, []
    for own, (height, width) in zip(pixels, sizes.tolist(), strict=True):
        best = best_tiling(model.config.image_grid_pinpoints, height, width)
        tiles = features(model, own[1 : 1 + best[0] * best[1] // side**2])
        found.append(torch.cat([pool(model, tile, 2) for tile in tiles]))
    return found


def best_tiling(tilings: list[list[int]], height: int, width: int) -> list[int]:
    """Of [height, width]s the one in which a picture keeps most of its pixels, and of those wastes least."""

    def worth(tiling: list[int]) -> tuple[int, int]:
        scale = min(tiling[0] / height, tiling[1] / width)
        kept = min(int(height * scale) * int(width * scale), height * width)
        return kept, kept - tiling[0] * tiling[1]

    return max(tilings, key=worth)


def gap(values: list[float], count: int) -> float:
    """How far the `count`-th best of `values` is ahead of the next; infinite if nothing was to choose."""
    best = sorted(values, reverse=True)
    return best[count - 1] - best[count] if 0 < count < len(best) else math.inf


def encode_plain(model: Any, pixels: Tensor, labels: Labels = PLAIN) -> Stage1:
    """The model without METok: every frame pooled with one stride, what follows an event after the video."""
    grid, plain = features(model, pixels), layout_of(model).plain
    wide = torch.cat([grid, labels.extra(grid)], dim=-1)
    rows: list[Tensor] = []
    written: dict[int, int] = {}
    for i, frame in enumerate(wide):
        for (part, is_text), ids in zip(
            around(model, labels.text(i, len(grid)), pool(model, frame, plain)),
            (labels.text(i, len(grid))[0], [], labels.text(i, len(grid))[1]),
            strict=True,
        ):
            if is_text:
                start = sum(map(len, rows))
                written |= {start + place: token for place, token in enumerate(ids)}
            rows.append(part)
    rows += [widen(row, wide.shape[-1]) for row in separators(model)]
    return Stage1([], [], [], [], [plain] * len(grid), torch.cat(rows), [], written=written)


def encode(
    model: Any,
    pixels: Tensor,
    question_ids: list[int],
    settings: OracleSettings,
    towers: tuple[Any, Tensor, Tensor] | None,
    labels: Labels = PLAIN,
) -> Stage1:
    """Stage 1 of one video, pixel values [T, 3, height, width]."""
    grid = features(model, pixels)
    vectors = grid.float().mean((1, 2))
    similarities = cosine(vectors[:-1], vectors[1:]).tolist()
    events = cut_events(similarities, settings.events)
    relevance = align(model, vectors, events, question_ids, settings.aligner, towers).tolist()

    scores = [max(relevance[a:b]) for a, b in events]
    if settings.aligner == "none":
        scores = [float(b - a) for a, b in events]
    key_events = pick_key_events(scores, settings.key_events)
    counts = rules.quotas(settings, len(grid), (grid.shape[1], grid.shape[2]), layout_of(model).newline)
    ranked = rank_frames(relevance, events, key_events, settings.key_frames)
    strides = assign_strides(ranked, counts, settings.strides)

    wide = torch.cat([grid, labels.extra(grid)], dim=-1)
    rows, owners, frames = [], [], []
    for number, (start, stop) in enumerate(events):
        block = []
        for i in range(start, stop):
            around_it = around(model, labels.text(i, len(grid)), pool(model, wide[i], strides[i]))
            frames += [i for part, _ in around_it for _ in part]
            block += around_it
        block += [(widen(row, wide.shape[-1]), False) for row in separators(model)]
        frames += [stop - 1] * len(separators(model))
        rows += [part for part, _ in block]
        owners += [-1 if is_text else number for part, is_text in block for _ in part]

    margins = [gap([-s for s in similarities], len(events) - 1)]
    margins += [gap(relevance[a:b], settings.key_frames) for a, b in events]
    if settings.aligner != "none":  # lengths of events are whole numbers: equal or far apart
        margins.append(gap(scores, settings.key_events))
    for edge in (counts[0], counts[0] + counts[1]):  # a border between two strides inside one class of frames
        if 0 < edge < len(ranked) and ranked[edge - 1][0] == ranked[edge][0]:
            margins.append(ranked[edge][1] - ranked[edge - 1][1])
    return Stage1(similarities, events, relevance, key_events, strides, torch.cat(rows), owners, frames, min(margins))
