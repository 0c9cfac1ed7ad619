"""Checks and launch of `tiered_pool`."""

from __future__ import annotations

import torch

from metok_kernels.checks import FLOATS, INDEX, expect, require
from metok_kernels.launch import Launch, ceil_div, power_of_two
from metok_kernels.tiered_pool.kernel import tiered_pool_kernel
from metok_kernels.tiered_pool.reference import Mode, pooled_grid

BLOCK_TOKENS = 16


def prepare(
    frames: torch.Tensor,
    stride: torch.Tensor,
    offset: torch.Tensor,
    *,
    mode: Mode,
    total: int,
    min_stride: int = 1,
    row_gap: bool = False,
    separator: torch.Tensor | None = None,
    separator_offset: torch.Tensor | None = None,
) -> tuple[Launch, torch.Tensor]:
    """Check the arguments of `tiered_pool`; returns its launch and the tensor it fills."""
    device = frames.device
    expect("frames", frames, (None, None, None, None), FLOATS, device, layout="rows")
    count, height, width, channels = frames.shape
    require(min(height, width, channels) > 0, f"frames has shape {list(frames.shape)}: its frames are empty")
    expect("stride", stride, (count,), INDEX, device)
    expect("offset", offset, (count,), INDEX, device)
    require(mode in ("average", "bilinear"), f"mode is {mode!r}, expected 'average' or 'bilinear'")
    require(min_stride >= 1 and total >= 0, "min_stride must be at least 1, total at least 0")
    require((separator is None) == (separator_offset is None), "separator and separator_offset come together")
    separators = 0
    if separator is not None and separator_offset is not None:
        expect("separator", separator, (channels,), (frames.dtype,), device)
        expect("separator_offset", separator_offset, (None,), INDEX, device)
        separators = separator_offset.shape[0]
    out = torch.empty(total, channels, dtype=frames.dtype, device=device)
    pooled_rows, pooled_columns = pooled_grid(height, width, min_stride)
    blocks = ceil_div(pooled_rows * pooled_columns, BLOCK_TOKENS)
    block_d = min(max(power_of_two(channels), 16), 128)
    launch = Launch(
        tiered_pool_kernel,
        (count * blocks + ceil_div(separators, BLOCK_TOKENS), ceil_div(channels, block_d), 1),
        {
            "p_x": frames, "p_stride": stride, "p_offset": offset, "p_separator": separator,
            "p_separator_offset": separator_offset, "p_out": out, "stride_frame": frames.stride(0),
            "stride_y": frames.stride(1), "stride_x": frames.stride(2),
            "frames": count, "separators": separators, "total": total, "width": channels,
            "height": height, "columns": width, "blocks": blocks,
        },
        {
            "BLOCK_T": BLOCK_TOKENS, "BLOCK_D": block_d,
            "BILINEAR": mode == "bilinear", "HAS_SEPARATOR": separator is not None, "ROW_GAP": row_gap,
            "TAPS": 4,
        },
    )  # fmt: skip
    return launch, out


def tiered_pool(
    frames: torch.Tensor,
    stride: torch.Tensor,
    offset: torch.Tensor,
    *,
    mode: Mode,
    total: int,
    min_stride: int = 1,
    row_gap: bool = False,
    separator: torch.Tensor | None = None,
    separator_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pool each frame's grid by its stride,
    pack the tokens and the separators (docs/method.md sections 1.5 and 1.6).

    Both give ceil(H/s) x ceil(W/s) tokens. `average` is `torch.nn.functional.avg_pool2d(stride)`, over the
    cells that a window has where it is cut; `bilinear` is `interpolate(mode="bilinear")`. Computed in
    float32, stored in the input's dtype.

    Args:
        frames: [frames, height, width, D] float, all videos packed; all strides but D's are free.
        stride: [frames] int, at least 1: tokens merged along each axis. Chosen on the device; not read here.
        offset: [frames] int: output row of each frame's first token; its tokens follow, row by row of its
            grid.
        mode: the model's own pooling.
        total: output rows; docs/method.md section 4 knows it before any tensor exists.
        min_stride: host bound: no frame has a smaller stride. Sizes the grid.
        row_gap: an output row is left out behind each row of a frame's grid, for a separator.
        separator: [D], or None.
        separator_offset: [separators] int: output rows that receive `separator`.

    Returns:
        [total, D] in the dtype of `frames`. Rows that no frame and no separator covers are not written; rows
        outside 0 .. total - 1 are dropped.

    Cost: average reads `frames * H * W * D` elements once (less the cells no window covers), bilinear at most
    4 an output element; writes `total * D`. About one FLOP an element read.
    """
    launch, out = prepare(
        frames, stride, offset, mode=mode, total=total, min_stride=min_stride, row_gap=row_gap, separator=separator,
        separator_offset=separator_offset,
    )  # fmt: skip
    launch.run()
    return out
