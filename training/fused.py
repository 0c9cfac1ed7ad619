"""The element-wise parts of a layer. :func:`compile_all` has PyTorch's compiler make one loop of each.

Training this small a model is bound by such loops, not by its matrix products: compiled, they take a third to
two thirds of the time. The compiler needs a C++ compiler, so it is an option.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., H]`` over its root mean square, times ``weight [H]``."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: ``x [..., D]``, ``cos`` and ``sin`` of a shape that broadcasts to it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def compile_all() -> None:
    """Compile the functions of this module, in this process."""
    for function in (rms_norm, swiglu, rotate):
        globals()[function.__name__] = torch.compile(function, dynamic=True)
