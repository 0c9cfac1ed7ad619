"""Where a request's pruned videos stand in its prompt: the scheduler and the worker both start from this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metok_vllm.compression.retention import retained_count
from metok_vllm.contract.fields import PLAN_FIELD
from metok_vllm.contract.video_plan import VideoPlan

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True)
class VideoSpan:
    """Where a pruned video's placeholders stand in the prompt, and its plan."""

    start: int
    length: int
    plan: VideoPlan

    @property
    def end(self) -> int:
        return self.start + self.length


def retained_bound(spans: Sequence[VideoSpan]) -> int:
    """Most visual tokens of a request that keep their KV in layers `L1 .. L3-1` while decoding.

    Args:
        spans: the request's pruned videos, at least one. They share its settings, so the first one's share is
            the request's.
    """
    return retained_count(sum(span.plan.most_after_l2 for span in spans), spans[0].plan.retention_micro)


def pruned_spans(features: Sequence[MultiModalFeatureSpec] | None, computed: int = 0) -> tuple[VideoSpan, ...]:
    """The videos of a request that METok prunes, in prompt order; empty where it prunes none.

    Args:
        features: the request's multimodal items.
        computed: tokens that the request took from the prefix cache. vLLM drops the data of items that lie
            among them on their way to the worker. Those are never pruned ones, since pruned requests read
            nothing from that cache.

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
