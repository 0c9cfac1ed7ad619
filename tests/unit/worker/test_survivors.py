"""The choices at L1, L2 and L3 on prompts of known layout, against plain loops; and which layers score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metok_vllm.compression.ratios import MICRO
from metok_vllm.compression.selection import PruningLayer, keep_count
from metok_vllm.contract.spans import VideoSpan
from metok_vllm.worker.attention import RunningStep
from metok_vllm.worker.batch import DecoderStack, PromptChunk
from metok_vllm.worker.decoder import Decoder
from metok_vllm.worker.eager_layers import EagerLayers
from metok_vllm.worker.requests import PrunedRequest, VideoTags, pack_tags
from metok_vllm.worker.survivors import Survivors, prune_l2, prune_l3, survivors_of_l1
from metok_vllm.worker.timing import PartTimes
from tests.support.fakes import plan

RATIO = 760_000
LENGTHS = ([5, 3], [4, 6])  # tokens of each event of two videos; the first event is key
GAPS = (3, 2, 4)  # text before, between and behind them


def request(
    retention: int, inside: Sequence[Sequence[int]] = ((), ()), quota: str = "event", final: int = 0
) -> PrunedRequest:
    """`inside`: of each video, where text stands in its span."""
    spans, tags, outside, at = [], [], [], 0
    for gap, lengths, labels in zip(GAPS, LENGTHS, inside, strict=False):
        outside += range(at, at + gap)
        at += gap
        tokens = sum(lengths) + len(labels)
        video = replace(
            plan(tokens, 0, retention, text=len(labels), final=final),
            events=len(lengths),
            keep_ratio_micro=RATIO,
            whole_video=quota == "video",
        )
        spans.append(VideoSpan(at, tokens, video))
        event = torch.zeros(tokens, dtype=torch.int64)
        is_text = event.index_fill(0, torch.tensor(labels, dtype=torch.int64), 1)
        event[is_text == 0] = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        channels = pack_tags(event, event == 0, torch.zeros_like(event), torch.zeros_like(event), is_text)
        tags.append(VideoTags.unpack(channels.bfloat16(), len(labels)))
        at += tokens
    outside += range(at, at + GAPS[-1])
    behind = np.array([p for p in outside if p > spans[0].start])
    return PrunedRequest(
        req_id="r",
        prompt_len=at + GAPS[-1],
        spans=tuple(spans),
        outside=torch.tensor(outside),
        scoring=torch.from_numpy(behind),
        scoring_np=behind,
        scoring_before=(0, GAPS[1]),
        tags=list(tags),
    )


def chosen(alive: list[int], scores: dict[int, float], span: VideoSpan, tags: Any, layer: PruningLayer) -> list[int]:
    """Positions of one video that pass a pruning layer, in plain loops."""
    kept, wanted = [], 0
    for event, before in enumerate(tags.event.bincount().tolist()):
        own = [p for p, of in zip(places(span, tags), tags.event.tolist(), strict=True) if of == event and p in alive]
        count = keep_count(before, RATIO, event == 0, 1)
        count = count if layer == 1 else keep_count(count, RATIO, event == 0, layer)
        wanted += count
        kept += sorted(sorted(own, key=lambda p: (-scores[p], p))[:count])
    if span.plan.whole_video:
        own = [p for p in places(span, tags) if p in alive]
        return sorted(sorted(own, key=lambda p: (-scores[p], p))[:wanted])
    return kept


def places(span: VideoSpan, tags: Any) -> list[int]:
    """Positions of a video's visual tokens."""
    return [span.start + p for p in (range(span.length) if tags.place is None else tags.place.tolist())]


def random_scores(positions: list[int], seed: int) -> dict[int, float]:
    values = torch.rand(len(positions), generator=torch.Generator().manual_seed(seed))
    return dict(zip(positions, values.tolist(), strict=True))


INSIDE = {"none": ((), ()), "in both": ((0, 3, 4, 10), (1, 11, 12)), "in one": ((), (0, 5))}


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("retention", [0, MICRO // 2, MICRO])
@pytest.mark.parametrize("quota", ["event", "video"])
@pytest.mark.parametrize("final", [0, MICRO // 3, MICRO])
@pytest.mark.parametrize("seed", range(4))
def test_a_prompt_through_its_three_pruning_layers(
    seed: int, final: int, quota: str, retention: int, inside: Any
) -> None:
    asked = request(retention, inside, quota, final)
    chunk = PromptChunk(asked, 0, 0, asked.prompt_len, 0)
    text = asked.text().tolist()
    visual = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in places(s, t)]
    assert text == sorted(set(range(asked.prompt_len)) - set(visual))
    labels = [s.start + p for s, own in zip(asked.spans, inside, strict=True) for p in own]
    assert set(labels) == set(text) - set(asked.outside.tolist())
    assert (len(text), len(visual)) == (asked.text_tokens, asked.visual_tokens)

    first = random_scores(visual, seed)
    (survivors,) = survivors_of_l1([chunk], [[of_span(first, span, visual) for span in asked.spans]])
    alive = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in chosen(visual, first, s, t, 1)]
    check(survivors, text, alive)
    rows = [row for of_video in survivors.visual for row in of_video.every(survivors.positions.device).tolist()]
    assert survivors.positions[rows].tolist() == alive

    second = random_scores(alive, seed + 100)
    before = survivors.positions.tolist()
    (rows,) = prune_l2([survivors], [[of_span(second, span, alive) for span in asked.spans]])
    alive = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in chosen(alive, second, s, t, 2)]
    check(survivors, text, alive)
    assert [before[row] for row in rows.tolist()] == survivors.positions.tolist()
    count = -(-len(alive) * retention // MICRO)
    retained = sorted(sorted(alive, key=lambda p: (-second[p], p))[:count])
    assert survivors.retained == count
    if count:
        assert survivors.kept_rows is not None
        assert survivors.retained_rows_at_l1 is not None
        assert survivors.positions[survivors.kept_rows].tolist() == retained
        assert [before[row] for row in survivors.retained_rows_at_l1.tolist()] == retained
    assert asked.result is not None
    assert (asked.result.after_l2, asked.result.retained) == (len(alive), count)

    before = survivors.positions.tolist()
    third = random_scores(alive, seed + 200)
    (rows,) = prune_l3([survivors], [[of_span(third, span, alive) for span in asked.spans]] if final else None)
    count = -(-len(alive) * final // MICRO)
    passed = sorted(sorted(alive, key=lambda p: (-third[p], p))[:count])
    assert asked.result.after_l3 == survivors.after_l3 == count
    check(survivors, text, passed)
    assert [before[row] for row in rows.tolist()] == survivors.positions.tolist()
    kept = survivors.kept_rows
    assert (kept is None) == (count == 0)
    assert kept is None or survivors.positions[kept].tolist() == passed


@pytest.mark.parametrize("inside", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("seed", range(3))
def test_a_window_keeps_all_that_are_alive(seed: int, inside: Any) -> None:
    """Behind L1 its survivors own slots, behind L2 those of L2, behind L3 none."""
    asked = request(0, inside)
    visual = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in places(s, t)]
    scores = random_scores(visual, seed)
    chunk = PromptChunk(asked, 0, 0, asked.prompt_len, 0)
    (survivors,) = survivors_of_l1([chunk], [[of_span(scores, span, visual) for span in asked.spans]], True)
    alive = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in chosen(visual, scores, s, t, 1)]
    assert survivors.kept_rows is not None
    assert survivors.positions[survivors.kept_rows].tolist() == alive
    prune_l2([survivors], [[of_span(scores, span, alive) for span in asked.spans]])
    alive = [p for s, t in zip(asked.spans, asked.tags, strict=True) for p in chosen(alive, scores, s, t, 2)]
    assert survivors.positions[survivors.kept_rows].tolist() == alive
    assert survivors.retained_rows_at_l1 is None, "nothing has waited"
    prune_l3([survivors])
    assert survivors.kept_rows is None


def of_span(scores: dict[int, float], span: VideoSpan, alive: list[int]) -> torch.Tensor:
    return torch.tensor([scores[p] for p in alive if span.start <= p < span.end and p in scores])


def check(survivors: Survivors, text: list[int], alive: list[int]) -> None:
    """Survivors keep their places in the prompt, and with them their rotary positions."""
    assert survivors.positions.tolist() == sorted(text + alive)
    assert survivors.positions[survivors.text].tolist() == text


@pytest.mark.parametrize("layers", [(1, 2, 3), (3, 10, 19)])
def test_the_layers_that_score_are_those_right_before_l1_and_l2(layers: tuple[int, int, int]) -> None:
    decoder = Decoder(SimpleNamespace(layers=[], norm=torch.nn.Identity()))
    stack = DecoderStack(decoder, PartTimes(), layers, RunningStep(), EagerLayers(decoder, 8, []))
    assert stack.scoring_layers == (layers[0] - 1, layers[1] - 1)
    assert stack.final_scoring_layer == layers[2] - 1
