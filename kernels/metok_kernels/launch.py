"""A Triton launch as a value, so that what is run is also what is compiled ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from metok_kernels.specialisation import Argument, Constant, Key, interpreted, key_of

__all__ = ["Argument", "Constant", "Launch", "ceil_div", "interpreted", "power_of_two", "recorded_launches"]

_recorders: list[set[Key]] = []


def ceil_div(a: int, b: int) -> int:
    """`ceil(a / b)` of integers, `b > 0`."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@contextlib.contextmanager
def recorded_launches() -> Iterator[set[Key]]:
    """Collects the keys of all kernels launched inside the context: what Triton compiles, or has compiled."""
    seen: set[Key] = set()
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders[:] = [other for other in _recorders if other is not seen]


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

    @property
    def key(self) -> Key:
        """What Triton compiles the kernel anew for."""
        return key_of(self.kernel, self.args, self.constants, self.num_warps, self.num_stages)

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
        for seen in _recorders:
            seen.add(self.key)
        self._start(device)

    def _start(self, device: torch.device) -> None:
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.kernel[self.grid](**self.args, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
