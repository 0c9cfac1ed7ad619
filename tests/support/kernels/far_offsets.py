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
from metok_kernels import smooth_by_frame as smooth_op
from metok_kernels import text_to_visual_scores as scores_op
from metok_kernels import tiered_pool as pool_op
from metok_kernels.smooth_by_frame import launch as smooth_launch

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
    index = torch.tensor([rows - 1, rows - 2])
    positions = sparse(rows, dtype=torch.int64)
    far = index, hidden, hidden, positions
    actual, expected = gather_op.gather_rows(*far), gather_op.reference(*far)
    same("gather_rows hidden", actual[0], expected[0])
    same("gather_rows residual", actual[1], expected[1])
    axis = FAR // 2 + 8  # axis 2 starts past 2^31
    positions = sparse(2 * axis + 4, dtype=torch.int32).as_strided((3, 4), (axis, 1))
    positions.copy_(torch.arange(12).view(3, 4))
    near = torch.tensor([3, 1]), torch.zeros(4, 1), torch.zeros(4, 1), positions
    same("gather_rows positions", gather_op.gather_rows(*near)[2], gather_op.reference(*near)[2])


def scores() -> None:
    heads, dim = 4, 64
    stride = FAR // 2 + 64  # row 2 and key 2 lie past 2^31
    q = sparse(2 * stride + heads * dim).as_strided((3, heads, dim), (stride, dim, 1))
    keys = sparse(2 * stride + 2 * dim).as_strided((3, 2, dim), (stride, dim, 1))
    q.copy_(torch.randn(3, heads, dim))
    keys.copy_(torch.randn(3, 2, dim))
    row_keys, visual = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    for name, arguments in {
        "rows": (q, keys.contiguous(), row_keys, visual),
        "keys": (q.contiguous(), keys, row_keys, visual),
    }.items():
        actual = scores_op.text_to_visual_scores(*arguments, scale=0.2)
        same(f"scores {name}", actual, scores_op.reference(*arguments, scale=0.2))


def frames() -> None:
    stride = FAR // 2 + 64  # frame 2 lies past 2^31
    flat = sparse(2 * stride + 16 * 32)
    features = flat.as_strided((3, 16, 32), (stride, 32, 1))
    features.copy_(torch.randn(3, 16, 32))
    actual, expected = similarity_op.event_similarity(features), similarity_op.reference(features)
    same("event_similarity means", actual[0], expected[0])
    same("event_similarity cosines", actual[1], expected[1])
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
    lengths = torch.tensor([FAR // 2 + 1, FAR // 2 + 1, 4, 4])
    index = select_op.select_per_event(values, lengths, torch.tensor([0, 0, 2, 3]), 5)
    same("select_per_event", index, torch.tensor([0, 2, 4, 5, 7]) + FAR + 2)


def smooth() -> None:
    values = sparse(FAR + 10, dtype=torch.float32)
    values[-8:] = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    starts = torch.tensor([FAR + 2, FAR + 5, FAR + 5, FAR + 10])
    launch, out = smooth_launch.prepare(values, starts, 0.5)
    launch.run()
    frame = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    same("smooth_by_frame", out[-8:], smooth_op.reference(values[-8:], frame, 3, 0.5))


if __name__ == "__main__":
    torch.manual_seed(0)
    gather()
    scores()
    frames()
    select()
    smooth()
