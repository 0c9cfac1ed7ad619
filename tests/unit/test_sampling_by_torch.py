"""The CPU build's torch operations for the greedy choice and for logprobs (`cpu/`)
against vLLM's kernels in the interpreter.
"""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.sample import gumbel, logprob

VOCABULARY = 2500
"""Three blocks of the kernel, the last of them not whole."""


def logits(seed: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, VOCABULARY)) * 4).to(dtype)
    made[:, 1030] = made[:, 1040] = made[:, 2100] = made.max() + seed % 2  # the highest twice in a block, and later
    return made


def sampled(made: torch.Tensor, rows: torch.Tensor, temperature: torch.Tensor, **more: object) -> torch.Tensor:
    seeds, at = torch.arange(8), torch.arange(len(rows))
    return gumbel.gumbel_sample(made, rows, temperature, seeds, at, True, False, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_the_kernel(monkeypatch: pytest.MonkeyPatch, seed: int, dtype: torch.dtype) -> None:
    made = logits(seed, 4, dtype)
    rows = torch.tensor([5, 0, 3, -1])  # the last is a dummy request
    chosen = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv("METOK_CPU_KERNELS", choice)
        chosen.append(sampled(made, rows, torch.zeros(8)))
    assert chosen[0].dtype == chosen[1].dtype
    assert chosen[0].tolist() == chosen[1].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_logprobs_equal_the_kernel(monkeypatch: pytest.MonkeyPatch, seed: int, dtype: torch.dtype) -> None:
    made = logits(seed, 3, dtype)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (3, 1 + seed * 3))).int()
    found = []
    for choice in ("triton", "torch"):
        monkeypatch.setenv("METOK_CPU_KERNELS", choice)
        found.append(logprob.compute_token_logprobs(made, ids))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_the_kernel_draws_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of the batch draws, the others do not: all go through vLLM's kernel, by the same noise."""
    made, rows = logits(1, 3, torch.float32), torch.tensor([2, 0, 1])
    temperature = torch.zeros(8)
    temperature[0] = 30.0  # of the second row
    found = [sampled(made, rows, temperature).tolist()]
    monkeypatch.setenv("METOK_CPU_KERNELS", "triton")
    found.append(sampled(made, rows, temperature).tolist())
    assert found[0] == found[1]
    assert found[0][0] == found[0][2] == 1030
    assert found[0][1] != 1030, "it did not draw"
    temperature[0], temperature[7] = 0.0, 1.0  # of a request that is not in this batch
    assert sampled(made, rows, temperature).tolist() == [1030] * 3


def test_logits_are_kept_for_a_draft() -> None:
    made, rows = logits(1, 2, torch.float32), torch.tensor([1, 0])
    cache = torch.zeros(8, 1, VOCABULARY)
    sampled(made, rows, torch.zeros(8), logits_cache=cache, logits_cache_col=torch.tensor(0))
    assert torch.equal(cache[1, 0], made[0])
    assert torch.equal(cache[0, 0], made[1])


def test_the_torch_operations_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the comparisons above would compare the kernels with themselves."""
    from vllm.v1.worker.gpu.sample import sampler

    monkeypatch.delenv("METOK_CPU_KERNELS", raising=False)
    monkeypatch.setattr(gumbel, "_gumbel_sample_kernel", Mock(side_effect=AssertionError("a kernel was launched")))
    monkeypatch.setattr(logprob, "_topk_log_softmax_kernel", gumbel._gumbel_sample_kernel)
    assert sampler.gumbel_sample is gumbel.gumbel_sample
    made = logits(1, 2, torch.float32)
    assert sampled(made, torch.tensor([0, 1]), torch.zeros(8)).tolist() == [1030, 1030]
    assert logprob.compute_token_logprobs(made, torch.tensor([[1030], [7]])).shape == (2, 1)
