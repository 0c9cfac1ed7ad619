from __future__ import annotations

import random
from decimal import ROUND_CEILING, Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metok_vllm.compression.events import event_lengths
from metok_vllm.compression.ordering import true_indices
from metok_vllm.compression.ratios import MICRO, ceil_share, to_micro
from metok_vllm.compression.selection import (
    keep_count,
    keep_counts,
    prune_layers,
    select_per_event,
    survivor_bounds,
)
from metok_vllm.compression.tiers import assign, quota, video_tokens
from tests.support.compression import naive
from tests.support.compression.generators import event_ids, property_test, scores

RATIOS = ["0", "0.000001", "0.07", "0.25", "0.3333", "0.5", "0.76", "0.999999", "1"]


@pytest.mark.parametrize("printed", RATIOS)
def test_ratios_are_the_decimals_they_print_as(printed: str) -> None:
    assert to_micro(float(printed)) == Decimal(printed) * MICRO


def test_every_decimal_survives_binary_floating_point() -> None:
    assert all(to_micro(micro / MICRO) == micro for micro in range(0, MICRO + 1, 7))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf")])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        to_micro(ratio)


def test_a_seventh_decimal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most six decimals, not 0\.1234567"):
        to_micro(0.1234567)


@pytest.mark.parametrize("ratio_micro", [0.76, 1.0, -1, MICRO + 1])
def test_only_integer_millionths_are_taken(ratio_micro: float) -> None:
    with pytest.raises(ValueError, match="in millionths"):
        ceil_share(10, ratio_micro)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in millionths"):
        keep_counts(torch.ones(1, dtype=torch.int64), torch.ones(1) > 0, ratio_micro, 1)  # type: ignore[arg-type]


def test_prune_layers_of_known_depths() -> None:
    assert prune_layers(28) == (3, 10, 19)  # the paper's model
    assert prune_layers(24) == (3, 9, 16)
    assert prune_layers(8) == (1, 3, 5)
    assert prune_layers(3) == (1, 2, 3)
    assert prune_layers(14) == (2, 5, 10)  # 1.5 and 9.5, and below 4.5 and 28.5: halves go to even
    assert prune_layers(42) == (4, 15, 28)


def test_prune_layers_are_ordered_at_every_depth() -> None:
    for layers in range(3, 200):
        first, second, third = prune_layers(layers)
        assert 1 <= first < second < third <= layers


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_a_model_too_shallow_is_refused(layers: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 layers .* not {layers}"):
        prune_layers(layers)


def test_prune_layers_can_be_stated() -> None:
    assert prune_layers(6, (1, 2, 6)) == (1, 2, 6)
    for wrong in [(0, 1, 2), (1, 1, 2), (2, 3, 3), (3, 2, 4), (1, 2, 7)]:
        with pytest.raises(ValueError, match="three increasing numbers from 1 to the model's 6 layers"):
            prune_layers(6, wrong)


def test_keep_count_does_not_round_up_what_is_exact() -> None:
    assert 0.55 * 100 > 55  # what floating point makes of it
    assert keep_count(100, to_micro(0.55), is_key=True, pruning_layer=1) == 55
    assert keep_count(200, to_micro(0.55), is_key=False, pruning_layer=1) == 55


@pytest.mark.parametrize("printed", RATIOS)
def test_keep_counts_equal_decimal_arithmetic(printed: str) -> None:
    lengths = [*range(300), 1024, 99_999, 200_704, 10_000_000]
    micro = to_micro(float(printed))

    def ceiling(x: Decimal) -> int:
        return int(x.to_integral_value(ROUND_CEILING))

    for pruning_layer in (1, 2, 3):
        for is_key in (True, False):
            nothing = pruning_layer == 3 or (pruning_layer == 2 and not is_key)
            share = Decimal(0) if nothing else Decimal(printed) / (1 if is_key else 2)
            expected = [ceiling(share * length) for length in lengths]
            case = f"L{pruning_layer}, key event: {is_key}"
            assert [keep_count(n, micro, is_key, pruning_layer) for n in lengths] == expected, case
            flags = torch.full((len(lengths),), is_key)
            assert keep_counts(torch.tensor(lengths), flags, micro, pruning_layer).tolist() == expected, case
            assert all(kept <= length for kept, length in zip(expected, lengths, strict=True))


def test_an_unknown_pruning_layer_is_refused() -> None:
    for pruning_layer in (0, 4):
        with pytest.raises(ValueError, match="pruning layers 1, 2 and 3"):
            keep_count(10, MICRO, is_key=True, pruning_layer=pruning_layer)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="pruning layers 1, 2 and 3"):
            keep_counts(torch.ones(1, dtype=torch.int64), torch.ones(1) > 0, MICRO, pruning_layer)  # type: ignore[arg-type]


@property_test
@given(
    event_ids(max_frames=40).flatmap(lambda ids: st.tuples(st.just(ids), scores(len(ids), nan=True))),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_kept_tokens_are_exactly_the_top_of_each_event(
    case: tuple[list[int], list[float]], rng: random.Random, shuffled: bool
) -> None:
    ids, values = case
    if shuffled:
        rng.shuffle(ids)
    lengths = event_lengths(torch.tensor(ids), max(ids) + 1)
    counts = [rng.randint(0, int(length)) for length in lengths]
    mask = select_per_event(torch.tensor(values), torch.tensor(ids), torch.tensor(counts))
    expected = set()
    for event, members in naive.members(ids).items():
        expected.update(naive.best_first(values, members)[: counts[event]])
    assert {i for i, kept in enumerate(mask.tolist()) if kept} == expected
    # Order: survivors as ascending indices, so positions gathered with them stay increasing.
    assert true_indices(mask, sum(counts)).tolist() == sorted(expected)


def test_the_three_stages_by_hand() -> None:
    ids = torch.tensor([0] * 5 + [1] * 4)
    key = torch.tensor([True, False])
    values = torch.tensor([0.1, 0.5, 0.3, 0.5, 0.2, 9.0, 8.0, 8.0, 7.0])
    micro = to_micro(0.5)
    counts = keep_counts(event_lengths(ids, 2), key, micro, 1)
    assert counts.tolist() == [3, 1]
    alive = true_indices(select_per_event(values, ids, counts), 4)
    assert alive.tolist() == [1, 2, 3, 5]
    ids, values = ids[alive], values[alive]
    counts = keep_counts(event_lengths(ids, 2), key, micro, 2)
    assert counts.tolist() == [2, 0]
    assert alive[true_indices(select_per_event(values, ids, counts), 2)].tolist() == [1, 3]
    assert keep_counts(torch.tensor([2, 0]), key, micro, 3).tolist() == [0, 0]


@pytest.mark.parametrize("separators", [False, True])
@pytest.mark.parametrize("printed", ["0", "0.3", "0.5", "0.76", "1"])
def test_no_content_exceeds_the_survivor_bounds(printed: str, separators: bool) -> None:
    """Every way to cut some small videos, with random choices of key events and scores."""
    micro = to_micro(float(printed))
    per_frame = (11, 5, 2)
    rng = random.Random(7)
    for frames, events, key_events, key_frames in [
        (7, 3, 2, 1),
        (6, 5, 3, 6),
        (8, 2, 1, 2),
        (3, 5, 3, 1),
        (5, 2, 0, 1),
    ]:
        q = quota(frames, events, key_events, key_frames)
        bounds = survivor_bounds(q, per_frame, separators, key_events, micro)
        most = (0, 0)
        for sizes in naive.compositions(frames, q.events):
            ids = [event for event, size in enumerate(sizes) for _ in range(size)]
            for trial in range(8):
                key = [True] * min(key_events, q.events) + [False] * (q.events - min(key_events, q.events))
                rng.shuffle(key)
                # Half of the trials put the r of key events on top, as key events have it.
                r = [rng.random() + (key[ids[i]] if trial % 2 else 0) for i in range(frames)]
                tiers = assign(torch.tensor(ids), torch.tensor(r), torch.tensor(key), key_frames, q).tolist()
                after_1 = after_2 = 0
                for event, members in naive.members(ids).items():
                    length = sum(per_frame[tiers[i]] for i in members) + separators
                    kept = keep_count(length, micro, key[event], 1)
                    after_1 += kept
                    after_2 += keep_count(kept, micro, key[event], 2)
                most = (max(most[0], after_1), max(most[1], after_2))
        assert most[0] <= bounds[0] <= most[0] + q.events
        assert most[1] <= bounds[1] <= most[1] + q.events
        assert bounds[0] <= video_tokens(q, per_frame, separators)
        assert bounds[1] <= bounds[0]
        assert (bounds[1] == 0) if key_events == 0 else (bounds[1] > 0 or micro == 0)


def test_survivor_bounds_of_the_papers_point() -> None:
    # 64 frames at 144, 36 and 9 tokens: 3897, of which at least two frames of 9 lie outside the key events.
    # 0.76 = 19/25, so a share of a key event rounds up by at most 24/25, of another event by 49/50:
    # L1: 0.76 * 3879 + 3 * 0.96 + 0.38 * 18 + 2 * 0.98 = 2959.72, and 2950.92 of it in the key events;
    # L2: 0.76 * 2950 + 3 * 0.96 = 2244.88.
    bounds = survivor_bounds(quota(64, 5, 3, 6), (144, 36, 9), False, 3, to_micro(0.76))
    assert bounds == (2959, 2244)
    # Ratio 1: 3879 and twice ceil(9 / 2).
    assert survivor_bounds(quota(64, 5, 3, 6), (144, 36, 9), False, 3, MICRO) == (3889, 3879)
