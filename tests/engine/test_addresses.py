"""The guard of this folder's engines refuses what the CPU's kernels would not."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops

from tests.support.guards.addresses import check_read, check_write

CACHE = torch.zeros(4, 2, 16, 8)  # 4 blocks of 16


@pytest.mark.parametrize("slots", [[64], [-2], [3, 3], [0, 1, 2]])
def test_writes(slots: list[int]) -> None:
    check_write(torch.zeros(2, 2, 8), CACHE, torch.tensor([63, -1]))
    with pytest.raises(AssertionError):
        check_write(torch.zeros(2, 2, 8), CACHE, torch.tensor(slots))


@pytest.mark.parametrize(
    ("starts", "lengths", "table"),
    [
        ([0, 3], [20], [[0, 3]]),  # more queries than rows
        ([0, 2], [33], [[0, 3]]),  # more tokens than blocks
        ([0, 2], [20], [[0, 4]]),  # no such block
        ([0, 2], [1], [[0, 3]]),  # more queries than tokens
        ([0, 1, 2], [20], [[0, 3]]),  # a request without a length
    ],
)
def test_reads(starts: list[int], lengths: list[int], table: list[list[int]]) -> None:
    rows = torch.zeros(2, 2, 8)
    check_read(rows, rows, CACHE, torch.tensor([0, 2]), torch.tensor([20]), torch.tensor([[0, 3]]))
    check_read(rows, rows, CACHE, torch.tensor([0, 2]), torch.tensor([16]), torch.tensor([[0, 99]]))  # not used
    with pytest.raises(AssertionError):
        check_read(rows, rows, CACHE, torch.tensor(starts), torch.tensor(lengths), torch.tensor(table))


def test_the_engine_has_it() -> None:
    assert (
        ops.cpu_attn_reshape_and_cache.__module__ == ops.cpu_attention_with_kv_cache.__module__ == check_read.__module__
    )
