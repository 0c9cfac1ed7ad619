"""Per-request facts that the scheduler and its KV cache managers reserve slots by. Read once, when a request arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metok_vllm.compression.retention import retained_count
from metok_vllm.contract.video_plan import VideoPlan

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec

PLAN_FIELD = "metok_plan"
"""Name of the multimodal field that carries a `VideoPlan`."""


@dataclass(frozen=True)
class VideoSpan:
    """Where a pruned video's placeholders stand in the prompt, and its plan."""

    start: int
    length: int
    plan: VideoPlan

    @property
    def end(self) -> int:
        return self.start + self.length


def pruned_spans(features: Sequence[MultiModalFeatureSpec] | None, computed: int = 0) -> tuple[VideoSpan, ...]:
    """The videos of a request that METok prunes, in prompt order; empty where it prunes none.

    Args:
        features: the request's multimodal items.
        computed: tokens that the request took from the prefix cache. On their way to the worker vLLM drops the data of items
            that lie among them; those are never pruned ones, since pruned requests read nothing from that cache.

    Raises:
        RuntimeError: a video came without its plan, so that it would be served densely unnoticed.
    """
    spans = []
    for feature in features or ():
        item: Any = feature.data
        position = feature.mm_position
        if feature.modality != "video" or (item is None and position.offset + position.length <= computed):
            continue
        if item is None or PLAN_FIELD not in item:
            raise RuntimeError(
                "METok: a video item reached the engine without its plan; this processor cache type is not supported."
            )
        plan = VideoPlan.from_tensor(item[PLAN_FIELD].data)
        if plan.pruned:
            spans.append(VideoSpan(position.offset, position.length, plan))
    return tuple(spans)


@dataclass(frozen=True)
class RequestFacts:
    """What one pruned request needs in the KV groups that hold no pruned token.

    Slots of a request in such a group, in order: the prompt's text tokens, then the retained visual tokens, then what
    is generated. KV order within a request does not matter to attention, since rotation is already applied.
    """

    prompt_len: int
    spans: tuple[VideoSpan, ...]

    @property
    def visual(self) -> int:
        """Visual tokens of the pruned videos in the prompt."""
        return sum(span.length for span in self.spans)

    @property
    def retained_bound(self) -> int:
        """Most visual tokens that keep their KV in layers `L1 .. L3-1` while decoding."""
        # All pruned videos of a request share its settings, so the first one's share is the request's.
        return retained_count(sum(span.plan.survivors2 for span in self.spans), self.spans[0].plan.retention)

    def slots(self, num_tokens: int, retains: bool) -> int:
        """Slots that the first `num_tokens` tokens need: exact without retention, an upper bound with it.

        Args:
            num_tokens: tokens from the start of the prompt, generated ones included.
            retains: whether the group's layers keep retained visual tokens (`L1 .. L3-1`).
        """
        before = sum(min(max(num_tokens - span.start, 0), span.length) for span in self.spans)
        retained = self.retained_bound if retains and num_tokens >= self.prompt_len else 0
        return num_tokens - before + retained
