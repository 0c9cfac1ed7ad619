"""The scores that a pruned step chooses by: how much the question looks at
each visual token (docs/method.md section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from metok_vllm.contract.spans import VideoSpan
from metok_vllm.worker import ops
from metok_vllm.worker.batch import PromptChunk
from metok_vllm.worker.requests import ChunkState, visual_positions
from metok_vllm.worker.survivors import Survivors

Scores = list[list[torch.Tensor]]
"""For every prompt, for every pruned video of it: float32 [its visual tokens alive]."""


def prompt_scores(attention: Any, chunks: Sequence[PromptChunk], states: Sequence[ChunkState]) -> Scores:
    """Scores at L1 of complete prompts.

    Args:
        attention: the layer right before L1.
        chunks: the last chunk of each prompt.
        states: the state of each prompt at L1, whole.
    """
    scores = []
    for chunk, state in zip(chunks, states, strict=True):
        request = chunk.request
        key = state.key.view(-1, attention.num_kv_heads, attention.head_size)
        query = state.query.view(-1, attention.num_heads, attention.head_size)
        positions = torch.arange(request.prompt_len, device=key.device)
        scores.append(
            [
                ops.scores(
                    query[before:],
                    key,
                    visual_positions(span, tags, positions),
                    request.scoring[before:],
                    positions,
                    attention.impl.scale,
                )
                for span, tags, before in zip(request.spans, request.tags, request.scoring_before, strict=True)
            ]
        )
    _reduce(scores)
    return [
        [
            _smoothed(score, span, None if tags is None else tags.frames_of(span))
            for score, span, tags in zip(of_prompt, chunk.request.spans, chunk.request.tags, strict=True)
        ]
        for chunk, of_prompt in zip(chunks, scores, strict=True)
    ]


def survivor_scores(
    attention: Any, survivors: Sequence[Survivors], offset: int, query: torch.Tensor, key: torch.Tensor
) -> Scores:
    """Scores at L2 of what L1 has left, and at L3 of what L2 has left.

    Args:
        attention: the layer right before that pruning layer.
        survivors: the prompts, one after the other in the step's rows.
        offset: the row of the first one's first token.
        query: [rows, Hq * d] of that layer.
        key: [rows, Hkv * d].
    """
    query = query.view(-1, attention.num_heads, attention.head_size)
    key = key.view(-1, attention.num_kv_heads, attention.head_size)
    scores: Scores = []
    for of_prompt in survivors:
        if not of_prompt.visual:  # at L3: it lets nothing pass
            scores.append([])
            offset += of_prompt.size
            continue
        request = of_prompt.chunk.request
        own = slice(offset, offset + of_prompt.size)
        # A scoring token is text, so it is alive; its row among the survivors follows from its position.
        rows = torch.searchsorted(of_prompt.positions, request.scoring)
        scores.append(
            [
                ops.scores(
                    query[own][rows[before:]],
                    key[own],
                    visual.every(key.device),
                    request.scoring[before:],
                    of_prompt.positions,
                    attention.impl.scale,
                )
                for visual, before in zip(of_prompt.visual, request.scoring_before, strict=True)
            ]
        )
        offset += of_prompt.size
    _reduce(scores)
    return [
        [
            _smoothed(score, span, visual.frame)
            for score, span, visual in zip(of_prompt, p.chunk.request.spans, p.visual, strict=False)
        ]
        for p, of_prompt in zip(survivors, scores, strict=True)
    ]


def _smoothed(score: torch.Tensor, span: VideoSpan, frame: torch.Tensor | None) -> torch.Tensor:
    """Scores of one video, float32 [n], mixed with their frames' means where its plan asks for it."""
    if not span.plan.smoothing_micro:
        return score
    assert frame is not None
    return ops.smooth(score, frame, span.plan.frames, span.plan.smoothing_micro)


def _reduce(scores: Scores) -> None:
    """Average the scores over the ranks' heads, in place, so that all ranks agree on the survivors."""
    ranks = get_tensor_model_parallel_world_size()
    flat = [score for of_prompt in scores for score in of_prompt]
    if ranks == 1 or not flat:
        return
    together = tensor_model_parallel_all_reduce(torch.cat(flat)) / ranks
    for score, mean in zip(flat, torch.split(together, [s.shape[0] for s in flat]), strict=True):
        score.copy_(mean)
