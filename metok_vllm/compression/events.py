"""Events: contiguous runs of similar frames (docs/method.md sections 1.1 and 1.2).

Everything stays on the device of the features: nothing here waits for the GPU.
"""

import torch
from torch import Tensor

from .cosine import cosine


def frame_vectors(features: Tensor) -> Tensor:
    """Mean over the tokens of each frame: `features[T, N, D]` of any float type to float32 `[T, D]`."""
    # dtype= accumulates in float32 without a float32 copy of all the features.
    return features.mean(dim=1, dtype=torch.float32)


def adjacent_similarity(vectors: Tensor) -> Tensor:
    """Cosine of every frame with the next one: `vectors[T, D]` to float32 `[T - 1]`."""
    return cosine(vectors[:-1], vectors[1:])


def similarity(features: Tensor) -> tuple[Tensor, Tensor]:
    """Frame vectors, float32 [T, D], and adjacent similarities, float32 [T - 1], of `features[T, N, D]`."""
    vectors = frame_vectors(features)
    return vectors, adjacent_similarity(vectors)


def segment(similarity: Tensor, events: int) -> Tensor:
    """Cut a video after its `events - 1` lowest adjacent similarities.

    Args:
        similarity: float [T - 1], of each frame with the next. NaN is never cut before a number.
        events: how many events are wanted, at least 1. A video of fewer frames gives one event a frame.

    Returns:
        int64 [T]: the event of each frame, from 0, never decreasing, every one of `min(events, T)` present.

    Raises:
        ValueError: `events` is below 1.
    """
    if events < 1:
        raise ValueError(f"a video has at least 1 event, not {events}")
    cuts = torch.argsort(similarity, stable=True)[: events - 1]
    starts_event = torch.zeros(similarity.shape[0] + 1, dtype=torch.int64, device=similarity.device)
    return starts_event.index_fill_(0, cuts + 1, 1).cumsum(0)


def event_lengths(event_ids: Tensor, events: int) -> Tensor:
    """How many elements (frames, or tokens) each event has: `event_ids[n]` to int64 `[events]`."""
    lengths = torch.zeros(events, dtype=torch.int64, device=event_ids.device)
    return lengths.scatter_add_(0, event_ids, torch.ones_like(event_ids))
