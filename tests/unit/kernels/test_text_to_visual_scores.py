"""`text_to_visual_scores` against its float32 reference, and what the reference alone would not show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metok_kernels.text_to_visual_scores import Keys, PackedKeys, PagedKeys, reference, text_to_visual_scores
from metok_kernels.text_to_visual_scores.launch import KEYS_PER_SPLIT, prepare

from tests.support.kernels.common import DTYPES, cumulative, few_examples, ints

PAGE = 16


@dataclass(frozen=True)
class Item:
    """One video of one request: its text rows come last, its visual tokens anywhere before them."""

    rows: int
    keys: int
    visual: int


ITEMS = (Item(3, 63, 27), Item(1, 2, 1), Item(5, 100, 60))


def paged(
    requests: list[torch.Tensor], layout: str, dtype: torch.dtype, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter each request's keys [n, kv_heads, dim] over shuffled pages; (key cache view, block table).

    The cache has vLLM's shape [blocks, kv_heads, block_size, 2 * dim]; `layout` is its physical order. Every
    key no request owns is NaN, every unused entry of the table far out of range: reading one would show.
    """
    counts = [-(-len(keys) // PAGE) for keys in requests]
    pages, width = sum(counts) + 3, max(counts) + 1
    _, kv_heads, dim = requests[0].shape
    shape = (pages, kv_heads, PAGE, 2 * dim) if layout == "HND" else (pages, PAGE, kv_heads, 2 * dim)
    cache = torch.full(shape, float("nan"), dtype=dtype)
    keys_view = (cache.transpose(1, 2) if layout == "HND" else cache)[..., :dim]
    table = torch.full((len(requests), width), 10**9, dtype=torch.int32)
    free = torch.randperm(pages, generator=gen)
    taken = 0
    for row, (keys, count) in enumerate(zip(requests, counts, strict=True)):
        table[row, :count] = free[taken : taken + count].int()
        taken += count
        for index, key in enumerate(keys):
            keys_view[int(table[row, index // PAGE]), index % PAGE] = key
    return keys_view, table


def build(
    items: tuple[Item, ...],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the operation for one request an item; `layout` is "packed", "NHD" or "HND"."""
    query_heads, kv_heads, dim = heads
    gen = torch.Generator().manual_seed(sum(item.keys for item in items))
    rows = sum(item.rows for item in items)
    q = torch.randn(rows + 7, query_heads, dim, generator=gen).to(dtype)
    row_index = torch.randperm(rows + 7, generator=gen)[:rows].int()
    requests = [torch.randn(item.keys, kv_heads, dim, generator=gen).to(dtype) for item in items]
    keys: Keys
    if layout == "packed":
        # a NaN row after every request: nobody may attend to it
        gap = torch.full((1, kv_heads, dim), float("nan"), dtype=dtype)
        packed = torch.cat([part for request in requests for part in (request, gap)])
        starts = [sum(other.keys + 1 for other in items[:index]) for index in range(len(items))]
        keys = PackedKeys(packed.to(device), ints(*starts, device=device))
    else:
        cache, table = paged(requests, layout, dtype, gen)
        keys = PagedKeys(cache.to(device), table.to(device), ints(*range(len(items)), device=device))
    row_keys = [item.keys - item.rows + 1 + row for item in items for row in range(item.rows)]
    shuffled = [torch.randperm(max(item.keys - item.rows, 1), generator=gen) for item in items]
    visual = [order[: item.visual].sort().values for order, item in zip(shuffled, items, strict=True)]
    arguments = (
        q.to(device),
        keys,
        ints(*row_keys, device=device),
        cumulative((item.rows for item in items), device),
        torch.cat(visual).int().to(device),
        cumulative((len(chosen) for chosen in visual), device),
    )
    bounds = {
        "max_rows": max(item.rows for item in items),
        "max_visual": max(item.visual for item in items),
        "max_keys": max(item.keys for item in items),
    }
    return arguments, {"scale": dim**-0.5, "row_index": row_index.to(device), **bounds}


def check(arguments: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    scores = text_to_visual_scores(*arguments, **options)
    torch.testing.assert_close(scores, reference(*arguments, **options), rtol=2e-4, atol=1e-6)
    return scores


@pytest.mark.parametrize("layout", ["packed", "NHD", "HND"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype: torch.dtype, layout: str, device: torch.device) -> None:
    check(*build(ITEMS, (14, 2, 64), dtype, layout, device))


@pytest.mark.parametrize("heads", [(4, 4, 80), (7, 1, 60), (28, 4, 128), (2, 1, 16)])
def test_head_layouts(heads: tuple[int, int, int], device: torch.device) -> None:
    check(*build(ITEMS[:1], heads, torch.float16, "HND", device))


@few_examples
@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    layout=st.sampled_from(["packed", "HND"]),
)
def test_any_shape(shapes: list[tuple[int, int, int]], layout: str, device: torch.device) -> None:
    items = tuple(Item(rows, before + rows + 1, min(visual, before + 1)) for rows, before, visual in shapes)
    check(*build(items, (6, 2, 16), torch.float32, layout, device))


def test_longer_than_one_split(device: torch.device) -> None:
    items = (Item(2, KEYS_PER_SPLIT + 100, 30), Item(2, 40, 12))
    check(*build(items, (2, 1, 16), torch.float32, "HND", device))


def test_probabilities_of_all_keys_sum_to_one(device: torch.device) -> None:
    arguments, options = build((Item(1, 50, 49),), (4, 2, 16), torch.float32, "packed", device)
    everything = torch.arange(50, dtype=torch.int32, device=device)
    arguments = (*arguments[:4], everything, ints(0, 50, device=device))
    scores = check(arguments, {**options, "max_visual": 50})
    assert scores.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_rows_are_causal(device: torch.device) -> None:
    """A key after a row changes nothing in it, though another row sees it."""
    arguments, options = build((Item(4, 20, 10),), (2, 1, 16), torch.float32, "packed", device)
    keys = arguments[1].keys
    first_row_only = (*arguments[:2], arguments[2][:1], ints(0, 1, device=device), *arguments[4:])
    options["row_index"] = options["row_index"][:1]
    before = text_to_visual_scores(*first_row_only, **options)
    keys[17:20] = float("nan")  # rows see 17, 18, 19, 20 keys
    after = text_to_visual_scores(*first_row_only, **options)
    assert torch.equal(before, after)
    assert before.isfinite().all()


def test_same_scores_alone_batched_and_shuffled(device: torch.device) -> None:
    """Bit for bit: the order of every sum is the item's own, whatever else is in the launch."""
    items = (*ITEMS, Item(2, KEYS_PER_SPLIT + 5, 8))
    arguments, options = build(items, (6, 2, 16), torch.float32, "HND", device)
    together = text_to_visual_scores(*arguments, **options)
    q, keys, row_keys, cu_rows, visual, cu_visual = arguments
    for index in (2, 0):
        rows = slice(int(cu_rows[index]), int(cu_rows[index + 1]))
        columns = slice(int(cu_visual[index]), int(cu_visual[index + 1]))
        alone = text_to_visual_scores(
            q,
            PagedKeys(keys.cache, keys.block_table, keys.table_row[index : index + 1]),
            row_keys[rows],
            ints(0, rows.stop - rows.start, device=device),
            visual[columns],
            ints(0, columns.stop - columns.start, device=device),
            scale=options["scale"],
            max_rows=items[index].rows,
            max_visual=items[index].visual,
            max_keys=items[index].keys,
            row_index=options["row_index"][rows],
        )
        assert torch.equal(alone, together[columns])


def test_two_videos_of_one_request_share_keys_and_rows(device: torch.device) -> None:
    """Rows after the second video are rows of the first as well, and see both videos' keys."""
    gen = torch.Generator().manual_seed(3)
    q = torch.randn(6, 4, 16, generator=gen).to(device)
    keys = PackedKeys(torch.randn(40, 2, 16, generator=gen).to(device), ints(0, 0, device=device))
    arguments = (
        q,
        keys,
        # first video: 2 rows before the second video, 2 after it
        ints(15, 16, 39, 40, 39, 40, device=device),
        ints(0, 4, 6, device=device),
        ints(*range(2, 14), *range(20, 38), device=device),
        ints(0, 12, 30, device=device),
    )
    options = {"scale": 0.25, "max_rows": 4, "max_visual": 18, "max_keys": 40}
    options["row_index"] = ints(0, 1, 4, 5, 4, 5, device=device)
    check(arguments, options)


@pytest.mark.parametrize(
    ("cache_dtype", "per_vector"),
    [
        (torch.float8_e4m3fn, False),
        (torch.float8_e5m2, False),
        (torch.float8_e4m3fn, True),
        (torch.int8, True),
    ],
)
def test_quantised_caches(cache_dtype: torch.dtype, per_vector: bool, device: torch.device) -> None:
    gen = torch.Generator().manual_seed(5)
    stored = torch.randint(-20, 20, (8, 2, PAGE, 64), generator=gen).float()
    cache = stored.to(cache_dtype).to(device).transpose(1, 2)[..., :32]
    scale = torch.rand(8, PAGE, 2, generator=gen) * 0.1 + 0.05 if per_vector else torch.tensor([0.07])
    table = torch.randperm(8, generator=gen).view(2, 4).int().to(device)
    keys = PagedKeys(cache, table, ints(0, 1, device=device), scale.to(device))
    arguments = (
        torch.randn(5, 4, 32, generator=gen).to(torch.bfloat16).to(device),
        keys,
        ints(59, 60, 31, 32, 33, device=device),
        ints(0, 2, 5, device=device),
        ints(*range(3, 50), *range(30), device=device),
        ints(0, 47, 77, device=device),
    )
    check(arguments, {"scale": 32**-0.5, "max_rows": 3, "max_visual": 47, "max_keys": 60})


def test_large_logits_stay_finite(device: torch.device) -> None:
    arguments, options = build(ITEMS, (4, 2, 16), torch.float32, "packed", device)
    arguments[0].mul_(300.0)
    assert check(arguments, options).isfinite().all()


def test_no_text_rows_score_zero(device: torch.device) -> None:
    scores = check(*build((Item(0, 30, 20), Item(2, 9, 4)), (2, 1, 16), torch.float32, "HND", device))
    assert (scores[:20] == 0).all()
    assert (scores[20:] > 0).all()


def test_visual_index_out_of_range_is_not_read(device: torch.device) -> None:
    arguments, options = build((Item(2, 30, 20),), (2, 1, 16), torch.float32, "HND", device)
    # before the request, on an unused page, past the table
    arguments[4][3:6] = ints(-1, 47, 10**8, device=device)
    scores = text_to_visual_scores(*arguments, **options)
    assert scores[3:6].tolist() == [0.0, 0.0, 0.0]
    assert (scores[6:] > 0).all()


def test_nothing_of_rows_times_keys_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 frames: the scratch is rows x heads numbers a split, hundreds of times less than rows x keys."""
    meta = torch.device("meta")
    sizes: list[int] = []
    allocate = torch.empty

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        sizes.append(tensor.numel())
        return tensor

    rows, keys, visual = 100, 8000, 7000
    index = {name: torch.zeros(size, dtype=torch.int32, device=meta) for name, size in
             {"rows": rows, "visual": visual, "cu": 2, "item": 1}.items()}  # fmt: skip
    q = torch.zeros(rows, 28, 128, dtype=torch.bfloat16, device=meta)
    packed = PackedKeys(torch.zeros(keys, 4, 128, dtype=torch.bfloat16, device=meta), index["item"])
    monkeypatch.setattr(torch, "empty", record)
    prepare(
        q, packed, index["rows"], index["cu"], index["visual"], index["cu"], scale=1.0,
        max_rows=rows, max_visual=visual, max_keys=keys,
    )  # fmt: skip
    assert sum(sizes) < rows * 28 * 10 + visual
    assert sum(sizes) * 50 < rows * 28 * keys


def test_refusals(device: torch.device) -> None:
    arguments, options = build(ITEMS, (4, 2, 16), torch.float32, "HND", device)
    q, keys, *rest = arguments
    with pytest.raises(ValueError, match=r"q has shape .* expected \[any, any, any\]"):
        text_to_visual_scores(q[0], keys, *rest, **options)
    with pytest.raises(TypeError, match=r"keys\.cache is float16"):
        text_to_visual_scores(q, replace(keys, cache=keys.cache.half()), *rest, **options)
    with pytest.raises(ValueError, match="3 heads do not divide over 2"):
        text_to_visual_scores(q[:, :3].contiguous(), keys, *rest, **options)
    with pytest.raises(ValueError, match="needs `scale`"):
        text_to_visual_scores(q, replace(keys, cache=keys.cache.to(torch.int8)), *rest, **options)
    with pytest.raises(ValueError, match="last axis of q must be contiguous"):
        text_to_visual_scores(q.transpose(1, 2).contiguous().transpose(1, 2), keys, *rest, **options)
    with pytest.raises(ValueError, match="row_index is on meta"):
        text_to_visual_scores(*arguments, **{**options, "row_index": options["row_index"].to("meta")})
