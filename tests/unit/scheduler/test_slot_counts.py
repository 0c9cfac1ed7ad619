"""Which tokens of a request own a slot in the groups that hold no pruned token."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.retention import retained_count
from metok_vllm.contract.fields import FRAME_TEXT_FIELD
from metok_vllm.contract.kv_spec import AFTER_L1, AFTER_L2, RELEASED, SHIFTED_KINDS, TEXT, TEXT_AND_RETAINED, GroupKind
from metok_vllm.contract.spans import (
    UnusableItem,
    VideoSpan,
    final_bound,
    pruned_spans,
    retained_bound,
    survivors_bound,
)
from metok_vllm.scheduler.slot_counts import SlotCounts
from tests.support.fakes import Prompt, feature, item, plan


@st.composite
def prompts(draw: st.DrawFn, fewest: int = 1, most: int = 4) -> Prompt:
    """Prompts with pruned videos, possibly side by side, at the start, some with text inside them,
    and with one token of text at the end.
    """
    count = draw(st.integers(fewest, most))
    retention, final = (draw(st.sampled_from([0, 1, 333_333, 500_000, 1_000_000])) for _ in range(2))
    plans = []
    for _ in range(count):
        visual, inside = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 1, 2, 9]))
        plans.append(plan(visual + inside, draw(st.integers(0, visual)), retention, text=inside, final=final))
    text = [draw(st.integers(0, 12)) for _ in range(count)] + [draw(st.integers(1, 12))]
    return Prompt(tuple(text), tuple(plans))


def counts_of(prompt: Prompt) -> SlotCounts:
    return SlotCounts(prompt.length, pruned_spans(prompt.features("r"), prompt.length))


def owners(prompt: Prompt, generated: int, seed: int) -> list[bool]:
    """For each token of the prompt and of `generated` further ones, whether it owns a slot above L3.

    `seed` says where the text inside each video stands.
    """
    rng = random.Random(seed)
    owns: list[bool] = []
    for i, text in enumerate(prompt.text):
        owns += [True] * text
        if i < len(prompt.videos):
            video = prompt.videos[i]
            inside = [True] * video.text_tokens + [not video.pruned] * video.visual_tokens
            rng.shuffle(inside)
            owns += inside
    return owns + [True] * generated


@given(prompts(), st.integers(0, 99))
def test_slots_are_counted_token_by_token(prompt: Prompt, seed: int) -> None:
    """A bound only where a video with text inside is cut in two, wherever that text stands."""
    counts, owns = counts_of(prompt), owners(prompt, 5, seed)
    cut = {p for s in counts.spans if s.plan.text_tokens for p in range(s.start + 1, s.end)}
    survivors = sum(video.most_after_l2 for video in prompt.videos)
    retained = -(-survivors * prompt.videos[0].retention_micro // 1_000_000)
    final = -(-survivors * prompt.videos[0].final_micro // 1_000_000)
    assert retained_bound(counts.spans) == retained
    assert final_bound(counts.spans) == final
    assert counts.visual_tokens == sum(video.visual_tokens for video in prompt.videos)
    for length in range(prompt.length + 6):
        text = sum(owns[:length])
        complete = length >= prompt.length
        found = counts.slots(length, TEXT) - (final if complete else 0)
        assert found >= text
        assert found == text or length in cut
        assert counts.slots(length, TEXT_AND_RETAINED) == found + (retained if complete else 0)


@given(prompts(), st.integers(0, 99))
def test_a_released_group_is_stocks_until_the_prompt_is_complete(prompt: Prompt, seed: int) -> None:
    """And from the first generated token on holds text alone; never fewer slots than tokens that own one."""
    counts, owns = counts_of(prompt), owners(prompt, 6, seed)
    assert counts.text_tokens == sum(owns[: prompt.length])
    for length in range(prompt.length + 7):
        expected = length if length <= prompt.length else sum(owns[:length])
        assert counts.slots(length, RELEASED) == expected
    # What is left when the blocks of visual tokens are given back is what the next token comes behind.
    assert counts.slots(prompt.length + 1, RELEASED) == counts.text_tokens + 1


@given(prompts(), st.integers(0, 200))
def test_the_most_slots_on_the_way(prompt: Prompt, length: int) -> None:
    """What a request that is resumed with tokens of its own must find room for."""
    counts = counts_of(prompt)
    for kind in SHIFTED_KINDS:
        assert counts.most_slots(length, kind) == max(counts.slots(n, kind) for n in range(length + 1))


@given(prompts())
def test_a_window_keeps_all_that_may_survive(prompt: Prompt) -> None:
    counts = counts_of(prompt)
    first, second = (survivors_bound(counts.spans, layer) for layer in (1, 2))
    assert second == sum(video.most_after_l2 for video in prompt.videos) <= first
    for length in range(prompt.length + 4):
        text = counts.slots(length, TEXT) - (final_bound(counts.spans) if length >= prompt.length else 0)
        complete = length >= prompt.length
        assert counts.slots(length, AFTER_L1) == text + (first if complete else 0)
        assert counts.slots(length, AFTER_L2) == text + (second if complete else 0)


@given(prompts(), st.sampled_from([TEXT, TEXT_AND_RETAINED]))
def test_slots_never_shrink(prompt: Prompt, kind: GroupKind) -> None:
    counts = counts_of(prompt)
    slots = [counts.slots(length, kind) for length in range(prompt.length + 4)]
    assert slots[0] == 0
    assert slots == sorted(slots)
    # The kept ones come all at once, with the last token of the prompt.
    jumps = [after - before for before, after in itertools.pairwise(slots)]
    assert jumps[prompt.length - 1] == 1 + (retained_bound if kind == TEXT_AND_RETAINED else final_bound)(counts.spans)
    assert set(jumps[: prompt.length - 1]) <= {0, 1}
    assert set(jumps[prompt.length :]) == {1}


def test_by_hand() -> None:
    # 3 text, 10 visual, 2 text, 4 visual, 5 text; at most 6 + 1 survive L2, half of them are retained.
    prompt = Prompt((3, 2, 5), (plan(10, 6, 500_000), plan(4, 1, 500_000)))
    counts = counts_of(prompt)
    assert counts.spans == (VideoSpan(3, 10, prompt.videos[0]), VideoSpan(15, 4, prompt.videos[1]))
    assert [span.end for span in counts.spans] == [13, 19]
    assert [counts.slots(n, TEXT) for n in (0, 3, 4, 13, 14, 15, 18, 19, 20, 24, 30)] == [
        *(0, 3, 3, 3, 4, 5, 5, 5, 6, 10, 16)
    ]
    assert [counts.slots(n, TEXT_AND_RETAINED) for n in (13, 23, 24, 30)] == [3, 9, 14, 20]


def test_final_keep_by_hand() -> None:
    """A quarter of at most 7 survivors passes L3: 2. Layers L1 .. L3-1 keep half of them: 4."""
    counts = counts_of(Prompt((3, 2, 5), (plan(10, 6, 500_000, final=250_000), plan(4, 1, 500_000, final=250_000))))
    assert [counts.slots(n, TEXT) for n in (0, 13, 23, 24, 30)] == [0, 3, 9, 12, 18]
    assert [counts.slots(n, TEXT_AND_RETAINED) for n in (13, 23, 24, 30)] == [3, 9, 14, 20]


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 1_000_000))
def test_what_passes_l3_never_exceeds_its_slots(bound: int, fewer: int, share: int) -> None:
    """However many survive L2 in the end, up to the plan's bound."""
    (span,) = counts_of(Prompt((1, 1), (plan(500, bound, final=share),))).spans
    assert retained_count(min(bound, fewer), span.plan.final_micro) <= final_bound((span,)) <= bound


def test_text_inside_a_video_by_hand() -> None:
    # 3 text, 10 tokens of a video with 4 of text, 2 text: of half a video the first 4 are taken for text.
    prompt = Prompt((3, 2), (plan(10, 6, 500_000, text=4),))
    counts = counts_of(prompt)
    assert counts.visual_tokens == 6
    assert [counts.slots(n, TEXT) for n in (0, 3, 5, 7, 9, 13, 14, 15, 20)] == [0, 3, 5, 7, 7, 7, 8, 9, 14]
    assert [counts.slots(n, TEXT_AND_RETAINED) for n in (13, 14, 15, 20)] == [7, 8, 12, 17]


@pytest.mark.parametrize("field", [None, [1, 0, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0, 5, 99]])
def test_the_text_of_frames_must_be_what_the_plan_says(field: list[int] | None) -> None:
    for pruned in (True, False):  # the worker lays it with METok off too
        good = feature(3, plan(10, 0, text=2, pruned=pruned))
        assert len(pruned_spans([good], 20, vocabulary=99)) == pruned
        bad = feature(3, plan(10, 0, text=2, pruned=pruned))
        fields = {name: elem.data for name, elem in bad.data.items() if name != FRAME_TEXT_FIELD}
        bad.data = item(fields if field is None else {**fields, FRAME_TEXT_FIELD: torch.tensor(field)})
        with pytest.raises(UnusableItem, match="the text of"):
            pruned_spans([bad], 20, vocabulary=99)


def test_only_pruned_videos_are_spans() -> None:
    video, off = plan(10, 5), plan(7, pruned=0)
    features = [feature(1, off), feature(9, plan(3), modality="image"), feature(20, video), feature(40, video)]
    assert pruned_spans(features, 51) == (VideoSpan(20, 10, video), VideoSpan(40, 10, video))
    assert pruned_spans([features[0], features[1]], 51) == ()
    assert pruned_spans([], 9) == pruned_spans(None, 9) == ()


@pytest.mark.parametrize("lost", ["the plan", "the item"])
def test_a_video_without_its_plan_is_an_error(lost: str) -> None:
    """What a cache that sends only hashes would do; serving it densely would be worse than stopping."""
    item = feature(3, plan(10, 5))
    item.data = None if lost == "the item" else type(item.data)({})
    with pytest.raises(UnusableItem, match="without its plan"):
        pruned_spans([item], 20)


def test_what_came_from_the_prefix_cache_may_have_lost_its_data() -> None:
    """vLLM drops it on the way to the worker.

    Such a video was not pruned: pruned requests read nothing from that cache.
    """
    off, video = feature(3, plan(10, pruned=0)), feature(13, plan(8, 2))
    off.data = None
    assert pruned_spans([off, video], 22, computed=13) == (VideoSpan(13, 8, plan(8, 2)),)
    with pytest.raises(UnusableItem, match="without its plan"):
        pruned_spans([off, video], 22, computed=12)
