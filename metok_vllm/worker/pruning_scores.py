"""The scores that a pruned step chooses by: how much the question looks at each visual token (method.md section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

from metok_vllm.worker import ops
from metok_vllm.worker.batch import PrefillRow
from metok_vllm.worker.requests import DeferredChunk
from metok_vllm.worker.survivors import Survivors

Scores = list[list[torch.Tensor]]
"""For every prompt, for every pruned video of it: float32 [its tokens alive]."""


def prompt_scores(attention: Any, rows: Sequence[PrefillRow], chunks: Sequence[DeferredChunk]) -> Scores:
    """Scores at L1 of complete prompts.

    Args:
        attention: the layer right before L1.
        rows: the prompts.
        chunks: the state of each at L1, whole.
    """
    scores = []
    for row, chunk in zip(rows, chunks, strict=True):
        request = row.request
        key = chunk.key.view(-1, attention.num_kv_heads, attention.head_size)
        query = chunk.query.view(-1, attention.num_heads, attention.head_size)
        positions = torch.arange(request.prompt_len, device=key.device)
        scores.append(
            [
                ops.scores(
                    query[before:],
                    key,
                    positions[span.start : span.end],
                    request.score_rows[before:],
                    positions,
                    attention.impl.scale,
                )
                for span, before in zip(request.spans, request.rows_before, strict=True)
            ]
        )
    return _reduced(scores)


def survivor_scores(
    attention: Any, survivors: Sequence[Survivors], offset: int, query: torch.Tensor, key: torch.Tensor
) -> Scores:
    """Scores at L2 of what L1 has left.

    Args:
        attention: the layer right before L2.
        survivors: the prompts, one after the other in the step's rows.
        offset: the row of the first one's first token.
        query: [rows, Hq * d] of that layer.
        key: [rows, Hkv * d].
    """
    query = query.view(-1, attention.num_heads, attention.head_size)
    key = key.view(-1, attention.num_kv_heads, attention.head_size)
    scores = []
    for of_prompt in survivors:
        request = of_prompt.row.request
        own = slice(offset, offset + of_prompt.size)
        # A scoring row is text, so it is alive; its place among the survivors follows from its position.
        rows = torch.searchsorted(of_prompt.positions, request.score_rows)
        scores.append(
            [
                ops.scores(
                    query[own][rows[before:]],
                    key[own],
                    torch.arange(start, start + count, device=key.device),
                    request.score_rows[before:],
                    of_prompt.positions,
                    attention.impl.scale,
                )
                for (start, count), before in zip(of_prompt.visual, request.rows_before, strict=True)
            ]
        )
        offset += of_prompt.size
    return _reduced(scores)


def _reduced(scores: Scores) -> Scores:
    """Average the scores over the ranks' heads, in place, so that all ranks agree on the survivors."""
    ranks = get_tensor_model_parallel_world_size()
    flat = [score for of_prompt in scores for score in of_prompt]
    if ranks == 1 or not flat:
        return scores
    together = tensor_model_parallel_all_reduce(torch.cat(flat)) / ranks
    for score, mean in zip(flat, torch.split(together, [s.shape[0] for s in flat]), strict=True):
        score.copy_(mean)
    return scores
