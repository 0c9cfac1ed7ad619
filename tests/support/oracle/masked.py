"""Dropping a token is hiding it: a run of the oracle as one masked forward of transformers' own model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.oracle import OracleResult, OracleSettings, VideoTrace, stage1
from tests.support.oracle.run import lay_out
from tests.support.oracle.samples import Sample


@dataclass(frozen=True)
class Request:
    """What `run` takes, without the settings."""

    prompt_ids: list[int]
    videos: list[Tensor]
    images: tuple[Tensor, Tensor] | None
    question_ids: list[int]


def input_rows(sample: Sample, request: Request, settings: OracleSettings) -> Tensor:
    """The rows that enter the language model, [prompt tokens, D]."""
    with torch.no_grad():
        videos = [
            stage1.encode(sample.model, pixels, request.question_ids, settings, None).embeddings
            for pixels in request.videos
        ]
        pictures = []
        if request.images is not None:
            pictures = list(sample.model.model.get_image_features(*request.images).pooler_output)
        return lay_out(sample.model, request.prompt_ids, videos, pictures)[1]


def visibility(result: OracleResult, layer: int) -> Tensor:
    """Who sees whom in `layer`, bool [tokens, tokens] over the prompt and every generated token but the last.

    Written from what `result` says was alive while the prompt ran, and held while decoding. A dropped token
    sees itself, so that its softmax is defined; nobody else sees it.
    """
    assert result.videos is not None
    assert result.prune_layers is not None
    assert result.kv_positions is not None
    prompt, total = len(result.prompt_ids), len(result.prompt_ids) + len(result.tokens) - 1
    stage = sum(layer >= limit for limit in result.prune_layers)
    dropped = torch.zeros(total, dtype=torch.bool)
    for video in result.videos:
        alive = [range(*video.span), video.after_l1, video.after_l2, video.after_l3][stage]
        dropped[sorted(set(range(*video.span)) - set(alive))] = True
    released = torch.ones(total, dtype=torch.bool)
    released[result.kv_positions[layer]] = False
    released[prompt:] = False

    rows = torch.ones(total, total, dtype=torch.bool).tril()
    rows[:prompt, dropped] = False
    rows[prompt:, released] = False
    return rows | torch.eye(total, dtype=torch.bool)


def masked_forward(sample: Sample, rows: Tensor, result: OracleResult) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Log-probabilities [steps, vocabulary] and each layer's attention [1, heads, tokens, tokens]."""
    model = sample.model
    fed = model.get_input_embeddings()(torch.tensor(result.tokens[:-1], dtype=torch.long))
    everything = torch.cat([rows, fed])[None]
    layers = model.model.language_model.layers

    def masked(number: int) -> Callable[..., Any]:
        bias = torch.zeros(everything.shape[1], everything.shape[1])
        bias = bias.masked_fill(~visibility(result, number), torch.finfo(torch.float32).min)[None, None]
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": bias})

    hooks = [layer.register_forward_pre_hook(masked(number), with_kwargs=True) for number, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            out = model.model.language_model(inputs_embeds=everything, use_cache=False, output_attentions=True)
            logits = model.lm_head(out.last_hidden_state[0, len(rows) - 1 :])
    finally:
        for hook in hooks:
            hook.remove()
    return logits.log_softmax(-1), out.attentions


def owners(video: VideoTrace, side: int) -> dict[int, int]:
    """The event of each visual position: an event is its pooled `side` x `side` frames and a separator."""
    result, position = {}, video.span[0]
    for event, (first, last) in enumerate(video.events):
        tokens = sum(math.ceil(side / stride) ** 2 for stride in video.strides[first:last]) + 1
        result |= dict.fromkeys(range(position, position + tokens), event)
        position += tokens
    assert position == video.span[1]
    return result


def check_survivors(
    video: VideoTrace, attentions: list[Tensor], text_rows: list[int], side: int, ratio: float
) -> dict[int, float]:
    """Assert that the survivors are each event's best by the attention of transformers.

    `attentions`: those of layers L1 - 1 and L2 - 1, [heads, n, n]. Returns the scores at L2 of its survivors.
    """
    owner = owners(video, side)
    before = sorted(owner)
    scores: dict[int, float] = {}
    for stage, (attention, after) in enumerate(zip(attentions, (video.after_l1, video.after_l2), strict=True)):
        scores = {p: attention[:, text_rows, p].mean().item() for p in before}
        for event in range(len(video.events)):
            there = [p for p in before if owner[p] == event]
            kept = [p for p in after if owner[p] == event]
            share = ratio if event in video.key_events else (ratio / 2, 0.0)[stage]
            assert len(kept) == math.ceil(share * len(there) - 1e-9)
            dropped = [scores[p] for p in there if p not in kept]
            assert not kept or not dropped or min(scores[p] for p in kept) >= max(dropped) - 1e-9
        assert after == sorted(set(after))
        before = after
    return {p: scores[p] for p in before}
