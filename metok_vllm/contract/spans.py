"""Where a request's pruned videos stand in its prompt: the scheduler and the worker both start from this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from metok_vllm.compression.retention import retained_count
from metok_vllm.contract.fields import (
    FRAME_TEXT_FIELD,
    PIXELS_FIELD,
    PLAN_FIELD,
    QUESTION_FIELD,
    ROWS_FIELD,
    WINDOWS_FIELD,
)
from metok_vllm.contract.frame_text import fits
from metok_vllm.contract.video_plan import VideoPlan

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True)
class VideoSpan:
    """Where a compressed video's placeholders stand in the prompt, and its plan.

    Some of them may be text that labels the frames (`plan.text_tokens`). Where those stand follows from the
    tiers, and so is known on the device alone.
    """

    start: int
    length: int  # text inside it included
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


def final_bound(spans: Sequence[VideoSpan]) -> int:
    """Most visual tokens of a request that pass L3, and own a slot in the layers from there up; as
    `retained_bound`.
    """
    return retained_count(sum(span.plan.most_after_l2 for span in spans), spans[0].plan.final_micro)


def survivors_bound(spans: Sequence[VideoSpan], pruning_layer: Literal[1, 2]) -> int:
    """Most visual tokens of a request that survive L1, or L2; `spans` as for `retained_bound`."""
    return sum(span.plan.most_after_l1 if pruning_layer == 1 else span.plan.most_after_l2 for span in spans)


class UnusableItem(ValueError):
    """A multimodal item that METok can neither prune nor leave alone; says why in one sentence."""


def pruned_spans(
    features: Sequence[MultiModalFeatureSpec] | None,
    prompt_len: int,
    computed: int = 0,
    vocabulary: int | None = None,
) -> tuple[VideoSpan, ...]:
    """The videos of a request that METok prunes, in prompt order; empty where it prunes none.

    Everything is read here that the scheduler and the worker take from a video later, so that nothing which
    passes makes them fail: items may come from a client, or from a cache by a name that a client chose.

    Args:
        features: the request's multimodal items.
        prompt_len: tokens of its prompt.
        computed: tokens that the request took from the prefix cache. Of items that lie among them vLLM drops
            the data on their way to the worker, or what of it lives on the device. Those are never pruned
            ones, since pruned requests read nothing from that cache.
        vocabulary: token ids of text inside a video are below it; None where they were looked at before.

    Raises:
        UnusableItem: a video without its plan, so that it would be served densely unnoticed, or with a plan
            that does not fit it, or its place in the prompt.
    """
    spans: list[VideoSpan] = []
    stages: set[bool] = set()
    for feature in features or ():
        item, position = feature.data, feature.mm_position
        if feature.modality != "video" or position.offset + position.length <= computed:
            continue
        plan = _plan(item, vocabulary)
        if plan.tokens != position.get_num_embeds():
            raise UnusableItem(f"a video's plan has {plan.tokens} tokens and its place {position.get_num_embeds()}.")
        if plan.compressed:
            stages.add(plan.pruned)
        if not plan.pruned:
            continue
        if item is not None and ROWS_FIELD in item:
            rows = _counted(item[ROWS_FIELD].data)
            if rows is None or any(row >= prompt_len for row in rows):
                raise UnusableItem("the rows that score a video are not in its prompt.")
        span = VideoSpan(position.offset, position.length, plan)
        if span.length != plan.tokens or span.start < (spans[-1].end if spans else 0):
            raise UnusableItem("the places of two items in the prompt overlap.")
        spans.append(span)
    if spans and not _text_behind(features or (), spans[-1].end, prompt_len):
        raise UnusableItem("no text stands behind the last video.")
    if len(stages) > 1:
        raise UnusableItem("the videos of a request differ in their stages.")
    if len({(span.plan.retention_micro, span.plan.final_micro) for span in spans}) > 1:
        raise UnusableItem("the videos of a request differ in decode_retention or final_keep.")
    return tuple(spans)


def compressed_spans(features: Sequence[MultiModalFeatureSpec]) -> tuple[VideoSpan, ...]:
    """The videos of a request that stage 1 compresses, in prompt order, also what the prefix cache has.

    Args:
        features: multimodal items that `pruned_spans` let pass, with the fields that live on the host.
    """
    spans = []
    for feature in sorted(features, key=lambda feature: feature.mm_position.offset):
        if feature.modality == "video":
            item: Any = feature.data
            plan = VideoPlan.from_tensor(item[PLAN_FIELD].data)
            if plan.compressed:
                spans.append(VideoSpan(feature.mm_position.offset, feature.mm_position.length, plan))
    return tuple(spans)


def _text_behind(features: Sequence[MultiModalFeatureSpec], end: int, prompt_len: int) -> bool:
    items = sum(one.mm_position.length for one in features if one.mm_position.offset >= end)
    return prompt_len - end > items


def _plan(item: Mapping[str, Any] | None, vocabulary: int | None) -> VideoPlan:
    """The plan of a video's item, which must be there, hold together, and have what it needs beside it."""
    if item is None or PLAN_FIELD not in item:
        raise UnusableItem("a video item has come without its plan.")
    try:
        plan = VideoPlan.from_tensor(_integers(item[PLAN_FIELD].data))
    except ValueError as error:
        raise UnusableItem(f"a video's plan cannot be read: {error}.") from None
    if plan.text_tokens:
        if FRAME_TEXT_FIELD not in item:
            raise UnusableItem("a video item has come without the text of its frames.")
        if not fits(_integers(item[FRAME_TEXT_FIELD].data), plan, vocabulary):
            raise UnusableItem("the text of a video's frames is not what its plan says.")
    if not plan.compressed:
        return plan
    needed = {"embedding": (QUESTION_FIELD,), "dual-tower": (WINDOWS_FIELD, PIXELS_FIELD), "none": ()}[plan.aligner]
    missing = [name for name in needed if name not in item]
    if missing:
        raise UnusableItem(f"a video item has come without {missing[0]}.")
    if QUESTION_FIELD in item and _counted(item[QUESTION_FIELD].data) is None:
        raise UnusableItem("a video's question is not what its length says.")
    return plan


def _counted(data: Any) -> list[int] | None:
    """Numbers behind their count, none below 0; None where they are no such numbers."""
    count, *numbers = _integers(data).flatten().tolist() or [-1]
    return numbers[:count] if 0 <= count <= len(numbers) and all(number >= 0 for number in numbers) else None


def _integers(data: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor) or data.dtype != torch.int64:
        raise UnusableItem("a field of a video item is not of integers.")
    return data
