"""A Triton launch as a value, so that what is run is also what is compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped]  # no types

Argument = torch.Tensor | int | float | None
Constant = int | float | bool | str


def ceil_div(a: int, b: int) -> int:
    """`ceil(a / b)` of integers, `b > 0`."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter: decided by TRITON_INTERPRET when it was imported."""
    return isinstance(kernel, InterpretedFunction)


@dataclass(frozen=True)
class Launch:
    """One kernel, its grid and its arguments.

    Operations build a `Launch` first and run it afterwards, so that ahead-of-time compilation (`aot.py`) sees
    the very signature, alignment and constants of a real call; it may be built from tensors on `meta`.
    """

    kernel: Any
    """A function decorated with `triton.jit`."""
    grid: tuple[int, int, int]
    args: Mapping[str, Argument]
    """Runtime arguments by name; None is an absent tensor."""
    constants: Mapping[str, Constant] = field(default_factory=dict)
    """`tl.constexpr` arguments by name."""
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch on the device of the first tensor. An empty grid does nothing.

        Raises RuntimeError where that device cannot run it: CPU tensors need Triton's interpreter.
        """
        device = next(value.device for value in self.args.values() if isinstance(value, torch.Tensor))
        if device.type != "cuda" and not (device.type == "cpu" and interpreted(self.kernel)):
            raise RuntimeError(
                f"a Triton kernel was given tensors on '{device}': move them to a GPU, call the operation's "
                "`reference` instead, or set TRITON_INTERPRET=1 before the first import (tests only)"
            )
        if 0 in self.grid:
            return
        if max(self.grid[1:]) > 65535:
            raise ValueError(f"grid {self.grid} is too large: split the call into smaller batches")
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
