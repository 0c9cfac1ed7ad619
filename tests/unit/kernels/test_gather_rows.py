"""`gather_rows` is a copy: equal to torch indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.gather_rows import gather_rows, reference

from tests.support.kernels.common import DTYPES, few_examples


def check(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    actual, expected = gather_rows(*arguments), reference(*arguments)
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert got.is_contiguous()
        assert torch.equal(got, wanted)
    return actual


@pytest.mark.parametrize("width", [1, 60, 63, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths_and_dtypes(dtype: torch.dtype, width: int, device: torch.device) -> None:
    hidden = torch.randn(63, width).to(device, dtype)
    index = torch.randint(63, (60,)).to(device)
    check(index, hidden, (hidden.float() * 2), torch.randint(10**6, (3, 63)).to(device))


@few_examples
@given(
    rows=st.integers(0, 40),
    index=st.lists(st.integers(-2, 45), max_size=70),
    axes=st.sampled_from([(), (1,), (3,)]),
)
def test_any_index(rows: int, index: list[int], axes: tuple[int, ...], device: torch.device) -> None:
    """Repeats, any order, out of range, nothing at all."""
    hidden = torch.randn(rows, 60).to(device)
    positions = torch.randint(99, (*axes, rows)).to(device)
    chosen = torch.tensor(index, dtype=torch.int32, device=device)
    check(chosen, hidden, torch.randn(rows, 60).to(device), positions)


def test_indices_outside_give_zeros(device: torch.device) -> None:
    hidden = torch.full((4, 60), 7.0, device=device)
    positions = torch.full((3, 4), 9, device=device)
    index = torch.tensor([-1, 3, 4, -(2**40), 2**40], device=device)
    out, residual, moved = check(index, hidden, hidden + 1, positions)
    assert out[:, 0].tolist() == [0, 7, 0, 0, 0]
    assert residual[:, 0].tolist() == [0, 8, 0, 0, 0]
    assert moved.tolist() == [[0, 9, 0, 0, 0]] * 3


def test_strided_inputs(device: torch.device) -> None:
    """A slice of a wider buffer, and positions that are rows of a longer one, as vLLM keeps them."""
    buffer = torch.randn(20, 200).to(device)
    positions = torch.arange(3 * 50, device=device).view(3, 50)[:, :20]
    check(torch.arange(19, -1, -1, device=device), buffer[:, 40:100], buffer[:, 100:160], positions)


def test_values_are_copied_not_computed(device: torch.device) -> None:
    """NaN and infinities of the input, and huge positions, arrive as they were."""
    hidden = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]], device=device)
    positions = torch.tensor([2**62], device=device)
    out, residual, moved = gather_rows(torch.tensor([0], device=device), hidden, hidden, positions)
    assert torch.equal(out.view(torch.int32), hidden.view(torch.int32))
    assert torch.equal(residual.view(torch.int32), hidden.view(torch.int32))
    assert moved.item() == 2**62


def test_refusals(device: torch.device) -> None:
    hidden, index = torch.zeros(4, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    positions = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"residual has shape \[4, 9\], expected \[4, 8\]"):
        gather_rows(index, hidden, torch.zeros(4, 9, device=device), positions)
    with pytest.raises(ValueError, match=r"positions has shape \[3, 5\], expected \[3, 4\]"):
        gather_rows(index, hidden, hidden, torch.zeros(3, 5, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="positions must be"):
        gather_rows(index, hidden, hidden, torch.zeros(1, 3, 4, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match="index is float32, expected int32, int64"):
        gather_rows(index.float(), hidden, hidden, positions)
