"""Checks that launchers make before a pointer reaches a kernel. Nothing is read from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Layout = Literal["contiguous", "rows", "any"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDEX = (torch.int32, torch.int64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless `condition`."""
    if not condition:
        raise ValueError(message)


def expect(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    layout: Layout = "contiguous",
) -> None:
    """Check one tensor argument.

    `shape` has None where any size will do. `layout`: "contiguous"; "rows", of which only the last axis must
    be contiguous; or "any". Kernels take the strides of what is not contiguous. Raises TypeError for a wrong
    dtype, ValueError for the rest.
    """
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, expected {allowed}")
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    matches = tensor.dim() == len(shape) and all(
        size is None or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    require(matches, f"{name} has shape {list(tensor.shape)}, expected {wanted}")
    require(tensor.device == device, f"{name} is on {tensor.device}, expected {device}")
    if layout == "contiguous":
        require(tensor.is_contiguous(), f"{name} must be contiguous")
    elif layout == "rows" and tensor.shape[-1] > 1:
        require(tensor.stride(-1) == 1, f"the last axis of {name} must be contiguous")
