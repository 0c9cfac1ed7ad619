"""`text_to_visual_scores` against its float32 reference, and what the reference alone would not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.text_to_visual_scores import reference, text_to_visual_scores
from metok_kernels.text_to_visual_scores.launch import KEYS_PER_SPLIT, prepare

from tests.support.kernels.common import DTYPES, few_examples, ints

Heads = tuple[int, int, int]
"""Query heads, KV heads, head dimension."""


def build(
    rows: int,
    keys: int,
    visual: int,
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    *,
    index: torch.dtype = torch.int64,
    strided: bool = False,
) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    """Arguments of the operation. The text rows come last, the visual tokens anywhere before them.

    `strided` puts queries and keys beside other numbers, as a model's projection leaves them: NaN there, and
    in the row behind the last key, so that reading one would show.
    """
    query_heads, kv_heads, dim = heads
    gen = torch.Generator().manual_seed(keys)
    q = torch.randn(rows, query_heads, dim, generator=gen).to(device, dtype)
    packed = torch.randn(keys, kv_heads, dim, generator=gen).to(device, dtype)
    if strided:
        wide = torch.full((keys + 1, query_heads + 2 * kv_heads, dim), float("nan"), device=device, dtype=dtype)
        wide[:keys, query_heads : query_heads + kv_heads] = packed
        wide[:rows, :query_heads] = q
        q, packed = wide[:rows, :query_heads], wide[:keys, query_heads : query_heads + kv_heads]
    row_keys = torch.arange(keys - rows + 1, keys + 1, dtype=index, device=device)
    order = torch.randperm(max(keys - rows, 1), generator=gen)[:visual].sort().values
    return (q, packed, row_keys, order.to(device, index)), {"scale": dim**-0.5}


def check(arguments: tuple[torch.Tensor, ...], options: dict[str, float]) -> torch.Tensor:
    scores = text_to_visual_scores(*arguments, **options)  # type: ignore[call-arg,arg-type]
    expected = reference(*arguments, **options)  # type: ignore[call-arg,arg-type]
    torch.testing.assert_close(scores, expected, rtol=2e-4, atol=1e-6)
    return scores


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype: torch.dtype, strided: bool, device: torch.device) -> None:
    for rows, keys, visual in ((3, 63, 27), (1, 2, 1), (5, 100, 60)):
        check(*build(rows, keys, visual, (14, 2, 64), dtype, device, strided=strided))


@pytest.mark.parametrize("heads", [(4, 4, 80), (7, 1, 60), (28, 4, 128), (2, 1, 16)])
def test_head_layouts(heads: Heads, device: torch.device) -> None:
    check(*build(3, 63, 27, heads, torch.float16, device))


@few_examples
@given(
    rows=st.integers(0, 40),
    before=st.integers(0, 80),
    visual=st.integers(0, 40),
    index=st.sampled_from([torch.int32, torch.int64]),
    strided=st.booleans(),
)
def test_any_shape(
    rows: int, before: int, visual: int, index: torch.dtype, strided: bool, device: torch.device
) -> None:
    shape = rows, before + rows + 1, min(visual, before + 1)
    check(*build(*shape, (6, 2, 16), torch.float32, device, index=index, strided=strided))


def test_longer_than_one_split(device: torch.device) -> None:
    check(*build(2, 2 * KEYS_PER_SPLIT + 100, 30, (2, 1, 16), torch.float32, device))


def test_probabilities_of_all_keys_sum_to_one(device: torch.device) -> None:
    arguments, options = build(1, 50, 49, (4, 2, 16), torch.float32, device)
    scores = check((*arguments[:3], torch.arange(50, device=device)), options)
    assert scores.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_rows_are_causal(device: torch.device) -> None:
    """A key after a row changes nothing in it, though another row sees it."""
    (q, keys, row_keys, visual), options = build(4, 20, 10, (2, 1, 16), torch.float32, device)
    before = text_to_visual_scores(q[:1], keys, row_keys[:1], visual, **options)
    keys[17:20] = float("nan")  # rows see 17, 18, 19, 20 keys
    after = text_to_visual_scores(q[:1], keys, row_keys[:1], visual, **options)
    assert torch.equal(before, after)
    assert before.isfinite().all()


def test_keys_behind_all_rows_change_nothing(device: torch.device) -> None:
    """Bit for bit: an empty split behind the last key that a row sees adds an exact zero."""
    (q, keys, row_keys, visual), options = build(3, 60, 20, (6, 2, 16), torch.float32, device)
    alone = text_to_visual_scores(q, keys, row_keys, visual, **options)
    more = torch.cat([keys, torch.full((KEYS_PER_SPLIT + 5, 2, 16), float("nan"), device=device)])
    assert torch.equal(text_to_visual_scores(q, more, row_keys, visual, **options), alone)


def test_large_logits_stay_finite(device: torch.device) -> None:
    arguments, options = build(5, 100, 60, (4, 2, 16), torch.float32, device)
    arguments[0].mul_(300.0)
    assert check(arguments, options).isfinite().all()


def test_no_text_rows_score_zero(device: torch.device) -> None:
    scores = check(*build(0, 30, 20, (2, 1, 16), torch.float32, device))
    assert scores.tolist() == [0.0] * 20


def test_a_visual_index_that_is_no_key_is_not_read(device: torch.device) -> None:
    (q, keys, row_keys, visual), options = build(2, 30, 20, (2, 1, 16), torch.float32, device, strided=True)
    visual[3:6] = ints(-1, 30, 10**8, device=device)
    scores = text_to_visual_scores(q, keys, row_keys, visual, **options)
    assert scores[3:6].tolist() == [0.0, 0.0, 0.0]
    assert (scores[6:] > 0).all()


def test_nothing_of_rows_times_keys_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 frames: the scratch is rows x heads numbers a split, hundreds of times less than rows x keys."""
    sizes: list[int] = []
    allocate = torch.empty

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        sizes.append(tensor.numel())
        return tensor

    rows, keys, visual = 100, 8000, 7000
    row_keys, index = (torch.zeros(size, dtype=torch.int64, device="meta") for size in (rows, visual))
    q = torch.zeros(rows, 28, 128, dtype=torch.bfloat16, device="meta")
    packed = torch.zeros(keys, 4, 128, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch, "empty", record)
    prepare(q, packed, row_keys, index, scale=1.0)
    assert sum(sizes) < rows * 28 * 10 + visual
    assert sum(sizes) * 50 < rows * 28 * keys


def test_refusals(device: torch.device) -> None:
    (q, keys, *rest), options = build(3, 63, 27, (4, 2, 16), torch.float32, device)
    with pytest.raises(ValueError, match=r"q has shape .* expected \[any, any, any\]"):
        text_to_visual_scores(q[0], keys, *rest, **options)
    with pytest.raises(TypeError, match="keys is float16, expected float32"):
        text_to_visual_scores(q, keys.half(), *rest, **options)
    with pytest.raises(ValueError, match="3 heads do not divide over 2"):
        text_to_visual_scores(q[:, :3].contiguous(), keys, *rest, **options)
    with pytest.raises(ValueError, match="last axis of q must be contiguous"):
        text_to_visual_scores(q.transpose(1, 2).contiguous().transpose(1, 2), keys, *rest, **options)
    with pytest.raises(ValueError, match=r"row_keys has shape \[2\], expected \[3\]"):
        text_to_visual_scores(q, keys, rest[0][:2], rest[1], **options)
    with pytest.raises(ValueError, match="visual is on meta"):
        text_to_visual_scores(q, keys, rest[0], rest[1].to("meta"), **options)
