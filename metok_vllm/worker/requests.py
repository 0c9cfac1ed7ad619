"""Worker-side state of pruned requests: from their first chunk until they finish or are preempted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from metok_vllm.scheduler.slot_counts import VideoSpan, pruned_spans

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData

TAG_CHANNELS = 6
"""Channels behind an encoded token: event (low, high byte), key event, frame (low, high byte), tier.

They travel through the encoder cache as part of the embedding; a byte is exact in bfloat16.
"""


def pack_tags(event: torch.Tensor, key: torch.Tensor, frame: torch.Tensor, tier: torch.Tensor) -> torch.Tensor:
    """Per-token facts, each int64 (or bool) [n], to int64 [n, TAG_CHANNELS] with entries below 256."""
    return torch.stack(
        [event % 256, event // 256, key.to(torch.int64), frame % 256, frame // 256, tier.to(torch.int64)], dim=1
    )


@dataclass
class VideoTags:
    """What stage 2 and the report need to know of every token of one video; tensors on the device, each [n]."""

    event: torch.Tensor  # int64
    key: torch.Tensor  # bool, whether the token's event is a key event
    frame: torch.Tensor  # int64
    tier: torch.Tensor  # int64

    @classmethod
    def unpack(cls, channels: torch.Tensor) -> VideoTags:
        """From the trailing channels of the encoder's output, [n, TAG_CHANNELS] of any dtype."""
        tags = channels.to(torch.int64)
        return cls(tags[:, 0] + 256 * tags[:, 1], tags[:, 2] > 0, tags[:, 3] + 256 * tags[:, 4], tags[:, 5])


@dataclass
class DeferredChunk:
    """What one chunk of a deferred prompt leaves behind at L1; all [chunk tokens, ...]."""

    hidden: torch.Tensor
    residual: torch.Tensor
    query: torch.Tensor  # only of the rows that score: text behind the first pruned video
    key: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.residual, self.query, self.key))


@dataclass
class PruningResult:
    """What was done to one request, for its report. Counts of visual tokens, all pruned videos together."""

    encoded: int
    after_l1: int
    after_l2: int
    retained: int


@dataclass
class PrunedRequest:
    """One request with at least one pruned video."""

    req_id: str
    prompt_len: int
    spans: tuple[VideoSpan, ...]
    score_rows: torch.Tensor  # int64 on the device: text positions behind the first pruned video, ascending
    host_rows: NDArray[np.int64]  # the same on the host
    rows_before: tuple[int, ...]  # for each video, how many of score_rows stand before its end
    static: torch.Tensor  # int64 on the device: prompt positions outside the pruned videos, ascending
    tags: list[VideoTags | None] = field(default_factory=list)
    chunks: list[DeferredChunk] = field(default_factory=list)
    result: PruningResult | None = None  # set when the prompt has been pruned

    @property
    def visual(self) -> int:
        return sum(span.length for span in self.spans)

    @property
    def retention(self) -> int:
        return self.spans[0].plan.retention

    @property
    def deferred_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    def rows_within(self, start: int, length: int) -> torch.Tensor:
        """Those of `score_rows` that are at least `start` and less than `start + length`."""
        first, last = np.searchsorted(self.host_rows, (start, start + length))
        return self.score_rows[int(first) : int(last)]

    @classmethod
    def create(cls, data: NewRequestData, device: torch.device) -> PrunedRequest | None:
        """State for a new (or resumed) request, or None where METok prunes none of its videos."""
        spans = pruned_spans(data.mm_features, data.num_computed_tokens)
        if not spans:
            return None
        prompt_len = data.prompt_len
        assert prompt_len is not None
        is_text = torch.ones(prompt_len, dtype=torch.bool)
        for feature in data.mm_features:
            is_text[feature.mm_position.offset :][: feature.mm_position.length] = False
        outside = torch.ones(prompt_len, dtype=torch.bool)
        for span in spans:
            outside[span.start : span.end] = False
        is_text[: spans[0].end] = False
        rows = is_text.nonzero().flatten()
        return cls(
            req_id=data.req_id,
            prompt_len=prompt_len,
            spans=spans,
            score_rows=rows.to(device),
            host_rows=rows.numpy(),
            rows_before=tuple(int((rows < span.end).sum()) for span in spans),
            static=outside.nonzero().flatten().to(device),
            tags=[None] * len(spans),
        )


class PrunedRequests:
    """The pruned requests that a worker holds, by request id."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_id: dict[str, PrunedRequest] = {}

    def add(self, data: NewRequestData) -> None:
        request = PrunedRequest.create(data, self.device)
        if request is not None:
            self.by_id[data.req_id] = request

    def remove(self, req_id: str) -> PrunedRequest | None:
        return self.by_id.pop(req_id, None)

    def get(self, req_id: str) -> PrunedRequest | None:
        return self.by_id.get(req_id)

    @property
    def deferred_bytes(self) -> int:
        """Bytes that all deferred prompts hold on this worker."""
        return sum(request.deferred_bytes for request in self.by_id.values())
