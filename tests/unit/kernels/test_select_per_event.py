"""`select_per_event` equals a stable sort of each event, exactly, and the rule in `compression/`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.select_per_event import reference, select_per_event
from metok_kernels.select_per_event.launch import BLOCK

from metok_vllm.compression.stage2 import select_survivors
from tests.support.kernels.common import few_examples, ints

NAN, INF = float("nan"), float("inf")
OTHER_NAN = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()  # with its sign bit set


def check(
    scores: torch.Tensor, lengths: list[int], keep: list[int], device: torch.device, total: int | None = None
) -> torch.Tensor:
    """The kernel's choice, equal to the reference's, with room for every token where no total is given."""
    total = scores.shape[0] if total is None else total
    arguments = scores.to(device), ints(*lengths, device=device), ints(*keep, device=device), total
    actual = select_per_event(*arguments)
    assert torch.equal(actual, reference(*arguments))
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
    index = check(scores, [63], [keep], device)
    assert (index[:keep] >= 0).all()
    assert (index[keep:] == -1).all()
    chosen = scores[index[:keep].cpu()]
    rest = scores[[i for i in range(63) if i not in index[:keep].tolist()]]
    assert not keep or keep == 63 or chosen.min() >= rest.max()


def test_ties_go_to_the_lowest_index(device: torch.device) -> None:
    index = check(torch.full((200,), 0.25), [60, 140], [7, 130], device)
    assert index[:137].tolist() == [*range(7), *range(60, 190)]


SPECIAL = (NAN, OTHER_NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 3.0, -3.0)


@few_examples
@given(
    events=st.lists(st.lists(st.tuples(st.sampled_from(SPECIAL), st.booleans()), max_size=12), min_size=1, max_size=5)
)
def test_kernel_reference_and_method_agree_on_nan_infinities_and_zeros(
    events: list[list[tuple[float, bool]]], device: torch.device
) -> None:
    """One rule (`compression/ordering.py`): NaN as minus infinity, -0.0 as 0.0, ties to the lowest index."""
    values = [value for event in events for value, _ in event]
    scores = torch.tensor(values, dtype=torch.float32, device=device)
    lengths = torch.tensor([len(event) for event in events], device=device)
    keep = torch.tensor([sum(kept for _, kept in event) for event in events], device=device)
    total = int(keep.sum())
    by_method = select_survivors(scores, lengths, keep, total)
    assert torch.equal(reference(scores, lengths, keep, total), by_method)
    assert torch.equal(select_per_event(scores, lengths, keep, total), by_method)


def test_nan_is_chosen_last_and_still_chosen(device: torch.device) -> None:
    scores = torch.tensor([NAN, 1.0, OTHER_NAN, -5.0, -INF, 2.0])
    assert [check(scores, [6], [k], device, k).tolist() for k in range(1, 7)] == [
        [5], [1, 5], [1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


def test_one_event_larger_than_a_block(device: torch.device) -> None:
    size = 2 * BLOCK + 17
    scores = torch.randint(50, (size,), generator=torch.Generator().manual_seed(1)).float()
    check(scores, [5, size - 5], [2, size // 3], device)


def test_whole_videos_beside_events(device: torch.device) -> None:
    """With `quota` "video" a run is a whole video's: longer than a block, beside another video's events."""
    lengths, size = [40, 7, 13], BLOCK + 901
    scores = torch.randint(9, (size + sum(lengths),), generator=torch.Generator().manual_seed(2)).float()
    check(scores, [size, *lengths], [size * 3 // 4, 31, 3, 5], device)
    check(scores, [*lengths, size], [31, 3, 5, size * 3 // 4], device)


def test_thousands_of_events(device: torch.device) -> None:
    lengths = [index % 3 for index in range(1100)]  # the interpreter needs milliseconds an event
    keep = [2 if index % 22 == 20 else 0 for index in range(1100)]
    scores = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(3))
    index = check(scores, lengths, keep, device)
    assert int((index >= 0).sum()) > 20


@pytest.mark.parametrize("total", [0, 3, 10, 40])
def test_another_total_cuts_off_or_fills_up(total: int, device: torch.device) -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(4))
    index = check(scores, [10, 20], [4, 6], device, total)
    assert index.shape == (total,)
    assert (index[10:] == -1).all()


def test_same_choice_every_time(device: torch.device) -> None:
    scores = torch.randint(4, (300,), generator=torch.Generator().manual_seed(6)).float()
    first = check(scores, [300], [150], device)
    assert all(torch.equal(first, check(scores, [300], [150], device)) for _ in range(3))


def test_refusals(device: torch.device) -> None:
    lengths, keep = ints(4, device=device), ints(2, device=device)
    with pytest.raises(TypeError, match="scores is float16, expected float32"):
        select_per_event(torch.zeros(4, dtype=torch.float16, device=device), lengths, keep, 2)
    with pytest.raises(ValueError, match=r"keep has shape \[2\], expected \[1\]"):
        select_per_event(torch.zeros(4, device=device), lengths, ints(1, 1, device=device), 2)
    with pytest.raises(ValueError, match="total must not be negative"):
        select_per_event(torch.zeros(4, device=device), lengths, keep, -1)
