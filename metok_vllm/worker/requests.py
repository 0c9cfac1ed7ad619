"""Worker-side state of pruned requests: from their first chunk until they finish or are preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.utils.torch_utils import async_tensor_h2d

from metok_vllm.compression.ordering import true_indices
from metok_vllm.contract.fields import QUESTION_FIELD, ROWS_FIELD
from metok_vllm.contract.request_ids import is_shadow
from metok_vllm.contract.spans import VideoSpan, pruned_spans

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import NewRequestData

    from metok_vllm.worker.rotary import VideoAxes

TAG_CHANNELS = 7
"""Channels behind an encoded token: event (low, high byte), key event, frame (low, high byte), tier, text.

They travel through the encoder cache as part of the embedding; a byte is exact in bfloat16.
"""


def pack_tags(
    event: torch.Tensor,
    is_key: torch.Tensor,
    frame: torch.Tensor,
    tier: torch.Tensor,
    is_text: torch.Tensor | None = None,
) -> torch.Tensor:
    """What is known of each token, each int64 (or bool) [n],
    to int64 [n, TAG_CHANNELS] with entries below 256. Text has what its frame has; by default there is none.
    """
    text = torch.zeros_like(event) if is_text is None else is_text.to(torch.int64)
    return torch.stack(
        [event % 256, event // 256, is_key.to(torch.int64), frame % 256, frame // 256, tier.to(torch.int64), text],
        dim=1,
    )


@dataclass
class VideoTags:
    """What stage 2 and the report need to know of every visual token of one video;
    tensors on the device, each [n].
    """

    event: torch.Tensor  # int64
    is_key: torch.Tensor  # bool, whether the token's event is a key event
    frame: torch.Tensor  # int64
    tier: torch.Tensor  # int64
    place: torch.Tensor | None = None  # int64, ascending: where it stands in the span; None where no text is there

    @classmethod
    def unpack(cls, channels: torch.Tensor, text_tokens: int = 0) -> VideoTags:
        """From the trailing channels of the encoder's output.

        Args:
            channels: [tokens of the span, TAG_CHANNELS] of any dtype.
            text_tokens: how many of the tokens are text, by the plan; they are left out.
        """
        tags, place = channels.to(torch.int64), None
        if text_tokens:
            place = true_indices(tags[:, 6] == 0, tags.shape[0] - text_tokens)
            tags = tags[place]
        return cls(tags[:, 0] + 256 * tags[:, 1], tags[:, 2] > 0, tags[:, 3] + 256 * tags[:, 4], tags[:, 5], place)

    def frames_of(self, span: VideoSpan) -> torch.Tensor:
        """The frame of each visual token, int64 [n], never decreasing and below the plan's frames.

        A client may give one uuid to two videos of as many tokens: the encoder's output is then the first's.
        """
        return self.frame.clamp(max=span.plan.frames - 1)

    def positions(self, start: int, index: torch.Tensor) -> torch.Tensor:
        """Where visual tokens stand in the prompt, int64 [m].

        Args:
            start: of the video's span.
            index: int64 [m], which of the video's visual tokens.
        """
        return (index if self.place is None else self.place[index]) + start


def visual_positions(span: VideoSpan, tags: VideoTags | None, every: torch.Tensor) -> torch.Tensor:
    """Where a video's visual tokens stand in the prompt, int64 [visual tokens], ascending.

    Args:
        span: the video's.
        tags: the video's; it has been encoded.
        every: the positions of the whole prompt, int64, so that a span without text is a slice of them.
    """
    assert tags is not None, "a prompt's videos are encoded before its last chunk"
    return every[span.start : span.end] if tags.place is None else tags.place + span.start


@dataclass
class ChunkState:
    """What a chunk of a pruned prompt has come to at L1. A deferred prompt keeps those of its chunks."""

    hidden: torch.Tensor  # [chunk tokens, hidden]
    residual: torch.Tensor  # [chunk tokens, hidden]
    query: torch.Tensor  # [scoring tokens, Hq * d], of those that score: text behind the first pruned video
    key: torch.Tensor  # [chunk tokens, Hkv * d]
    positions: torch.Tensor  # rotary positions, int64 [chunk tokens] or [axes, chunk tokens]

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden state's kind, which the budget for deferred prompts counts."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.residual, self.query, self.key))


@dataclass
class PruningResult:
    """What was done to one request, for its report. Counts of visual tokens, all pruned videos together."""

    encoded: int
    after_l1: int
    after_l2: int
    retained: int
    after_l3: int = 0


def question_ids(features: Sequence[MultiModalFeatureSpec]) -> tuple[int, ...]:
    """Token ids of the question by which a request's videos are pruned; empty where none is used."""
    return _numbers(features, QUESTION_FIELD)


def question_rows(features: Sequence[MultiModalFeatureSpec]) -> tuple[int, ...]:
    """Positions of the tokens whose attention alone scores; empty where all text behind a video does."""
    return _numbers(features, ROWS_FIELD)


def _numbers(features: Sequence[MultiModalFeatureSpec], field: str) -> tuple[int, ...]:
    """What a field of a request's items holds behind its count: all its pruned videos have the same."""
    for feature in features:
        item: Any = feature.data
        if item is not None and field in item:
            count, *numbers = item[field].data.flatten().tolist()
            return tuple(int(number) for number in numbers[:count])
    return ()


def of_question(scores: NDArray[np.bool_], rows: Sequence[int], last_end: int) -> tuple[NDArray[np.bool_], str]:
    """Which tokens score: bool [prompt], and whether they are the question's.

    Args:
        scores: bool [prompt], all that may.
        rows: positions of the question's tokens, as the front end has found them; empty where it has not.
        last_end: one past the last pruned video; without a scoring token behind it its choice would be blind.
    """
    asked = np.zeros_like(scores)
    asked[list(rows)] = True
    asked &= scores
    return (asked, "question") if asked[last_end:].any() else (scores, "text")


@dataclass
class PrunedRequest:
    """One request with at least one pruned video.

    Its **text** is every token that is no visual token of a pruned video: images count as text, and so does a
    video with METok off, and so does what labels the frames inside a pruned one. How much there is of it is
    known on the host. Its **scoring tokens** are those whose attention scores the visual tokens: real text
    behind the first pruned video, and never inside one. With `score_rows` "question" the question's alone.
    """

    req_id: str
    prompt_len: int
    spans: tuple[VideoSpan, ...]
    outside: torch.Tensor  # int64 on the device: positions of the text outside the pruned videos, ascending
    scoring: torch.Tensor  # int64 on the device: positions of the scoring tokens, ascending
    scoring_np: NDArray[np.int64]  # the same on the host
    scoring_before: tuple[int, ...]  # for each video, how many scoring tokens stand before its end
    tags: list[VideoTags | None] = field(default_factory=list)
    axes: Sequence[VideoAxes] = ()  # of each video, where rotary positions have several axes
    chunks: list[ChunkState] = field(default_factory=list)
    moving: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of each released layer, by name, until the prompt is complete: see `worker/text_moves.py`."""
    result: PruningResult | None = None  # set when the prompt has been pruned
    question: tuple[int, ...] = ()  # token ids of the question by which it is pruned; empty where none is used
    is_shadow: bool = False  # METok has made it itself, to compare an answer
    score_rows: str = "text"  # or "question": which tokens score

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the pruned videos."""
        return sum(span.plan.visual_tokens for span in self.spans)

    @property
    def text_tokens(self) -> int:
        """How much text there is, inside the pruned videos too."""
        return self.prompt_len - self.visual_tokens

    def text(self) -> torch.Tensor:
        """Positions of the text, int64 [text_tokens] on the device, ascending; known with all tags read."""
        if self.outside.shape[0] == self.text_tokens:
            return self.outside
        every = torch.arange(self.prompt_len, device=self.outside.device)
        is_text = torch.ones_like(every, dtype=torch.bool)
        for span, tags in zip(self.spans, self.tags, strict=True):
            is_text.index_fill_(0, visual_positions(span, tags, every), False)
        return true_indices(is_text, self.text_tokens)

    @property
    def retention_micro(self) -> int:
        """`decode_retention` in millionths."""
        return self.spans[0].plan.retention_micro

    @property
    def final_micro(self) -> int:
        """`final_keep` in millionths."""
        return self.spans[0].plan.final_micro

    @property
    def deferred_bytes(self) -> int:
        moving = sum(kept.numel() * kept.element_size() for kept in self.moving.values())
        return sum(chunk.nbytes for chunk in self.chunks) + moving

    def scoring_within(self, start: int, length: int) -> torch.Tensor:
        """The scoring tokens' positions from `start` on, below `start + length`."""
        first, last = np.searchsorted(self.scoring_np, (start, start + length))
        return self.scoring[int(first) : int(last)]

    @classmethod
    def create(cls, data: NewRequestData, device: torch.device) -> PrunedRequest | None:
        """State for a new (or resumed) request, or None where METok prunes none of its videos."""
        prompt_len = data.prompt_len
        assert prompt_len is not None
        spans = pruned_spans(data.mm_features, prompt_len, data.num_computed_tokens)
        if not spans:
            return None
        scores = np.ones(prompt_len, dtype=np.bool_)
        for feature in data.mm_features:
            scores[feature.mm_position.offset :][: feature.mm_position.length] = False
        scores[: spans[0].end] = False
        scores, score_rows = of_question(scores, question_rows(data.mm_features), spans[-1].end)
        is_text = np.ones(prompt_len, dtype=np.bool_)
        for span in spans:
            is_text[span.start : span.end] = False
        scoring = np.flatnonzero(scores)
        return cls(
            req_id=data.req_id,
            prompt_len=prompt_len,
            spans=spans,
            outside=async_tensor_h2d(np.flatnonzero(is_text), device),
            scoring=async_tensor_h2d(scoring, device),
            scoring_np=scoring,
            scoring_before=tuple(int(np.searchsorted(scoring, span.end)) for span in spans),
            # Now, not when it is needed: vLLM 0.33 drops an item's data once its tokens are computed.
            question=question_ids(data.mm_features),
            is_shadow=is_shadow(data.req_id, data.sampling_params),
            score_rows=score_rows,
            tags=[None] * len(spans),
        )


class PrunedRequests:
    """The pruned requests that a worker holds, by request id."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.by_id: dict[str, PrunedRequest] = {}

    def add(self, data: NewRequestData) -> PrunedRequest | None:
        """Hold a request, and return it; None where nothing of it is pruned."""
        request = PrunedRequest.create(data, self.device)
        if request is not None:
            self.by_id[data.req_id] = request
        return request

    def remove(self, req_id: str) -> PrunedRequest | None:
        return self.by_id.pop(req_id, None)

    def get(self, req_id: str) -> PrunedRequest | None:
        return self.by_id.get(req_id)

    @property
    def deferred_bytes(self) -> int:
        """Bytes that all deferred prompts hold on this worker."""
        return sum(request.deferred_bytes for request in self.by_id.values())
