"""Checks and launch of `gather_rows`."""

from __future__ import annotations

import torch

from metok_kernels.checks import FLOATS, INDEX, expect, require
from metok_kernels.gather_rows.kernel import gather_kernel
from metok_kernels.launch import Launch, ceil_div, power_of_two

Gathered = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def prepare(
    index: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[Launch, Gathered]:
    """Check the arguments of `gather_rows`; returns its launch and the tensors it fills."""
    device = hidden.device
    expect("index", index, (None,), INDEX, device)
    expect("hidden", hidden, (None, None), FLOATS, device, layout="rows")
    rows, width = hidden.shape
    out = index.shape[0]
    expect("residual", residual, (rows, width), FLOATS, device, layout="rows")
    require(positions.dim() in (1, 2), "positions must be [rows] or [axes, rows]")
    expect("positions", positions, (*positions.shape[:-1], rows), INDEX, device, layout="rows")
    hidden_out = torch.empty(out, width, dtype=hidden.dtype, device=device)
    residual_out = torch.empty(out, width, dtype=residual.dtype, device=device)
    position_out = torch.empty(*positions.shape[:-1], out, dtype=positions.dtype, device=device)
    two_axes = positions.dim() == 2
    block_d = min(max(power_of_two(width), 16), 1024)
    block_r = max(4096 // block_d, 1)
    launch = Launch(
        gather_kernel,
        (ceil_div(out, block_r), max(ceil_div(width, block_d), 1), 1),
        {
            "p_index": index, "p_hidden": hidden, "p_residual": residual, "p_position": positions,
            "p_hidden_out": hidden_out, "p_residual_out": residual_out, "p_position_out": position_out,
            "stride_hidden": hidden.stride(0), "stride_residual": residual.stride(0),
            "stride_position_axis": positions.stride(0) if two_axes else 0,
            "stride_hidden_out": width, "stride_residual_out": width, "stride_position_axis_out": out,
            "num_out": out, "num_rows": rows, "width": width,
        },
        {"BLOCK_R": block_r, "BLOCK_D": block_d, "AXES": positions.shape[0] if two_axes else 1},
    )  # fmt: skip
    return launch, (hidden_out, residual_out, position_out)


def gather_rows(
    index: torch.Tensor,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
) -> Gathered:
    """Rows `index` of the hidden state, the residual and the positions
    (docs/method.md section 2: survivors keep theirs).

    Args:
        index: [out] int, rows to take, in any order, repeats allowed. Indices outside `0 .. rows - 1`, such
            as the -1 with which `select_per_event` fills up, are not read and give zeros.
        hidden: [rows, width] float, row stride free.
        residual: [rows, width] float (of any float dtype), row stride free.
        positions: [rows] or, for M-RoPE, [axes, rows] int, axis stride free.

    Returns:
        Contiguous copies in the dtypes of the inputs: [out, width], [out, width], [out] / [axes, out].

    Raises TypeError or ValueError for wrong dtypes, shapes or devices.

    Cost: reads and writes `out * width` elements a tensor, 8 bytes read a row of index; no FLOPs.
    """
    launch, gathered = prepare(index, hidden, residual, positions)
    launch.run()
    return gathered
