"""`select_per_event` equals a stable sort of each event, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.select_per_event import reference, select_per_event
from metok_kernels.select_per_event.launch import LARGEST_BLOCK

from tests.support.kernels.common import cumulative, few_examples, ints


def check(
    scores: torch.Tensor, lengths: list[int], keep: list[int], device: torch.device, **options: int
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = scores.to(device), cumulative(lengths, device), ints(*keep, device=device)
    options = {"max_length": max([0, *lengths]), **options}
    actual = select_per_event(*arguments, **options)
    expected = reference(*arguments, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    return actual


@few_examples
@given(
    events=st.lists(st.tuples(st.integers(0, 150), st.integers(-1, 160)), min_size=1, max_size=6),
    levels=st.sampled_from([1, 3, 1000]),
)
def test_any_events(events: list[tuple[int, int]], levels: int, device: torch.device) -> None:
    """Few levels of score mean many ties; `keep` goes below 0 and above the length."""
    lengths, keep = [length for length, _ in events], [k for _, k in events]
    scores = torch.randint(levels, (sum(lengths),), generator=torch.Generator().manual_seed(levels)) / 7 - 1
    check(scores, lengths, keep, device)


@pytest.mark.parametrize("keep", [0, 1, 32, 62, 63])
def test_none_some_all(keep: int, device: torch.device) -> None:
    scores = torch.rand(63, generator=torch.Generator().manual_seed(keep))
    index, cu_kept = check(scores, [63], [keep], device)
    assert cu_kept.tolist() == [0, keep]
    assert (index[keep:] == -1).all()
    chosen = scores[index[:keep].cpu()]
    rest = scores[[i for i in range(63) if i not in index[:keep].tolist()]]
    assert not keep or keep == 63 or chosen.min() >= rest.max()


def test_ties_go_to_the_lowest_index(device: torch.device) -> None:
    index, _ = check(torch.full((200,), 0.25), [60, 140], [7, 130], device)
    assert index[:137].tolist() == [*range(7), *range(60, 190)]


def test_zeros_infinities_and_nan(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, nan, -inf, inf, -nan, 3.0, -0.0])
    scores[7] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN with its sign bit set
    for keep in range(11):
        check(scores, [10], [keep], device)


def test_one_event_larger_than_a_block(device: torch.device) -> None:
    size = 2 * LARGEST_BLOCK + 17
    scores = torch.randint(50, (size,), generator=torch.Generator().manual_seed(1)).float()
    check(scores, [5, size - 5], [2, size // 3], device)


def test_an_understated_length_changes_speed_only(device: torch.device) -> None:
    scores = torch.rand(700, generator=torch.Generator().manual_seed(2))
    check(scores, [600, 100], [300, 50], device, max_length=1)


def test_thousands_of_events(device: torch.device) -> None:
    lengths = [index % 3 for index in range(1100)]  # the interpreter needs milliseconds an event
    keep = [2 if index % 22 == 20 else 0 for index in range(1100)]
    scores = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(3))
    _, cu_kept = check(scores, lengths, keep, device)
    assert int(cu_kept[-1]) > 20


def test_text_runs_pass_through_as_events(device: torch.device) -> None:
    """Text kept whole: the result is the survivors in order, the counts are the next layer's events."""
    scores = torch.cat([torch.zeros(5), torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.zeros(3)])
    index, cu_kept = check(scores, [5, 4, 3], [99, 2, 99], device)
    assert index[:10].tolist() == [0, 1, 2, 3, 4, 6, 7, 9, 10, 11]
    assert cu_kept.tolist() == [0, 5, 7, 10]


@pytest.mark.parametrize("capacity", [0, 3, 10, 40])
def test_capacity(capacity: int, device: torch.device) -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(4))
    index, _ = check(scores, [10, 20], [4, 6], device, capacity=capacity)
    assert index.shape == (capacity,)


def test_same_choice_every_time(device: torch.device) -> None:
    scores = torch.randint(4, (300,), generator=torch.Generator().manual_seed(6)).float()
    first = check(scores, [300], [150], device)[0]
    assert all(torch.equal(first, check(scores, [300], [150], device)[0]) for _ in range(3))


def test_refusals(device: torch.device) -> None:
    cu, keep = ints(0, 4, device=device), ints(2, device=device)
    with pytest.raises(TypeError, match="scores is float16, expected float32"):
        select_per_event(torch.zeros(4, dtype=torch.float16, device=device), cu, keep, max_length=4)
    with pytest.raises(ValueError, match=r"cu_events has shape \[2\], expected \[3\]"):
        select_per_event(torch.zeros(4, device=device), cu, ints(1, 1, device=device), max_length=4)
    with pytest.raises(ValueError, match="capacity must not be negative"):
        select_per_event(torch.zeros(4, device=device), cu, keep, max_length=4, capacity=-1)
