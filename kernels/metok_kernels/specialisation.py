"""What Triton compiles a kernel anew for: the key of a launch, computed where no GPU is.

Triton compiles a kernel once for each combination of its constants, the type of each argument and, unless the
kernel says otherwise, of two facts about the value: an integer that is 1 becomes a constant, and whether an
integer or an address is divisible by 16. An absent tensor is a constant too. So a length or a slice of live
traffic can start the compiler in the middle of it. The rules are those of Triton 3.6 to 3.9
(`triton/runtime/jit.py`, `python/src/specialize.cc`); `tests/unit/kernels/test_specialisation.py` holds them
to Triton's own function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction  # type: ignore[import-untyped]  # no types

Argument = torch.Tensor | int | float | None
Constant = int | float | bool | str

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

Specialised = tuple[str, int | str | None]
"""Type of an argument and what else of it is compiled in: "D" for divisible by 16, "" for not, None where
nobody looks. A "constexpr" is its value."""


@dataclass(frozen=True)
class Key:
    """What one compiled kernel is for. Two launches with equal keys share it."""

    kernel: str
    arguments: tuple[tuple[str, Specialised], ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` runs in Triton's interpreter: decided by TRITON_INTERPRET when it was imported."""
    return isinstance(kernel, InterpretedFunction)


def unspecialised(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Arguments that `kernel` is not specialised on: (at all, by alignment)."""
    given: Mapping[str, Any] = kernel.kwargs if interpreted(kernel) else vars(kernel)
    return (
        frozenset(given["do_not_specialize"] or ()),
        frozenset(given["do_not_specialize_on_alignment"] or ()),
    )


def specialised(value: Argument, *, by_value: bool, by_alignment: bool) -> Specialised:
    """How Triton specialises one runtime argument.

    Args:
        value: a tensor (on `meta` it counts by its offset), an integer of 64 bits, a float, or None.
        by_value: whether the kernel leaves it out of `do_not_specialize`.
        by_alignment: the same of `do_not_specialize_on_alignment`.

    Raises:
        KeyError: a tensor of a dtype that no kernel takes.
    """
    if value is None:
        return "constexpr", None
    if isinstance(value, float):
        return "fp32", None
    if isinstance(value, torch.Tensor):
        kind, number = POINTERS[value.dtype], value.data_ptr()
    else:
        if value == 1 and by_value:
            return "constexpr", 1
        kind, number = ("i32" if -(2**31) <= value < 2**31 else "i64"), value
    if not by_value:
        return kind, None
    return kind, "D" if by_alignment and number % 16 == 0 else ""


def key_of(
    kernel: Any,
    args: Mapping[str, Argument],
    constants: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
) -> Key:
    """The key of a launch of `kernel` with these arguments, constants and options."""
    by_value, by_alignment = unspecialised(kernel)
    return Key(
        kernel.__name__,
        tuple(
            (name, specialised(value, by_value=name not in by_value, by_alignment=name not in by_alignment))
            for name, value in sorted(args.items())
        ),
        tuple(sorted(constants.items())),
        num_warps,
        num_stages,
    )
