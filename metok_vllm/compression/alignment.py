"""Alignment: how well each frame answers the question (docs/method.md sections 1.3 and 1.4).

The setting `aligner` chooses one of three: `dual_tower` and `embedding` give `r`, one float32 score a frame,
from which `by_question` scores the events; `none` gives both. Nothing here waits for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cosine import cosine
from .events import event_lengths
from .ordering import top


class Alignment(NamedTuple):
    """How well frames and events fit the question."""

    r: Tensor  # float32 [T]
    event_scores: Tensor  # float32 [events]


def dual_tower(frame_embeddings: Tensor, text_windows: Tensor) -> Tensor:
    """The paper's aligner: a frame's image embedding against the question's text embedding.

    Args:
        frame_embeddings: [T, E], the pooled output of the image tower for every frame.
        text_windows: [W, E], the text tower's output for each window of the question, W >= 1; a question
            that fits the tower has one. Their element-wise maximum stands for the question.

    Returns:
        float32 [T].

    Raises:
        ValueError: there is no window.
    """
    if text_windows.shape[0] == 0:
        raise ValueError("the question needs at least one text window")
    return cosine(frame_embeddings, text_windows.to(torch.float32).amax(dim=0))


def embedding(frame_vectors: Tensor, question_embeddings: Tensor) -> Tensor:
    """Aligner without a second model: frame vectors against the question in the LLM's embedding space.

    Args:
        frame_vectors: [T, D], means of each frame's projected tokens (`events.frame_vectors`).
        question_embeddings: [Q, D], input embeddings of the question's tokens. An empty question (Q = 0)
            counts as a zero vector: every frame scores 0, so ties decide.

    Returns:
        float32 [T].
    """
    tokens = max(question_embeddings.shape[0], 1)
    return cosine(frame_vectors, question_embeddings.to(torch.float32).sum(dim=0) / tokens)


def none(frame_vectors: Tensor, event_ids: Tensor, events: int) -> Alignment:
    """Aligner that ignores the question: a frame near its event's mean represents it, a long event matters.

    Args:
        frame_vectors: [T, D].
        event_ids: int64 [T] from `events.segment`.
        events: number of events, all present in `event_ids`.

    Returns:
        `r`, float32 [T], the cosine of each frame with the mean of its event; and the event scores, float32
        [events], which for this aligner are the events' lengths in frames.
    """
    lengths = event_lengths(event_ids, events)
    ends = lengths.cumsum(0)
    # Sums of contiguous runs as differences of a float64 running sum. An atomic index_add would add in an
    # order of its own each time, and the same video could then be compressed in two ways.
    running = torch.nn.functional.pad(frame_vectors.to(torch.float64).cumsum(dim=0), (0, 0, 1, 0))
    sums = running[ends] - running[ends - lengths]
    means = (sums / lengths[:, None]).to(torch.float32)
    return Alignment(cosine(frame_vectors, means[event_ids]), lengths.to(torch.float32))


def event_scores(r: Tensor, event_ids: Tensor, events: int) -> Tensor:
    """Best `r` of each event: `r[T]`, `event_ids[T]` to float32 `[events]`; NaN counts as minus infinity."""
    scores = torch.full((events,), float("-inf"), dtype=torch.float32, device=r.device)
    comparable = torch.where(r.isnan(), float("-inf"), r).to(torch.float32)
    return scores.scatter_reduce_(0, event_ids, comparable, "amax")


def by_question(r: Tensor, event_ids: Tensor, events: int) -> Alignment:
    """The alignment of an aligner that scores frames alone: an event is worth its best frame."""
    return Alignment(r, event_scores(r, event_ids, events))


def key_events(scores: Tensor, count: int) -> Tensor:
    """Mask, bool [e], of the `min(count, e)` events with the highest `scores[e]`; ties: lowest index."""
    return top(scores, count)
