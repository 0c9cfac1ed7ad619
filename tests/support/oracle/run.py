"""METok on the Hugging Face LLaVA-OneVision, from docs/method.md alone: the judge of the engine.

Plain eager PyTorch, one request at a time, whole matrices, KV in ordinary lists. Nothing of `metok_vllm` is
imported: where the two agree, two readings of the method agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle import decoder, stage1, stage2
from tests.support.oracle import settings as rules
from tests.support.oracle.labelled import PLAIN, Labels, levels
from tests.support.oracle.result import OracleResult, VideoTrace
from tests.support.oracle.settings import OracleSettings
from tests.support.oracle.stage1 import Stage1
from tests.support.oracle.stage2 import Video

Towers = tuple[Any, Sequence[Tensor], Tensor]
"""A paired image/text model, its frames of each video [T, 3, h, w], the question's windows [windows, n]."""


@torch.no_grad()
def run(
    model: Any,
    prompt_ids: list[int],
    videos: Sequence[Tensor],
    images: tuple[Tensor, Tensor] | None,
    question_ids: list[int],
    settings: OracleSettings,
    max_new_tokens: int,
    aligner: Towers | None = None,
    force_tokens: list[int] | None = None,
    labels: Labels = PLAIN,
    question_at: Sequence[int] | None = None,
) -> OracleResult:
    """Answer one request greedily.

    `prompt_ids` holds one placeholder an item. `videos`: pixel values [T, 3, height, width] each. `images`:
    the HF processor's (pixel_values, image_sizes); every image is tiled as if it were the only one, as vLLM
    does. `question_ids`: the question in the language model's own tokens, no special ones. `force_tokens`:
    fed instead of the tokens chosen, at least `max_new_tokens - 1`. `labels`: what the model has around and
    beside its frames. `question_at`: where the question's own tokens stand in `prompt_ids`; None, or none
    of them behind the last video, where that is not known. The end token does not end the run.

    Raises ValueError if METok is on and the prompt does not end with text.
    """
    config, layout = model.config, stage1.layout_of(model)
    encoded = []
    for number, pixels in enumerate(videos):
        own = labels if layout.labels is None else layout.labels(model, pixels)
        if settings.off:
            encoded.append(stage1.encode_plain(model, pixels, own))
        else:
            towers = None if aligner is None else (aligner[0], aligner[1][number], aligner[2])
            encoded.append(stage1.encode(model, pixels, question_ids, settings, towers, own))
    pictures = []
    if images is not None:
        pictures = stage1.encode_pictures(model, *images)

    depth = model.get_input_embeddings().weight.shape[1]
    rows = [e.embeddings for e in encoded]
    ids, hidden, spans, places = lay_out(
        model, prompt_ids, [own[:, :depth] for own in rows], [own[:, :depth] for own in pictures]
    )
    visual = {config.image_token_id, config.video_token_id}
    state = Prefill(model, hidden, [token not in visual for token in ids], settings)
    state.rotary, state.next_position = positions(model, ids, list(videos), images, [e.strides for e in encoded])
    state.videos = [
        Video(start, e.event_of_token, e.key_events, [], [], e.frame_of_token)
        for (start, _), e in zip(spans, encoded, strict=True)
    ]
    for video in state.videos:
        video.alive = video.visual
    if settings.score_rows == "question" and question_at and state.videos:
        lengths = {config.video_token_id: iter(e.embeddings for e in encoded), config.image_token_id: iter(pictures)}
        sizes = [len(next(lengths[token])) if token in lengths else 1 for token in prompt_ids]
        question = [sum(sizes[:i]) for i in question_at]
        if max(question) >= state.videos[-1].stop:
            state.question = question
    state.extra = levels(hidden, [*spans, *places], [*rows, *pictures])
    if settings.off and layout.labels is not None:
        for (start, _), e in zip(spans, encoded, strict=True):
            for place, token in e.written.items():
                ids[start + place] = token
    if layout.answer is not None:
        assert settings.off or settings.stages == 1, "nothing can be taken out of this model's layers"
        upcoming = state.next_position
        tokens, logprobs = layout.answer(model, hidden, state.rotary, upcoming, max_new_tokens, force_tokens)
    else:
        state.run()
        tokens, logprobs = decode(model, state, max_new_tokens, force_tokens)
    return report(ids, tokens, logprobs, state, encoded, spans)


def lay_out(
    model: Any, prompt_ids: list[int], videos: list[Tensor], images: list[Tensor]
) -> tuple[list[int], Tensor, list[tuple[int, int]], list[tuple[int, int]]]:
    """Write every placeholder out: the prompt's ids, its rows [tokens, D], the spans of videos, of images."""
    config = model.config
    queues = {config.video_token_id: iter(videos), config.image_token_id: iter(images)}
    ids: list[int] = []
    rows: list[Tensor] = []
    spans: dict[int, list[tuple[int, int]]] = {token: [] for token in queues}
    for token in prompt_ids:
        if token in queues:
            rows.append(next(queues[token]))
            spans[token].append((len(ids), len(ids) + len(rows[-1])))
        else:
            rows.append(model.get_input_embeddings()(torch.tensor([token])))
        ids += [token] * len(rows[-1])
    left = [item for queue in queues.values() for item in queue]
    assert not left, f"{len(left)} items have no placeholder"
    return ids, torch.cat(rows), spans[config.video_token_id], spans[config.image_token_id]


def positions(
    model: Any, ids: list[int], videos: list[Any], images: Any, strides: list[list[int]]
) -> tuple[Tensor, int]:
    """What the tokens `ids` are rotated by, [tokens] or [axes, tokens], and the position of the first answer.

    `strides`: of each video's frames.
    """
    rotary = stage1.layout_of(model).rotary
    return (torch.arange(len(ids)), len(ids)) if rotary is None else rotary(model, ids, videos, images, strides)


class Prefill:
    """The prompt's way through the layers; afterwards `keys` and `values` hold what decoding may see."""

    def __init__(self, model: Any, hidden: Tensor, is_text: list[bool], settings: OracleSettings) -> None:
        self.model = model
        self.hidden = hidden  # rows of the tokens alive, [alive, D]
        self.alive = list(range(len(hidden)))  # their prompt positions
        self.is_text = is_text
        self.settings = settings
        self.videos: list[Video] = []
        self.extra: list[Tensor] = []  # what is added behind the first layers, each [tokens, D]
        self.layers = list(model.model.language_model.layers)
        self.limits: tuple[int, int, int] | None = None
        self.retained: list[int] = []
        self.passed: list[int] = []  # visual positions that go on behind L3
        self.kv_positions: list[list[int]] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.margin = math.inf
        self.question: list[int] | None = None  # positions of the question's tokens, where they alone score
        self.rotary = torch.arange(len(hidden))  # of every token of the prompt
        self.next_position = len(hidden)  # of the first one behind it

    def run(self) -> None:
        """Run every layer on the tokens alive in it, dropping tokens before L1, L2 and L3."""
        pruned = bool(self.videos) and not self.settings.off and self.settings.stages == 3
        if pruned:
            self.limits = rules.prune_layers(self.settings, len(self.layers))
            if not self.is_text[-1]:
                raise ValueError("the prompt must end with text: the answer is read off its last token")
        probabilities = torch.empty(0)
        for number, layer in enumerate(self.layers):
            if self.limits is not None and number in self.limits:
                self.drop(self.limits.index(number) + 1, probabilities)
            positions = self.rotary_positions()
            query, key, value = decoder.project(self.model, layer, self.hidden, positions)
            order = torch.tensor(self.alive)
            attended, probabilities = decoder.attend(layer, query, key, value, order, order)
            self.hidden = decoder.finish(layer, self.hidden, attended)
            if number < len(self.extra):
                self.hidden = self.hidden + self.extra[number]
            self.kv_positions.append(list(self.alive))
            self.keys.append(key)
            self.values.append(value)
        self.release()

    def rotary_positions(self) -> Tensor:
        """The positions that the tokens alive are rotated by: those they had in the whole prompt."""
        return self.rotary[..., self.alive]

    def drop(self, stage: int, probabilities: Tensor) -> None:
        """2: take tokens out before L1, L2 or L3 (`stage` 1 to 3), by the attention of the layer before."""
        # A token's index among those alive is not its position in the prompt once tokens are gone.
        index_of = {p: i for i, p in enumerate(self.alive)}
        survivors: dict[int, float] = {}
        scored: dict[int, float] = {}
        for video in self.videos:
            rows = [index_of[p] for p in stage2.scoring_rows(video, self.is_text, self.question)]
            column = stage2.score(probabilities, rows).tolist()
            scores = stage2.smooth(video, {p: column[index_of[p]] for p in video.alive}, self.settings)
            scored |= scores
            if stage == 3:
                continue
            kept = stage2.keep(video, scores, self.settings, stage)
            for own in stage2.chosen_among(video, scores, self.settings):
                self.margin = min(self.margin, stage2.margin(own, [p for p in kept if p in own]))
            video.alive = kept
            video.after.append(kept)
            survivors |= {p: scores[p] for p in kept}
        if stage == 3:
            self.passed = stage2.passes_l3(scored, self.settings)
            self.margin = min(self.margin, stage2.margin(scored, self.passed))
            for video in self.videos:
                video.alive = [p for p in video.alive if p in self.passed]
                video.after.append(video.alive)
        if stage == 2:
            self.retained = stage2.retain(survivors, self.settings)
            self.margin = min(self.margin, stage2.margin(survivors, self.retained))
        gone = {p for video in self.videos for p in video.visual}
        gone -= {p for video in self.videos for p in video.alive}
        index = [i for i, p in enumerate(self.alive) if p not in gone]
        self.hidden = self.hidden[index]
        self.alive = [self.alive[i] for i in index]

    def spared(self, number: int) -> set[int]:
        """Visual positions whose KV of layer `number` decoding may use, if they were alive there."""
        assert self.limits is not None
        window = self.settings.kv_layers
        if window is not None:
            return set(self.kv_positions[number]) if number in range(*window) else set()
        if number < self.limits[0]:
            return set(self.kv_positions[number])
        return set(self.retained if number < self.limits[2] else self.passed)

    def release(self) -> None:
        """3, 4 and 4.8: forget the KV that decoding may not use."""
        if self.limits is None:
            return
        visual = {p for video in self.videos for p in video.visual}
        for number in range(len(self.layers)):
            spared = self.spared(number)
            held = self.kv_positions[number]
            index = [i for i, p in enumerate(held) if p not in visual or p in spared]
            self.kv_positions[number] = [held[i] for i in index]
            self.keys[number] = self.keys[number][:, index]
            self.values[number] = self.values[number][:, index]


def decode(model: Any, prefill: Prefill, steps: int, force_tokens: list[int] | None) -> tuple[list[int], Tensor]:
    """Greedy tokens and log-probabilities [steps, vocabulary]; new tokens are numbered on from the prompt."""
    length = len(prefill.is_text)
    keys, values = list(prefill.keys), list(prefill.values)
    held = [torch.tensor(positions) for positions in prefill.kv_positions]
    rows = [decoder.log_probabilities(model, prefill.hidden[-1])]
    tokens = [int(rows[0].argmax())]
    for step in range(steps - 1):
        fed = tokens[step] if force_tokens is None else force_tokens[step]
        position = torch.tensor([length + step])
        turned = torch.full((*prefill.rotary.shape[:-1], 1), prefill.next_position + step)
        hidden = model.get_input_embeddings()(torch.tensor([fed]))
        for number, layer in enumerate(prefill.layers):
            query, key, value = decoder.project(model, layer, hidden, turned)
            keys[number] = torch.cat([keys[number], key], dim=1)
            values[number] = torch.cat([values[number], value], dim=1)
            held[number] = torch.cat([held[number], position])
            attended, _ = decoder.attend(layer, query, keys[number], values[number], position, held[number])
            hidden = decoder.finish(layer, hidden, attended)
        rows.append(decoder.log_probabilities(model, hidden[0]))
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def report(
    ids: list[int],
    tokens: list[int],
    logprobs: Tensor,
    prefill: Prefill,
    encoded: list[Stage1],
    spans: list[tuple[int, int]],
) -> OracleResult:
    """Gather what was decided on the way."""
    traces = []
    for video, part, span in zip(prefill.videos, encoded, spans, strict=True):
        after: list[Any] = [*video.after, None, None, None]
        decided = (part.events, part.key_events, part.strides, part.relevance)
        traces.append(VideoTrace(span, *decided, *after[:3]))
    return OracleResult(
        prompt_ids=ids,
        tokens=tokens,
        logprobs=logprobs,
        videos=traces,
        prune_layers=prefill.limits,
        retained=prefill.retained,
        kv_positions=prefill.kv_positions,
        cosine_margin=min((part.margin for part in encoded), default=math.inf),
        score_margin=prefill.margin,
    )
