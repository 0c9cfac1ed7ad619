"""Every operation on data past element 2^31 of its buffer, in the interpreter.

Run as a program: an address computed in 32 bits would end the process, not fail an assertion. Prints one line
a case. A buffer of 2^31 elements costs no memory: only the pages that are read or written exist.
"""

from __future__ import annotations

import math
import mmap
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from metok_kernels import event_similarity as similarity_op
from metok_kernels import gather_rows as gather_op
from metok_kernels import select_per_event as select_op
from metok_kernels import text_to_visual_scores as scores_op
from metok_kernels import tiered_pool as pool_op

FAR = 2**31


def sparse(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A zero tensor of any size whose pages exist only once they are written."""
    count = math.prod(shape) * torch.tensor([], dtype=dtype).element_size()
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def same(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Report one case; the values must not be all zero, as untouched memory would be."""
    assert expected.float().abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    print(f"ok {name}", flush=True)


def gather() -> None:
    width = 4096
    rows = FAR // width + 3
    hidden = sparse(rows, width)
    hidden[-2:] = torch.randn(2, width).half()
    index = torch.tensor([rows - 1, rows - 2], dtype=torch.int32)
    same("gather_rows", gather_op.gather_rows(index, hidden)[0], gather_op.reference(index, hidden)[0])
    axis = FAR // 2 + 8  # axis 2 starts past 2^31
    positions = sparse(2 * axis + 4, dtype=torch.int32).as_strided((3, 4), (axis, 1))
    positions.copy_(torch.arange(12).view(3, 4))
    arguments = torch.tensor([3, 1], dtype=torch.int32), torch.zeros(4, 1), None, positions
    moved, expected = gather_op.gather_rows(*arguments)[2], gather_op.reference(*arguments)[2]
    assert moved is not None
    assert expected is not None
    same("gather_rows positions", moved, expected)


def scores() -> None:
    tokens, heads, dim = FAR // (4 * 64) + 4, 4, 64
    q = sparse(tokens, heads, dim)
    q[-3:] = torch.randn(3, heads, dim).half()
    cu_rows, cu_visual = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32)
    row_index = torch.tensor([tokens - 3, tokens - 2, tokens - 1], dtype=torch.int32)
    row_keys = torch.tensor([28, 29, 30], dtype=torch.int32)
    visual = torch.arange(4, 24, dtype=torch.int32)
    far_rows = FAR // (2 * dim) + 40
    packed = sparse(far_rows, 2, dim)
    packed[-30:] = torch.randn(30, 2, dim).half()
    blocks = FAR // (16 * 2 * dim) + 4
    cache = sparse(blocks, 16, 2, dim)
    cache[-3:] = torch.randn(3, 16, 2, dim).half()
    table = torch.tensor([[blocks - 1, blocks - 3]], dtype=torch.int32)
    layouts: dict[str, scores_op.Keys] = {
        "packed": scores_op.PackedKeys(packed, torch.tensor([far_rows - 30], dtype=torch.int32)),
        "paged": scores_op.PagedKeys(cache, table, torch.tensor([0], dtype=torch.int32)),
    }
    for name, keys in layouts.items():
        arguments = (q, keys, row_keys, cu_rows, visual, cu_visual)
        options = {"scale": 0.2, "max_rows": 3, "max_visual": 20, "max_keys": 30}
        actual = scores_op.text_to_visual_scores(*arguments, row_index=row_index, **options)
        same(f"scores {name}", actual, scores_op.reference(*arguments, row_index=row_index, **options))


def frames() -> None:
    stride = FAR // 2 + 64  # frame 2 lies past 2^31
    flat = sparse(2 * stride + 16 * 32)
    features = flat.as_strided((3, 16, 32), (stride, 32, 1))
    features.copy_(torch.randn(3, 16, 32))
    cu = torch.tensor([0, 3])
    actual, expected = similarity_op.event_similarity(features, cu), similarity_op.reference(features, cu)
    same("event_similarity means", actual[0], expected[0])
    same("event_similarity cosines", actual[1][:2], expected[1][:2])
    for mode in ("average", "bilinear"):
        arguments = features.view(3, 4, 4, 32), torch.tensor([2, 2, 2]), torch.tensor([0, 4, 8])
        options = {"mode": mode, "total": 12, "min_stride": 2}
        same(f"tiered_pool {mode} input", pool_op.tiered_pool(*arguments, **options),
             pool_op.reference(*arguments, **options))  # fmt: skip
    total = FAR // 32 + 12
    far = torch.tensor([total - 12, total - 8, total - 4], dtype=torch.int32)
    separator = torch.full((32,), 3.0).half()
    out = pool_op.tiered_pool(
        arguments[0], arguments[1], far + 1, mode="average", total=total + 1, min_stride=2,
        separator=separator, separator_offset=far[:1],
    )  # fmt: skip
    same("tiered_pool output", out[total - 11 :], pool_op.reference(*arguments, mode="average", total=12))
    same("tiered_pool separator", out[total - 12], separator)


def select() -> None:
    values = sparse(FAR + 10, dtype=torch.float32)
    values[-8:] = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    cu = torch.tensor([FAR + 2, FAR + 6, FAR + 10])
    index, cu_kept = select_op.select_per_event(values, cu, torch.tensor([2, 3]), max_length=4, capacity=5)
    same("select_per_event", index, torch.tensor([0, 2, 4, 5, 7]) + FAR + 2)
    same("select_per_event counts", cu_kept, torch.tensor([0, 2, 5], dtype=torch.int32))


if __name__ == "__main__":
    torch.manual_seed(0)
    gather()
    scores()
    frames()
    select()
